"""The text that is learnt: bytes, a held-out tail, and batches that depend on nothing but seed and step."""

from __future__ import annotations

import hashlib
import platform
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from altx.errors import AltxError

HELD_OUT = 10
"""One byte in this many is held out: the last ones."""


@dataclass(frozen=True)
class Text:
    """A text, split into a training part and a held-out tail.

    Args:
        name: where it comes from, for people.
        data: its bytes.
    """

    name: str
    data: bytes

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole text, by which a resumed run knows it again."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def split(self) -> int:
        """Index of the first held-out byte."""
        return len(self.data) - len(self.data) // HELD_OUT

    @property
    def held_out(self) -> bytes:
        """The last tenth, never trained on."""
        return self.data[self.split :]

    @cached_property
    def training(self) -> Tensor:
        """(N,) uint8, everything before the held-out part."""
        return torch.frombuffer(bytearray(self.data[: self.split]), dtype=torch.uint8)

    def require(self, length: int) -> None:
        """Raise AltxError unless there is room for one window of `length` predictions and a held-out part."""
        needed = max(length + 1, 2 * HELD_OUT)
        while needed - needed // HELD_OUT < length + 1:
            needed += 1
        if len(self.data) < needed:
            raise AltxError(
                f"{self.name}: {len(self.data):,} bytes are too few for windows of {length:,} and a held-out tenth",
                hint=f"give a text of at least {needed:,} bytes, or a smaller --length",
            )


def standard() -> Text:
    """English prose that every Python has: its language reference, topic by topic in the order of their names."""
    from pydoc_data.topics import topics

    joined = "\n\n".join(topics[name] for name in sorted(topics))
    return Text(f"pydoc_data.topics of Python {platform.python_version()}", joined.encode())


def load(path: Path | None) -> Text:
    """A file's bytes, or the standard text.

    Raises:
        AltxError: if the file cannot be read or is empty.
    """
    if path is None:
        return standard()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AltxError(f"{path}: the text cannot be read: {error.strerror}") from None
    if not data:
        raise AltxError(f"{path}: the text is empty")
    return Text(str(path), data)


def stream_of(seed: int, step: int) -> random.Random:
    """The random numbers of one step, reproducible on every machine and Python."""
    return random.Random(f"{seed} {step}")


def batch(text: Text, *, size: int, length: int, seed: int, step: int) -> Tensor:
    """(size, length + 1) int64: windows of the training part at random places."""
    source = stream_of(seed, step)
    places = len(text.training) - length
    # Only random() is promised to stay the same from one Python to the next.
    starts = torch.tensor([int(source.random() * places) for _ in range(size)])
    return text.training[starts[:, None] + torch.arange(length + 1)].long()
