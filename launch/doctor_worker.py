"""Child processes of `ngpt doctor`: `python -m launch.doctor_worker numbers OUT | all_reduce`. A kernel's crash ends only the child.

Findings are appended to the file OUT, one JSON object per line, because libraries print to stdout as they like.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError
from ngpt.config.executor import choose_backend
from ngpt.findings import FAILED, OK, UNAVAILABLE, Finding, attempt, first_line

from .devices import gpu_names
from .environment import own_world
from .worker import install_compat

NVFP4 = "precision=nvfp4_paper"
FORMATS = {  # name: (model.transformer_impl, the other settings that select it)
    "bf16": ("local", ["precision=bf16"]),
    "fp8": ("transformer_engine", ["precision=fp8"]),
    "mxfp8": ("transformer_engine", ["precision=mxfp8"]),
    "nvfp4 native": ("transformer_engine", [NVFP4, "precision.executor=native"]),
    "nvfp4 emulated in Transformer Engine's modules": ("transformer_engine", [NVFP4, "precision.executor=emulated"]),
    "nvfp4 emulated in Megatron's modules": ("local", [NVFP4, "precision.executor=emulated"]),
    "precision.executor=auto": ("auto", [NVFP4]),
}
REDUCED_ELEMENTS = 2**22
REDUCTION_TIMEOUT = timedelta(seconds=120)


def numbers(out: Path) -> int:
    """Probes this machine's device and the choices that work on it."""
    import torch

    cuda = torch.cuda.is_available()
    with out.open("a", encoding="utf-8") as file:

        def tell(kind: str, content: dict[str, Any]) -> None:
            print(json.dumps({kind: content}), file=file, flush=True)

        tell("machine", describe_device())
        failed = set()
        for finding in _probe(cuda):
            failed |= {finding.subject} if finding.status == FAILED else set()
            tell("numbers", asdict(finding))
        for finding in formats(failed):
            tell("formats", asdict(finding))
    return 0


def _probe(cuda: bool) -> Iterator[Finding]:
    import torch

    from megatron_ext.precision.probe import probe_emulated
    from megatron_ext.precision.probe_native import probe_native

    if gpu_names() and not cuda:
        yield attempt("GPU", "torch computes on it", _cuda_answers)
    yield from probe_emulated(torch.device("cuda" if cuda else "cpu"))
    yield from probe_native()


def _cuda_answers() -> tuple[bool, str]:
    import torch

    torch.cuda.init()
    return False, f"the driver offers {len(gpu_names())}, torch {torch.__version__} sees none"


def describe_device() -> dict[str, Any]:
    """What torch was built with, and the GPUs it sees."""
    import torch

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(index) for index in range(usable)]
    return {
        "CUDA of torch": torch.version.cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "GPUs": [f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus],
    }


def formats(failed: set[str]) -> Iterator[Finding]:
    """Which formats can run here and whose modules run them, decided by the same code as in training.

    Args:
        failed: subjects that gave wrong numbers.
    """
    for name, (modules, overrides) in FORMATS.items():
        finding = _format(name, modules, overrides)
        wrong = finding.status == OK and any(finding.subject.startswith(subject) for subject in failed)
        yield replace(finding, status=FAILED, figure="its numbers are wrong") if wrong else finding


def _format(name: str, modules: str, overrides: list[str]) -> Finding:
    config = compose(["experiment=ngpt_tiny", f"model.transformer_impl={modules}", *overrides])
    try:
        install_compat()
        from megatron_ext.device import on_gpu
        from megatron_ext.layers.backend import get_backend
        from megatron_ext.precision.policy import choose_executors

        backend = get_backend(choose_backend(modules, on_gpu()))
        executors = set(choose_executors(config, backend.name).values())
    except ConfigError as error:
        return Finding(name, "", UNAVAILABLE, error.rule)
    except Exception as error:  # a broken installation may raise anything
        return Finding(name, "", FAILED, f"{type(error).__name__}: {first_line(str(error))}")
    if modules == "auto":
        return Finding(f"nvfp4 {executors.pop()}", f"chosen for {name}", OK, f"model.transformer_impl={backend.name}")
    return Finding(name, "", OK, "")


def all_reduce() -> int:
    """One rank of an all-reduce over all ranks; reports on stderr what is wrong."""
    import torch
    import torch.distributed as dist

    world = own_world()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=REDUCTION_TIMEOUT)
    own = torch.arange(REDUCED_ELEMENTS, device=device, dtype=torch.float32) % 1024
    total = own + world.rank
    dist.all_reduce(total)
    expected = own * world.size + sum(range(world.size))
    wrong = int((total != expected).sum())
    dist.destroy_process_group()
    if wrong:
        print(f"{wrong:,} of {REDUCED_ELEMENTS:,} sums are wrong", file=sys.stderr)
    return 1 if wrong else 0


def main(arguments: Sequence[str]) -> int:
    """Runs one mode."""
    return numbers(Path(arguments[1])) if arguments[0] == "numbers" else all_reduce()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
