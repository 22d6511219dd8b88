"""Rank detection and worker variables, from environments as torchrun and SLURM make them."""

import os
import pty
import signal
import socket
from dataclasses import replace

import pytest

from launch import environment
from launch.environment import current_world, own_world, recorded_variables, unseen_gpus, worker_environment, worker_variables
from launch.world import STEP_PORTS, check_port_free, first_host, single_world
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


def test_a_worker_has_a_world():
    assert own_world(TORCHRUN) == current_world(TORCHRUN)
    with pytest.raises(ConfigError, match="RANK: Not set.*ngpt train"):
        own_world({})


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


ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NNODES": "1"}


@pytest.mark.parametrize(
    "shell",
    [
        {"SLURM_STEP_ID": "4294967290"},  # salloc's shell, where it is a step
        {"SLURM_STEP_ID": "4294967290", "SLURM_PTY_PORT": "40001", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_ID": "4294967291"},  # the batch script
        {},  # salloc's shell on the machine it was called on
        {"SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "40001", "SLURM_STEP_NUM_TASKS": "2"},  # srun --pty bash
        {"SLURM_STEP_ID": "0", "SLURM_PTY_WIN_COL": "80", "SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # one task of an allocation of two
    ],
)
def test_a_shell_of_an_allocation_is_no_rank(shell):
    assert current_world({**ALLOCATION, **shell}) is None


def test_ranks_of_a_step_are_counted_by_the_step():
    world = current_world({**ALLOCATION, "SLURM_NTASKS": "8", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "2"})
    assert (world.size, world.local_size) == (2, 2)


def test_a_step_started_from_a_terminal_has_ranks_though_it_inherits_the_terminals_variables():
    inherited = {**ALLOCATION, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PTY_PORT": "40001"}
    in_terminal, without = _child(pty.fork), _child(os.fork)
    try:
        assert current_world({**inherited, "SLURM_TASK_PID": str(in_terminal)}) is None
        assert current_world({**inherited, "SLURM_TASK_PID": str(without)}).size == 2
    finally:
        for pid in (in_terminal, without):
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def _child(fork) -> int:
    """A process that waits: under `pty.fork` at a terminal of its own, under `os.fork` in a session without one."""
    ready, write = os.pipe()
    pid = fork()
    pid = pid[0] if isinstance(pid, tuple) else pid
    if pid == 0:
        if fork is os.fork:
            os.setsid()
        os.write(write, b"1")
        signal.pause()
    os.read(ready, 1)
    return pid


def test_a_variable_set_to_nothing_is_not_set():
    assert current_world({"RANK": "", "WORLD_SIZE": "", "MASTER_PORT": "", "SLURM_STEP_ID": ""}) is None
    assert current_world({**TORCHRUN, "MASTER_PORT": ""}).master_port == 29500


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK"),
        ({**TORCHRUN, "RANK": "8"}, "RANK"),
        ({**TORCHRUN, "LOCAL_RANK": "1.5"}, "LOCAL_RANK"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT"),
        ({**SRUN, "SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID"),
        ({**SRUN, "SLURM_NTASKS": "2(x4)"}, "SLURM_NTASKS"),
        ({**SRUN, "SLURM_PROCID": "\u0665"}, "SLURM_PROCID"),
        ({**SRUN, "SLURM_LOCALID": ""}, "SLURM_LOCALID"),
    ],
)
def test_a_value_that_is_no_number_is_told_in_one_line_that_names_it(variables, name):
    with pytest.raises(ConfigError) as caught:
        current_world(variables)
    assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)


def test_a_name_that_does_not_resolve_gives_way_to_the_address_of_the_node_that_runs_the_script(monkeypatch):
    def resolve(host, _port):
        if host != "known":
            raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    variables = {**SRUN, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
    assert current_world(variables).master_addr == "10.0.0.7"
    assert current_world({**variables, "SLURM_STEP_NODELIST": "known"}).master_addr == "known"
    assert current_world({**variables, "MASTER_ADDR": "10.0.0.8"}).master_addr == "10.0.0.8"


def test_steps_that_share_a_node_meet_at_ports_of_their_own():
    steps = [{"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(1000, 1020) for step in range(3)]
    ports = [current_world({**SRUN, **step}).master_port for step in steps]
    assert len(set(ports)) == len(ports) and all(port in STEP_PORTS for port in ports)
    restarted = current_world({**SRUN, **steps[0], "SLURM_RESTART_COUNT": "1"}).master_port
    assert restarted not in ports and restarted in STEP_PORTS
    assert current_world({**SRUN, **steps[0], "MASTER_PORT": "999"}).master_port == 999


def test_a_taken_port_is_told_in_one_line():
    with socket.create_server(("", 0)) as taken:
        world = replace(current_world(SRUN), master_port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"MASTER_PORT: {world.master_port}"):
            check_port_free(world)
    check_port_free(world)


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
    assert worker_variables(config, local_processes=1, cuda=False)["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in worker_variables(config, local_processes=1, cuda=True)


@pytest.mark.parametrize("cuda", [False, True])
def test_gloo_leaves_the_machine_on_several_nodes_only(config, cuda):
    assert worker_variables(config, local_processes=1, cuda=cuda)["GLOO_SOCKET_IFNAME"] == "lo"
    two_nodes = compose(["experiment=ngpt_tiny", "cluster.nodes=2"])
    called_one = compose(["experiment=ngpt_tiny", "cluster.gpus_per_node=2"])  # and started by others as one process on each of two
    assert "GLOO_SOCKET_IFNAME" not in worker_variables(called_one, local_processes=1, cuda=cuda)
    assert "GLOO_SOCKET_IFNAME" not in worker_variables(two_nodes, local_processes=1, cuda=cuda)


@pytest.mark.parametrize("cuda", [False, True])
def test_one_hardware_queue_only_where_collectives_overlap_layers(config, cuda):
    tensor_parallel = compose(["experiment=ngpt_tiny", "parallel.tensor=2", "cluster.gpus_per_node=2"])
    assert worker_variables(tensor_parallel, local_processes=2, cuda=cuda)["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in worker_variables(config, local_processes=1, cuda=cuda)


def test_userbuffers_leave_multicast_alone():
    words = ["experiment=ngpt_tiny", "precision=bf16", "parallel.tensor=2", "cluster.gpus_per_node=2"]
    overlapping = compose([*words, "megatron.tp_comm_overlap=true"])
    assert worker_variables(overlapping, local_processes=2, cuda=True)["UB_SKIPMC"] == "1"
    assert "UB_SKIPMC" not in worker_variables(compose(words), local_processes=2, cuda=True)


def test_a_trackers_client_reports_no_errors_of_its_own_unless_it_is_told_to(config, monkeypatch):
    name = "WANDB_ERROR_REPORTING"
    variables = worker_variables(compose(["experiment=ngpt_tiny", "logging.wandb.mode=offline"]), local_processes=1, cuda=False)
    assert variables[name] == "false" and name not in worker_variables(config, local_processes=1, cuda=False)
    monkeypatch.setenv(name, "true")
    assert worker_environment(variables, None)[name] == "true"


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


@pytest.mark.parametrize(
    ("variables", "gpus", "note"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,0"}, (), "note: CUDA_VISIBLE_DEVICES=0,0 shows CUDA no GPU (each may be named once): on the CPU"),
        ({}, (), "note: cluster=h100_1 has GPUs, and none is visible here: on the CPU"),
        ({"CUDA_VISIBLE_DEVICES": ""}, (), None),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ("a GPU",), None),
    ],
)
def test_gpus_that_are_named_and_not_seen_are_told(monkeypatch, variables, gpus, note):
    monkeypatch.setattr(environment, "gpu_names", lambda: gpus)
    assert unseen_gpus(compose(["experiment=ngpt_tiny", "cluster=h100_1"]), variables) == ([] if note is None else [note])
    assert unseen_gpus(compose(["experiment=ngpt_tiny", "cluster=cpu"]), {}) == []
