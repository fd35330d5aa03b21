"""A run's directory: what was asked for, what happened, and the checkpoints to go on from.

run.json       settings, versions, text and split
metrics.jsonl  see `altx_lab.log`
checkpoints/   step-00000400/: `altx.checkpoint` with the trainer's state beside the weights; the last two
result.json    the final numbers
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from altx import checkpoint
from altx.errors import AltxError, CheckpointError
from altx.model import Model
from altx.registry import Registry
from altx_lab.log import Log
from altx_lab.trainer import MOMENTS, SCALARS

SCHEMA = 1
RECORD, METRICS, RESULT, CHECKPOINTS = "run.json", "metrics.jsonl", "result.json", "checkpoints"
STEP = re.compile(r"step-(\d{8,})")
KEEP = 2


class Run:
    """A run that this process may write to. Use `create` or `open`.

    Args:
        path: its directory.
        record: what run.json says.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record
        self.log = Log(path / METRICS)
        self._remove_partial()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.log.__exit__(kind, error, tb)

    @classmethod
    def create(cls, path: Path, record: dict[str, Any], *, force: bool = False) -> Run:
        """Make a run's directory.

        Args:
            force: replace a run that is there already; anything else is never touched.

        Raises:
            AltxError: if something is there already, or it cannot be written.
        """
        if force and (path / RECORD).exists():
            erase(path)
        elif path.is_dir() and (path / RECORD).exists():
            raise AltxError(f"{path}: this run exists already",
                            hint=f"continue it: {resume_command(path)}\nor replace it: --force")  # fmt: skip
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise AltxError(f"{path}: exists already and is not a run", hint="choose another place: --out DIRECTORY")
        try:
            path.mkdir(parents=True, exist_ok=True)
            _write(path / RECORD, {"altx_run": SCHEMA, **record})
        except OSError as error:
            raise AltxError(f"{path}: cannot be written: {error.strerror}") from None
        return cls(path, record)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open a run to go on with it.

        Raises:
            AltxError: if it is no run, or another process is training it.
        """
        return cls(path, read_record(path))

    def update(self, record: dict[str, Any]) -> None:
        """Replace run.json."""
        self.record = record
        _write(self.path / RECORD, {"altx_run": SCHEMA, **record})

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first."""
        folder = self.path / CHECKPOINTS
        found = [p for p in folder.iterdir() if STEP.fullmatch(p.name)] if folder.is_dir() else []
        return sorted(found, key=step_of)

    def save(self, model: Model, step: int, files: dict[str, bytes]) -> None:
        """Write a checkpoint, and only then remove those before the last two."""
        self.log.sync()
        checkpoint.save(model, self.path / CHECKPOINTS / f"step-{step:08d}", extra=files)
        for old in self.checkpoints()[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self, plugins: Registry | None = None) -> tuple[Path, Model, dict[str, bytes]]:
        """The newest checkpoint: its directory, model and trainer files.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        paths = self.checkpoints()
        if not paths:
            raise CheckpointError(f"{self.path}: the run has no checkpoint yet", hint="start it again with --force")
        path = paths[-1]
        try:
            model = checkpoint.load(path, plugins=plugins)
            files = {name: (path / name).read_bytes() for name in (MOMENTS, SCALARS)}
        except OSError as error:
            raise damaged(path, CheckpointError(f"{error.filename}: {error.strerror}")) from None
        except CheckpointError as error:
            raise damaged(path, error) from None
        return path, model, files

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json."""
        _write(self.path / RESULT, result)

    def _remove_partial(self) -> None:
        """Remove what a killed process left half-written."""
        for partial in (self.path / CHECKPOINTS).glob(".step-*.partial-*"):
            shutil.rmtree(partial, ignore_errors=True)


def read_record(path: Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        AltxError: if the directory is not a run.
    """
    try:
        record = json.loads((path / RECORD).read_text("utf-8"))
    except OSError as error:
        raise AltxError(f"{path}: not a run: {RECORD}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise AltxError(f"{path}: not a run: {RECORD} is not JSON") from None
    if not isinstance(record, dict) or record.pop("altx_run", None) != SCHEMA:
        raise AltxError(f"{path}: not a run: {RECORD} was not written by this version of altx train")
    return record


def erase(path: Path) -> None:
    """Remove a run, and in its directory nothing else.

    Raises:
        AltxError: if it is no run, or another process is training it.
    """
    read_record(path)
    with Log(path / METRICS):
        for folder in (path / CHECKPOINTS).glob("*step-*"):
            if STEP.match(folder.name.lstrip(".")):
                shutil.rmtree(folder, ignore_errors=True)
        for name in (METRICS, RESULT, RECORD):
            (path / name).unlink(missing_ok=True)
    if (path / CHECKPOINTS).is_dir() and not any((path / CHECKPOINTS).iterdir()):
        (path / CHECKPOINTS).rmdir()


def step_of(path: Path) -> int:
    """The step of a checkpoint's directory."""
    match = STEP.fullmatch(path.name)
    assert match
    return int(match[1])


def damaged(path: Path, error: AltxError) -> CheckpointError:
    """The error of a checkpoint that cannot be read, with the way back to the one before."""
    if "pip install" in error.hint:
        return CheckpointError(error.what, hint=error.hint)
    return CheckpointError(
        f"{path}: {error.what}",
        hint=f"to go on from the checkpoint before it, remove it: rm -r {shlex.quote(str(path))}",
    )


def resume_command(path: Path) -> str:
    """The command that goes on with a run."""
    return f"altx train --resume {shlex.quote(str(path))}"


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
