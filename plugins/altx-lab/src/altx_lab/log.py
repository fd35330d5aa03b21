"""metrics.jsonl: one line per step and per evaluation, in order, and nothing that time could change.

Because lines only ever follow one another, going back to a checkpoint is cutting the file, and a run that
was killed and resumed ends with the same bytes as one that was not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from altx.errors import AltxError

try:
    import fcntl
except ImportError:  # Windows: nothing then keeps two processes from one run.
    fcntl = None  # type: ignore[assignment]


class Log:
    """An open log. One process at a time may have it.

    Raises:
        AltxError: if another process has it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise AltxError(f"{path.parent}: another process is training this run") from None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def append(self, record: dict[str, Any]) -> None:
        """Add a line."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Make sure that the lines so far survive a power cut."""
        os.fsync(self._file.fileno())

    def cut(self, step: int) -> None:
        """Forget what came after a step, a half-written line included."""
        keep = 0
        self._file.seek(0)
        for line in self._file:
            record = _parse(line)
            if record is None or record["step"] > step:
                break
            keep += len(line)
        self._file.truncate(keep)

    def evaluations(self) -> list[tuple[int, float]]:
        """(step, held-out bits per byte) of every evaluation."""
        self._file.seek(0)
        records = [record for line in self._file if (record := _parse(line)) and "held_out" in record]
        return [(record["step"], record["held_out"]) for record in records]


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's record, or None if it is not a whole one."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
