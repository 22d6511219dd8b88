"""What training cases wrote, for tests."""

import json
from pathlib import Path

from cases import Case
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

    def run(self, cases: list[Case], processes: int) -> None:
        """Run cases in one launch."""
        file = self.root / f"cases-{cases[0].name}.json"
        file.write_text(json.dumps([case.as_json(self.root) for case in cases]))
        launch(Path(__file__).parent / "case_runner.py", [str(file)], processes)
