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
        self.path = path
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
        """Forget what came after a step, a half-written line included.

        Raises:
            AltxError: if the log does not hold all that came before; it is left as it is.
        """
        keep = last = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            record = _parse(line)
            if record is None and last < step:
                raise AltxError(
                    f"{self.path}: line {number} is damaged, and the checkpoint of step {step} comes after it"
                )
            if record is None or record["step"] > step:
                break
            keep, last = keep + len(line), record["step"]
        if last < step:
            raise AltxError(f"{self.path}: ends with step {last}, and the checkpoint is of step {step}")
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
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and type(record.get("step")) is int and type(record.get("held_out", 0.0)) is float
    return record if whole else None
