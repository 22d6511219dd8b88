"""The training cases of test_refused_steps.py, and the runner of all of them in one launch: `torchrun refused_steps.py CASES.json`.

A case is one of tests/distributed/case_runner.py and a fault: {"what": "loss" | "gradient", "value": "nan" | "inf" | 50, "steps": [3],
"rank": 1, "microbatch": 2}. Each rank tells in `refused-rank<N>.json` what a step leaves behind.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/distributed"))

BASE = ["cluster.gpus_per_node=2", "train.steps=6", "train.eval_steps=0", "checkpoint.save_at_end=true", "train.eval_interval=100"]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "precision=bf16"]
HYBRID = ["model=ngpt_hybrid_tiny", "model.num_layers=4", "model.layer_pattern='ME*E'"]
SKIP, ROLLBACK = ["train.on_nonfinite=skip"], ["train.on_nonfinite=rollback", "checkpoint.interval=2"]
NAN_LOSS = {"what": "loss", "value": "nan", "steps": [4], "rank": 1, "microbatch": 2}
INF_GRADIENT = {"what": "gradient", "value": "inf", "steps": [4], "rank": 0, "microbatch": 1}
SPIKES = ["train.steps=24", "train.spike_threshold=8"]


@dataclass
class Case:
    name: str
    overrides: list[str] = field(default_factory=list)
    fault: dict | None = None
    run: str | None = None  # the folder, where several cases share one

    def as_json(self, root: Path) -> dict:
        words = ["experiment=ngpt_tiny", *BASE, f"run.root={root}", f"run.name={self.run or self.name}", *self.overrides]
        return {"name": self.name, "overrides": words, "fault": self.fault}


def _left_out(*steps: int) -> list[str]:
    """Megatron's own way: the batches are read and thrown away."""
    return [f"megatron.iterations_to_skip={list(steps)}"]


CASES = [
    Case("stop_loss", fault=NAN_LOSS),
    Case("stop_gradient", fault=INF_GRADIENT),
    Case("stop_in_own_shard", fault=INF_GRADIENT | {"rank": 1}),  # the embedding lies at the end of the buffer
    Case("stop_replicas", ["parallel.distributed_optimizer=false"], INF_GRADIENT | {"value": "nan"}),
    Case("skip_loss", SKIP, NAN_LOSS),
    Case("skip_gradient", SKIP, INF_GRADIENT),
    Case("twin", _left_out(4)),
    Case("skip_overlap", [*SKIP, *OVERLAP], INF_GRADIENT),
    Case("twin_overlap", [*OVERLAP, *_left_out(4)]),
    Case("skip_hybrid", [*SKIP, *HYBRID], NAN_LOSS),
    Case("twin_hybrid", [*HYBRID, *_left_out(4)]),
    Case("skip_for_ever", [*SKIP, "train.steps=20"], NAN_LOSS | {"steps": list(range(2, 20))}),
    Case("rollback_without_checkpoint", ["train.on_nonfinite=rollback"], NAN_LOSS),
    Case("rollback_leaves", ROLLBACK, NAN_LOSS, run="rollback"),
    Case("rollback_returns", ROLLBACK, NAN_LOSS, run="rollback"),
    Case("twin_rollback", _left_out(3, 4)),
    Case("rollback_too_often_1", [*ROLLBACK, "train.max_rollbacks=1"], NAN_LOSS, run="too_often"),
    Case("rollback_too_often_2", [*ROLLBACK, "train.max_rollbacks=1"], NAN_LOSS | {"steps": [5]}, run="too_often"),
    Case("spike_noted", SPIKES, NAN_LOSS | {"value": 50, "steps": [22]}),
    Case("spike_skipped", [*SPIKES, "train.on_spike=skip"], NAN_LOSS | {"value": 50, "steps": [22]}),
    Case("twin_spike", [*SPIKES, *_left_out(22)]),
]


class Injection:
    """Puts the fault of a case into the model it is given, and looks at the optimizer at the end."""

    def __init__(self, rank: int):
        self.rank, self.fault, self.optimizer, self.microbatch = rank, None, None, 0

    def install(self) -> None:
        from megatron_ext.training import run, step_policy

        attach, attach_optimizer = run.Session.attach, step_policy.StepPolicy.attach_optimizer

        def with_fault(session, chunks: list) -> None:
            attach(session, chunks)
            self._put_into(chunks[0])

        def keep(policy, optimizer) -> None:
            self.optimizer = optimizer
            attach_optimizer(policy, optimizer)

        run.Session.attach, step_policy.StepPolicy.attach_optimizer = with_fault, keep

    def _is_due(self) -> bool:
        from megatron.training import get_args

        due = self.fault and self.fault["rank"] == self.rank and self.fault["microbatch"] == self.microbatch
        return bool(due and get_args().curr_iteration + 1 in self.fault["steps"])

    def _put_into(self, chunk) -> None:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        self.microbatch = 0

        def count(*_) -> None:
            self.microbatch = self.microbatch % get_num_microbatches() + 1

        def spoil_loss(module, inputs, output):
            return output * float(self.fault["value"]) if self.fault["what"] == "loss" and self._is_due() else output

        def spoil_gradient(gradient):
            if self.fault["what"] == "gradient" and self._is_due():
                gradient = gradient.clone()
                gradient.view(-1)[-1] = float(self.fault["value"])
            return gradient

        if self.fault:
            chunk.register_forward_pre_hook(count)
            chunk.register_forward_hook(spoil_loss)
            next(iter(chunk.parameters())).register_hook(spoil_gradient)

    def state(self) -> dict:
        """Whether every moment is a finite number, on this rank."""
        import torch

        inner = [optimizer.optimizer for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer])]
        moments = [value for optimizer in inner for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return {"moments": len(moments), "finite": all(bool(moment.isfinite().all()) for moment in moments)}


def main(file: str) -> None:
    import gc

    import case_runner
    import torch.distributed as dist

    from launch.environment import current_world
    from launch.worker import install_compat

    install_compat()
    from megatron.training.training import destroy_global_state

    injection = Injection(current_world().rank)
    injection.install()
    for case in json.loads(Path(file).read_text()):
        injection.fault = case["fault"]
        case_runner.run_case(case, injection.rank)
        folder = Path(file).parent / case["overrides"][len(BASE) + 2].removeprefix("run.name=")
        result = json.loads((folder / f"result-rank{injection.rank}.json").read_text()) | injection.state()
        (Path(file).parent / f"{case['name']}-rank{injection.rank}.json").write_text(json.dumps(result))
        destroy_global_state()
        dist.barrier()
        case_runner.destroy_subgroups()
        gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
