"""Steps leave nothing to Python's collector, which runs every 100 steps: a cycle would hold its tensors until then."""

import json
from pathlib import Path

from torchrun import launch


def test_no_step_leaves_objects_that_only_the_collector_can_free(tmp_path):
    """Evaluation, health figures, diagnostics and recomputation included; the first steps build what stays."""
    out = tmp_path / "found.json"
    launch(Path(__file__).with_name("garbage_probe.py"), [str(out)], processes=1)
    enabled, collected = zip(*json.loads(out.read_text()), strict=True)
    assert not any(enabled) and len(collected) == 8
    assert not any(collected[2:]), collected
