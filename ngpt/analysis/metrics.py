"""`metrics.jsonl`: one JSON object per logged step. Written, truncated on resume, and read here; imports no torch."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.files import replacing


class MetricsWriter:
    """Appends records to a metrics file. When `write` returns, the record is flushed, and a reader can see it.

    Opening removes a line that a kill cut short, so a new record never continues it. On resume, call `truncate_after` first.

    Args:
        path: The metrics file; its folder is made when missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            os.truncate(self.path, len(_complete(self.path.read_bytes())))
        self._file = open(self.path, "ab")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        A NaN or infinity becomes null, because JSON has neither, and its key is listed under `nonfinite`. A null not listed there means
        "not measured".

        Args:
            record: `step` (int) and any other figures: numbers, strings, None, or zero-dimensional tensors and arrays.
        """
        values = {key: value.item() if hasattr(value, "item") else value for key, value in record.items()}
        assert isinstance(values.get("step"), int), f"a metrics record needs an integer step, got {values.get('step')!r}"
        nonfinite = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        if nonfinite:
            values |= dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
        self._file.write(json.dumps(values, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def truncate_after(path: str | os.PathLike[str], step: int) -> None:
    """Drop the records after `step`, and a last line that a kill cut short. A missing file stays missing.

    The file is replaced atomically: a kill during the call leaves the old file or the new one.

    Args:
        path: The metrics file.
        step: The step of the checkpoint that the run resumes from; -1 if it starts from scratch.

    Raises:
        ConfigError: A line in the middle of the file is damaged.
    """
    path = Path(path)
    if not path.exists():
        return
    old = path.read_bytes()
    new = b"".join(line + b"\n" for line, record in _parse(path, old) if record["step"] <= step)
    if new == old:
        return
    with replacing(path) as file:
        file.write(new)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics file in the order written. A last line still being written, or cut short by a kill, is left out.

    Raises:
        ConfigError: The file is missing, or a complete line is not a record.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            str(path), "no such file", "`ngpt train` writes one line a logged step", "Wait for the first logged step, or see console.log"
        ) from None
    return [record for _, record in _parse(path, data)]


def measured(record: Mapping[str, Any], key: str) -> bool:
    """Whether a record holds a value of `key`, finite or not."""
    return record.get(key) is not None or key in record.get("nonfinite", ())


def number(record: Mapping[str, Any], key: str) -> float:
    """The value of `key` in a record; NaN where it is not finite, or no number."""
    value = record.get(key)
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _complete(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _parse(path: Path, data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    parsed = []
    for number, line in enumerate(_complete(data).split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            valid = _is_record(record)
        except (ValueError, RecursionError):
            valid = False
        if not valid:
            got = line[:60].decode(errors="replace")
            raise ConfigError(
                f"{path}:{number}", repr(got), "Every line is a JSON object with an integer step", "Delete the line, or restore the file"
            )
        parsed.append((line, record))
    return parsed


def _is_record(record: Any) -> bool:
    """Whether `step` is a whole number, and `nonfinite` a list of names."""
    if not isinstance(record, dict) or not isinstance(record.get("nonfinite", []), list):
        return False
    step = record.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 63
