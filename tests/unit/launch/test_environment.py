"""Rank detection and worker variables, from environments as torchrun and SLURM make them."""

import pytest

from launch.environment import current_world, first_host, recorded_variables, single_world, worker_environment, worker_variables
from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29501",
}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}


def test_a_process_started_by_hand_has_no_world():
    assert current_world({}) is None


def test_torchrun_world():
    world = current_world(TORCHRUN)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)
    assert (world.master_addr, world.master_port, world.started_by) == ("10.0.0.1", 29501, "torchrun")


def test_srun_world_meets_at_its_first_host():
    world = current_world(SRUN, default_port=12345)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)
    assert (world.master_addr, world.master_port, world.started_by) == ("gpu007", 12345, "srun")


def test_torchrun_inside_srun_is_torchruns_world():
    assert current_world({**SRUN, "SLURM_NTASKS": "2", **TORCHRUN}).started_by == "torchrun"


def test_an_sbatch_script_itself_is_no_rank():
    in_script = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert current_world(in_script) is None


def test_a_single_srun_task_is_no_world():
    assert current_world({**SRUN, "SLURM_NTASKS": "1"}) is None


def test_uneven_srun_is_refused():
    with pytest.raises(ConfigError, match="8 tasks on 3 nodes"):
        current_world({**SRUN, "SLURM_STEP_NUM_NODES": "3"})


def test_ranks_without_a_meeting_point_are_refused():
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        current_world({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[007-009,12],login1", "gpu007"),
        ("gpu[12]", "gpu12"),
        ("login1,gpu[007-009]", "login1"),
        ("rack[1-2]-node[03,05]", "rack1-node03"),
        ("gpu[1-2].cluster", "gpu1.cluster"),
    ],
)
def test_first_host(node_list, host):
    assert first_host(node_list) == host


@pytest.fixture(scope="module")
def config():
    return compose(["experiment=ngpt_tiny"])


def test_cpu_workers_get_what_only_a_cpu_needs(config):
    variables = worker_variables(config, local_processes=1, cuda=False)
    assert variables["TORCHDYNAMO_DISABLE"] == "1"
    assert variables["GLOO_SOCKET_IFNAME"] == "lo"
    assert not {"TORCHDYNAMO_DISABLE", "GLOO_SOCKET_IFNAME"} & set(worker_variables(config, local_processes=1, cuda=True))


def test_gloo_may_leave_the_machine_on_several_nodes():
    two_nodes = compose(["experiment=ngpt_tiny", "cluster.nodes=2"])
    assert "GLOO_SOCKET_IFNAME" not in worker_variables(two_nodes, local_processes=1, cuda=False)


@pytest.mark.parametrize("cuda", [False, True])
def test_one_hardware_queue_only_where_collectives_overlap_layers(config, cuda):
    tensor_parallel = compose(["experiment=ngpt_tiny", "parallel.tensor=2", "cluster.gpus_per_node=2"])
    assert worker_variables(tensor_parallel, local_processes=2, cuda=cuda)["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in worker_variables(config, local_processes=1, cuda=cuda)


def test_memory_grows_in_segments_except_under_cuda_graphs(config):
    name, graphs = "PYTORCH_CUDA_ALLOC_CONF", compose(["experiment=ngpt_tiny", "megatron.cuda_graph_impl=local"])
    assert worker_variables(config, local_processes=1, cuda=True)[name] == "expandable_segments:True"
    assert name not in worker_variables(graphs, local_processes=1, cuda=True)
    assert name not in worker_variables(config, local_processes=1, cuda=False)
    eager = compose(["experiment=ngpt_tiny", "megatron.cuda_graph_impl=none"])
    assert name in worker_variables(eager, local_processes=1, cuda=True)


def test_the_users_value_under_another_name_wins_too(monkeypatch):
    ours = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert worker_environment(ours, None)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in worker_environment(ours, None)


def test_threads_never_fall_below_one(config):
    assert worker_variables(config, local_processes=4096, cuda=False)["OMP_NUM_THREADS"] == "1"


def test_the_users_value_wins_and_the_rank_is_added(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment = worker_environment({"OMP_NUM_THREADS": "2", "TORCHDYNAMO_DISABLE": "1"}, single_world())
    assert environment["OMP_NUM_THREADS"] == "7"
    assert environment["TORCHDYNAMO_DISABLE"] == "1"
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_recorded_variables_name_no_user_and_no_secret():
    environ = {"NCCL_ALGO": "Ring", "HOME": "/home/someone", "API_TOKEN": "secret", "SLURM_JOB_NODELIST": "gpu1"}
    assert recorded_variables(environ) == {"NCCL_ALGO": "Ring"}
