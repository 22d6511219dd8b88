"""Runs every training case once a session, one launch per world size, and hands the tests what the runs wrote."""

import json
from pathlib import Path

import cases
import hybrid_cases
import mtp_cases
import pytest
from torchrun import launch


class Results:
    """Metrics and result files of the cases below `root`."""

    def __init__(self, root: Path):
        self.root = root

    def rows(self, name: str) -> list[dict]:
        """The logged steps of a case; a case that failed fails the test that asks for it, with its error."""
        for rank_result in self.results(name):
            assert "error" not in rank_result, f"{name}: {rank_result['traceback']}"
        return [json.loads(line) for line in (self.root / name / "metrics.jsonl").read_text().splitlines()]

    def results(self, name: str) -> list[dict]:
        """The result file of every rank."""
        return [json.loads(path.read_text()) for path in sorted((self.root / name).glob("result-rank*.json"))]

    def summary(self, name: str) -> dict:
        return json.loads((self.root / name / "summary.json").read_text())

    def figures(self, name: str, *keys: str) -> list[tuple]:
        return [tuple(row[key] for key in ("step", *keys)) for row in self.rows(name)]


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Results:
    """All cases, run in the order of world sizes: larger worlds start from checkpoints of smaller ones."""
    root = tmp_path_factory.mktemp("distributed")
    names = ("ONE_PROCESS", "TWO_PROCESSES", "FOUR_PROCESSES")
    one, two, four = ([case for module in (cases, hybrid_cases, mtp_cases) for case in getattr(module, name, [])] for name in names)
    for processes, group in ((1, one), (2, two), (4, four)):
        file = root / f"cases{processes}.json"
        file.write_text(json.dumps([case.as_json(root) for case in group]))
        launch(Path(__file__).parent / "case_runner.py", [str(file)], processes)
    return Results(root)
