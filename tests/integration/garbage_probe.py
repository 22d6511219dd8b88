"""Counts what the collector finds after each step of a run: `torchrun garbage_probe.py OUT.json`."""

import gc
import json
import sys
from pathlib import Path

TINY = [
    "experiment=ngpt_hybrid_tiny", "precision=nvfp4_paper", "precision.diagnostics=true", "parallel.recompute=full", "train.steps=8",
    "train.eval_steps=1", "train.eval_interval=3", "logging.interval=1", "logging.health_interval=2", "checkpoint.save_at_end=false",
]  # fmt: skip


def main(out: str) -> None:
    from launch.worker import install_compat

    install_compat()
    import torch

    from megatron_ext.training.run import Session, train
    from ngpt.config import compose

    after_step, found = Session.after_step, []

    def count(session: Session) -> None:
        after_step(session)
        if session.step is not None:
            found.append([gc.isenabled(), gc.collect()])

    Session.after_step = count
    train(compose([*TINY, f"run.root={Path(out).parent}", "run.name=garbage"]), 0)
    Path(out).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
