"""The text that is learnt: bytes, a held-out tail, and batches that depend on nothing but seed and step."""

from __future__ import annotations

import hashlib
import platform
import random
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from altx.errors import AltxError, BrokenPlugin, UnknownComponent, shown
from altx.registry import Component, Registry, default

NAME = re.compile(r"[a-z][a-z0-9-]*(:[a-z][a-z0-9-]*)?")
HELD_OUT = 10
"""One byte in this many is held out: the last ones."""


@dataclass(frozen=True)
class Text:
    """A text, split into a training part and a held-out tail.

    Args:
        name: where it comes from, for people.
        data: its bytes.
        path: the file that it was read from, or nothing.
        component: qualified name of the text, if a plugin offers it.
    """

    name: str
    data: bytes
    path: str | None = None
    component: str | None = None

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


def python_docs() -> bytes:
    """English prose that every Python has: its language reference, topic by topic in the order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def load(source: str | Path | None, plugins: Registry | None = None) -> Text:
    """A text that a plugin offers, a file's bytes, or Python's language reference.

    Args:
        source: a name or a file; a Path is a file whatever it looks like.
        plugins: where to look for names; default: everything installed.

    Raises:
        AltxError: if there is no such text, or it cannot be read or is empty.
    """
    if source is None:
        return Text(f"pydoc_data.topics of Python {platform.python_version()}", python_docs())
    if isinstance(source, str):
        registry = plugins or default()
        names = {name for c in _texts(registry) for name in (c.name, c.qualified)}
        if source in names and Path(source).exists():
            raise AltxError(
                f"{source!r} is a text that a plugin offers, and a file here",
                hint=f"write ./{source} for the file, {registry.get('text', source).qualified} for the other",
            )
        if source in names:
            return _offered(registry.get("text", source))
        if NAME.fullmatch(source) and not Path(source).exists():
            known = ", ".join(sorted(name for name in names if ":" not in name))
            raise UnknownComponent(
                f"there is no file {source!r}, and no plugin offers a text of that name",
                hint=f"installed: {known or 'none'}; altx list --kind text",
            )
    path = Path(source)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise AltxError(f"{path}: not a file of which the whole can be read again", hint="write the text to one")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AltxError(f"{path}: the text cannot be read: {error.strerror}") from None
    if not data:
        raise AltxError(f"{path}: the text is empty")
    return Text(str(path), data, path=str(path.resolve()))


def _texts(registry: Registry) -> list[Component]:
    """The texts that plugins offer; none where ALTX_PLUGINS leaves this package's own plugin out."""
    registry.load_all()
    return registry.components("text") if "text" in registry.kinds else []


def _offered(component: Component) -> Text:
    """The text of a plugin.

    Raises:
        BrokenPlugin: if it is none.
    """
    with component.guard(f"{component}: it cannot be built"):
        data = component.load("build")()
    if not isinstance(data, bytes) or not data:
        raise BrokenPlugin(
            f"{component}: its build returned {shown(data)}, not the bytes of a text", hint=component.remedy
        )
    return Text(component.qualified, data, component=component.qualified)


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
