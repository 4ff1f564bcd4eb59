"""What a run measured, one JSON object a line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from fourscore.errors import FourscoreError


class JsonLines:
    """A file of JSON objects, one a line, that is only ever appended to: `metrics.jsonl`, `samples.jsonl`.

    Each line is written whole and handed to the operating system before `append` returns, so a killed process loses
    nothing and leaves at most its very last line torn. The first `append` takes a torn line off. Nothing is touched
    before that, so processes that never write may hold one too.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: TextIO | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one object as one line. Numbers that JSON cannot hold (NaN, infinities) become null."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self.path)
            self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        self._file.write(_dumps(record) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the lines whose `step` is later than `step`, as a run does that goes on from a checkpoint.

        The file is replaced in one move: after a crash it is the old one or the new one. No file is no lines.

        Raises:
            FourscoreError: A line is not a JSON object.
        """
        self.close()
        if self.path.exists():
            kept = [record for record in read_json_lines(self.path) if record.get("step", 0) <= step]
            _replace(self.path, "".join(_dumps(record) + "\n" for record in kept))

    def close(self) -> None:
        """Close the file; the next `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read a file that `JsonLines` wrote, or is writing: a last line without its end is left out.

    Raises:
        FourscoreError: The file is missing, or a line of it is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FourscoreError(f"{path}: no such file")
    records = []
    # Split at newlines alone: str.splitlines would also split inside strings, at U+2028 and the like.
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise FourscoreError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise FourscoreError(f"{path}, line {number}: not a JSON object")
        records.append(record)
    return records


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, so that a crash leaves the old file or the new one, never half of one.

    Numbers that JSON cannot hold (NaN, infinities) become null.
    """
    _replace(Path(path), _dumps(value, indent=2) + "\n")


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """`value` in types that strict JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a number of torch or numpy
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
