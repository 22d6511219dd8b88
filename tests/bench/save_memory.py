"""Host memory of a checkpoint save: peak of each process during the save minus its level before, for several data-parallel sizes.

    python tests/bench/save_memory.py [--ranks 1 2 4] [--million-parameters 200] [--upstream]

Each size trains a dense nGPT on the CPU for one step and saves. A rank's peak is the kernel's high-water mark of its resident memory, reset
when the save begins. The host's is sampled: the proportional shares of all ranks and of the processes that write for them, where memory
that a forked writer shares with its rank counts once. `--upstream` saves by Megatron's own code.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
HIDDEN, VOCABULARY, LAYERS = 1024, 8192, 4
MIB = 2**20


def overrides(ranks: int, folder: Path, million_parameters: int) -> list[str]:
    """A dense model whose MLPs are as wide as the number of parameters asks for, in BF16 with fp32 states."""
    attention = LAYERS * 4 * HIDDEN * HIDDEN
    width = (million_parameters * 10**6 - 2 * VOCABULARY * HIDDEN - attention) // (LAYERS * 2 * HIDDEN) // 64 * 64
    return [
        "experiment=ngpt_tiny", f"model.num_layers={LAYERS}", f"model.hidden_size={HIDDEN}", f"model.ffn_hidden_size={width}",
        "model.num_attention_heads=16", "model.num_query_groups=16", "model.head_dim=64", f"model.vocab_size={VOCABULARY}",
        "train.seq_length=16", "train.micro_batch_size=1", f"train.global_batch_size={ranks}", "train.steps=1", "train.eval_interval=100",
        "train.eval_steps=0", "precision=bf16", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
        "megatron.ddp_bucket_size=10000000", "logging.health_interval=100", f"cluster.gpus_per_node={ranks}", f"run.root={folder}",
        f"run.name=save{ranks}",
    ]  # fmt: skip


def kilobytes(file: str, name: str) -> int:
    """A figure of a file below /proc, in KiB; 0 where the process has ended."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name + ":")), 0)


def host_share(root: int) -> int:
    """Proportional shares of the process `root` and all below it, in KiB."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {root}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(kilobytes(f"/proc/{process}/smaps_rollup", "Pss") for process in family)


def rank(folder: Path, million_parameters: int, upstream: bool) -> None:
    """One rank: train, and measure around the call that saves."""
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/distributed")]
    from case_runner import upstream_state

    from launch.environment import current_world
    from launch.worker import install_compat

    install_compat()
    import torch.distributed as dist
    from megatron.training import training

    from megatron_ext.training.run import leave, train
    from ngpt.config import compose

    world, save = current_world(), training.save_checkpoint
    figures = {}

    def measured(*args, **kwargs):
        dist.barrier()
        launcher, samples, done = os.getppid(), [], threading.Event()
        figures["level"] = kilobytes("/proc/self/status", "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        sampler = threading.Thread(target=lambda: [samples.append(host_share(launcher)) for _ in iter(lambda: done.wait(0.1), True)])
        if world.rank == 0:
            samples.append(host_share(launcher))
            sampler.start()
        dist.barrier()
        save(*args, **kwargs)
        done.set()
        figures["peak"] = kilobytes("/proc/self/status", "VmHWM")
        if world.rank == 0:
            sampler.join()
            figures["host_level"], figures["host_peak"] = samples[0], max(samples)

    training.save_checkpoint = measured
    config = compose(overrides(world.size, folder, million_parameters))
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    if upstream:
        with upstream_state():
            train(config, world.rank)
    else:
        train(config, world.rank)
    (folder / f"figures-{world.size}-{world.rank}.json").write_text(json.dumps(figures))
    leave()


def measure(ranks: int, million_parameters: int, upstream: bool) -> tuple[float, float]:
    """(largest rise of a rank, rise of the host) in MiB."""
    with tempfile.TemporaryDirectory() as name:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__, "--rank", name]
        command += ["--million-parameters", str(million_parameters), *(["--upstream"] if upstream else [])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
        found = [json.loads((Path(name) / f"figures-{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    rise = max(figures["peak"] - figures["level"] for figures in found)
    return rise * 1024 / MIB, (found[0]["host_peak"] - found[0]["host_level"]) * 1024 / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--million-parameters", type=int, default=200)
    parser.add_argument("--upstream", action="store_true")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.rank, options.million_parameters, options.upstream)
        return
    first = None
    print(f"{options.million_parameters}M parameters, state {options.million_parameters * 12e6 / MIB:.0f} MiB")
    for ranks in options.ranks:
        rise, host = measure(ranks, options.million_parameters, options.upstream)
        first = first or rise
        print(f"DP{ranks}: a rank {rise:6.0f} MiB ({rise / first:.2f} of the first), the host {host:6.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
