"""Blocks on disk: one file each, named by what is in it and before it, written whole or not at all, and never changed.

knn.json        says that this is a store, and of which format
lock            held by every process that uses the store; alone by one that prunes it
blocks/XX/...   safetensors: keys (n, G, Dk), values (n, G, Dv), and perhaps a graph per head
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from altx.errors import AltxError
from altx.state import State

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
NAME = re.compile("[0-9a-f]{40}")
ROOT = "0" * 40
"""Name of what is before the first block."""


class StoreError(AltxError):
    """A store on disk is missing, damaged, in use, or cannot be written."""


class Store:
    """A directory of blocks. Several processes may use it at once, because no file in it ever changes.

    `open_store` makes them, one for a directory in a process.

    Args:
        path: the directory; it is made, if what it stands in exists.

    Raises:
        StoreError: if it is something else, is locked, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        marker = path / "knn.json"
        try:
            path.mkdir(exist_ok=True)
            if not marker.exists():
                if any(not each.name.startswith(".") and each.name != "lock" for each in path.iterdir()):
                    raise StoreError(
                        f"altx-knn: {path} is no store: it has files, and no knn.json",
                        hint="name an empty directory, or one that does not exist",
                    )
                _write(marker, json.dumps({"format": FORMAT}).encode())
            known = json.loads(marker.read_bytes())["format"]
            if known != FORMAT:
                raise StoreError(f"altx-knn: the store {path} has format {known}, and this version reads {FORMAT}")
            self.lock = _lock(path / "lock")
        except OSError as error:
            raise StoreError(
                f"altx-knn: the store {path} cannot be opened: {error.strerror}",
                hint="its parent must exist, and be writable; knn's `path` names another",
            ) from None
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"altx-knn: {marker} is damaged", hint="name another directory as knn's `path`") from None
        weakref.finalize(self, self.lock.close)
        _take(self.lock, path, alone=False)

    def __reduce__(self) -> tuple[object, ...]:
        """A copy of a model uses the same store."""
        return open_store, (str(self.path),)

    def file(self, name: str) -> Path:
        return self.path / "blocks" / name[-2:] / f"{name}.safetensors"

    def put(self, name: str, before: str, keys: Tensor, values: Tensor, graphs: Sequence[Tensor]) -> None:
        """Write a block, unless it is there."""
        file = self.file(name)
        if file.exists():
            return
        tensors = {"keys": keys, "values": values, **{f"graph.{n}": graph for n, graph in enumerate(graphs)}}
        about = {"before": before, **_sums(tensors)}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, save(tensors, about))
        except OSError as error:
            raise StoreError(
                f"altx-knn: the store {self.path} cannot be written: {error.strerror}",
                hint="make room, or make it writable; the state from before this call is as it was",
            ) from None

    def get(self, name: str) -> tuple[str, Tensor, Tensor, list[Tensor]]:
        """The name of the block before, keys, values and graphs, which the file lends: they are read when used."""
        file = self.file(name)
        if not file.is_file():
            raise StoreError(
                f"altx-knn: the store {self.path} has no block {name}, which a state goes on from",
                hint="use the store that the state was made with, and prune it with that state among those to keep",
            )
        try:
            with safe_open(str(file), framework="pt") as held:
                about = held.metadata() or {}
                tensors = {each: held.get_tensor(each) for each in held.keys()}  # noqa: SIM118  (not a mapping)
        except (SafetensorError, OSError) as error:
            raise self.damaged(name, str(error)) from None
        # A graph that is not as it was written may lead usearch anywhere.
        wanted = {"keys", "values", *(f"graph.{n}" for n in range(len(tensors) - 2))}
        if tensors.keys() != wanted or {**about, "before": ""} != {"before": "", **_sums(tensors)}:
            raise self.damaged(name, "it is not what was written")
        before = self._before(name, about)
        keys, values = tensors.pop("keys"), tensors.pop("values")
        graphs = [tensors[f"graph.{n}"] for n in range(len(tensors))]
        return before, keys, values, graphs

    def damaged(self, name: str, why: str) -> StoreError:
        """A file that is not what was written."""
        return StoreError(
            f"altx-knn: {self.file(name)} is damaged: {why}", hint="restore it from a copy, or begin with a new state"
        )

    def before(self, name: str) -> str:
        """The name of the block before."""
        try:
            with safe_open(str(self.file(name)), framework="pt") as held:
                return self._before(name, held.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise self.damaged(name, str(error)) from None

    def _before(self, name: str, about: Mapping[str, str]) -> str:
        before = about.get("before", "")
        # Its number is one less, so that no chain goes in a circle.
        if not NAME.fullmatch(before) or int(before[:8], 16) + 1 != int(name[:8], 16):
            raise self.damaged(name, "it names no block before it")
        return before


OPEN: weakref.WeakValueDictionary[str, Store] = weakref.WeakValueDictionary()


def open_store(path: str) -> Store:
    """The store in a directory; the same one for all that use it in this process."""
    real = str(Path(path).expanduser().resolve())
    store = OPEN.get(real)
    if store is None:
        store = OPEN[real] = Store(Path(real))
    return store


def prune(path: str, *states: State, last: int | None = None) -> int:
    """Remove every block that none of these states goes on from.

    Args:
        path: the store.
        states: of whole models, or of memories.
        last: blocks to keep of each row, where `size` limits how far a row goes back; None for all.

    Returns:
        How many were removed.

    Raises:
        StoreError: if another process uses the store.
    """
    store = open_store(path)
    try:
        _take(store.lock, store.path, alone=True)
        keep: set[str] = set()
        for row in {row for state in states for row in _heads(state)}:
            name, left = row, last
            while name != ROOT and left != 0 and (last is not None or name not in keep):
                keep.add(name)
                name, left = store.before(name), None if left is None else left - 1
        files = [*(store.path / "blocks").glob("??/*.safetensors")]
        gone = [file for file in files if file.stem not in keep]
        for file in gone:
            file.unlink()
        return len(gone)
    except OSError as error:
        raise StoreError(f"altx-knn: the store {store.path} cannot be pruned: {error.strerror}") from None
    finally:
        _take(store.lock, store.path, alone=False)


def _heads(state: State) -> Iterator[str]:
    """Names of the blocks that the rows of a state go on from."""
    for _, each in state.walk():
        for name, leaf in each.spec.items():
            if leaf.kind == "external":
                yield from (named(row) for row in each[name].tolist())


def named(last: Sequence[float]) -> str:
    """The name of a block whose number and sums are these (3,); ROOT for zeros."""
    number, *sums = last
    return struct.pack(">Idd", int(number), *(value + 0.0 for value in sums)).hex()


def _sums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Checksums by name."""

    def one(tensor: Tensor) -> str:
        found = blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    return {name: one(tensor) for name, tensor in tensors.items()}


def _write(file: Path, content: bytes) -> None:
    """A file that appears whole or not at all."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as partial:
            partial.write(content)
            partial.flush()
            os.fsync(partial.fileno())
        Path(name).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _lock(file: Path) -> BinaryIO:
    """The file to lock, which a store that can only be read has already."""
    try:
        return file.open("ab")
    except OSError:
        return file.open("rb")


def _take(lock: BinaryIO, path: Path, *, alone: bool) -> None:
    """Lock a store with others, or alone."""
    if fcntl is None:
        raise StoreError("altx-knn: a store on disk needs file locks as of POSIX", hint="leave out knn's `path`")
    try:
        fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        doing = "uses" if alone else "prunes"
        raise StoreError(
            f"altx-knn: the store {path} is locked: another process {doing} it",
            hint="wait until it is done, or name another directory as knn's `path`",
        ) from None
