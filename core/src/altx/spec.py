"""Light records with which a plugin describes its components. Data only: nothing here imports torch.

A record names its code by import strings ("package.module:attribute"), so that listing components
never imports the components themselves.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import MISSING, dataclass, field, fields
from types import ModuleType
from typing import Any, ClassVar

from altx.errors import shown

API_VERSION = 1
"""Version of the plugin contract. altx accepts this one and the one before it."""

NAME = re.compile(r"[a-z][a-z0-9-]*")
TARGET = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")
LENGTHS = {"name": 64, "summary": 200, "description": 10_000}
"""Of the longest text in a field; 1000 for the others."""

ATTACH_MODES = ("residual", "gate", "context", "kv", "tokens", "controller", "ffn")
"""Every way in which a memory can become part of a layer; see `altx.attach` for the anatomy."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What an attention layer hands to a memory for each token, as one vector: queries, keys and values, end to end.

    Args:
        query: heads H that ask.
        kv: heads G with keys and values; G divides H, head h belongs to group h // (H // G).
        key_dim: width of a query and of a key.
        value_dim: width of a value.
    """

    query: int
    kv: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Of the vector."""
        return self.query * self.key_dim + self.kv * (self.key_dim + self.value_dim)


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What a component's build function is told about its place in the model.

    Args:
        dim: model width D.
        layer: index of the block, counted from 0.
        num_layers: number of blocks.
        num_targets: for a router, how many targets it chooses among; else 0.
        exported: names that earlier layers export.
        heads: for a memory attached as "kv", what the attention hands to it; else None.
        common: what components of one model have in common, by key. The first that is built puts it there. A module
            is a submodule of that one alone, so that it is trained, counted and saved once; the others keep it where
            torch does not register it, such as in a tuple.
    """

    dim: int
    layer: int = 0
    num_layers: int = 1
    num_targets: int = 0
    exported: frozenset[str] = frozenset()
    heads: Heads | None = None
    common: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class ComponentSpec:
    """Fields shared by all kinds of component.

    Args:
        name: short name, `[a-z][a-z0-9-]*`.
        summary: one line for `altx list`.
        build: import string of `build(config, BuildContext) -> nn.Module`.
        config: import string of the `altx.config.Config` subclass.
        capabilities: import string of `capabilities(config) -> Capabilities`; must not import torch.
        description: a few lines for `altx show`: the formula, cost, state size, when to use it.
        paper: citation or address of the source.
        licence: licence of the implementation.
        install: the command that installs it, if it is not `pip install DISTRIBUTION`.
        api_version: version of the plugin contract it was written for.

    Attributes:
        kind: the kind that records of this class are of.
        roles: the import strings that such a record must have; a kind of another package may do with fewer.
    """

    kind: ClassVar[str]
    roles: ClassVar[tuple[str, ...]] = ("build", "config", "capabilities")

    name: str
    summary: str = ""
    build: str = ""
    config: str = ""
    capabilities: str = ""
    description: str = ""
    paper: str = ""
    licence: str = "Apache-2.0"
    install: str = ""
    api_version: int = API_VERSION

    def problem(self) -> str | None:
        """Why this record cannot be used, in words, or None if it is sound."""
        for each in fields(self):
            value, expected = getattr(self, each.name), str if each.name == "name" else type(each.default)
            if each.default is MISSING and each.name != "name":
                continue
            # Not a subclass: True is no version, and a kind of text may be anything.
            if type(value) is not expected:
                return f"{each.name} must be {expected.__name__}, not {shown(value)}"
            if isinstance(value, str) and (reason := _unfit(value, LENGTHS.get(each.name, 1000), each.name)):
                return reason
        if not NAME.fullmatch(self.name):
            return f"name {self.name!r} does not match {NAME.pattern}"
        if not self.summary.strip():
            return "summary is empty"
        for role in self.roles:
            if not TARGET.fullmatch(getattr(self, role)):
                return f"{role} must be an import string 'module:attribute', not {getattr(self, role)!r}"
        return None


def _unfit(text: str, limit: int, field: str) -> str | None:
    """Why a text cannot be shown."""
    if len(text) > limit:
        return f"{field} has {len(text)} characters, more than {limit}"
    if not all(c.isprintable() or (c == "\n" and field not in ("name", "summary")) for c in text):
        return f"{field} holds characters that cannot be printed: {shown(text)}"
    return None


@dataclass(frozen=True)
class MixerSpec(ComponentSpec):
    """A token mixer: a layer that moves information between positions."""

    kind: ClassVar[str] = "mixer"


@dataclass(frozen=True)
class FeedForwardSpec(ComponentSpec):
    """A layer for the feed-forward slot, which also serves as a router's expert.

    Args:
        grouped: optional import string of `build(config, BuildContext) -> altx.routed.TargetBank`, which
            holds `num_targets` experts with stacked weights and applies them in one grouped call.
    """

    kind: ClassVar[str] = "feed-forward"

    grouped: str = ""


@dataclass(frozen=True)
class MemorySpec(ComponentSpec):
    """A memory: something written to and read from, with its own state.

    Args:
        attach: the attach modes it supports.
        default_attach: the one used when the user names none.
        attach_note: what a user who took the default should know about the others.
    """

    kind: ClassVar[str] = "memory"

    attach: tuple[str, ...] = ()
    default_attach: str = ""
    attach_note: str = ""

    def problem(self) -> str | None:
        if reason := super().problem():
            return reason
        unknown = [mode for mode in self.attach if mode not in ATTACH_MODES]
        if unknown or not self.attach:
            return f"attach must name some of {', '.join(ATTACH_MODES)}, not {self.attach!r}"
        if self.default_attach not in self.attach:
            return f"default_attach {self.default_attach!r} is not one of its modes {self.attach!r}"
        return None


@dataclass(frozen=True)
class RouterSpec(ComponentSpec):
    """A router: decides which targets each token uses."""

    kind: ClassVar[str] = "router"


@dataclass(frozen=True)
class Kind:
    """A kind of component, altx's own or one that another package adds.

    Args:
        name: as in `altx list --kind NAME`; also the `kind` of its records.
        hook: the hook by which plugins offer components of this kind. It takes no arguments.
        spec: the record that describes one.
        hookspecs: the module or class that declares the hook, marked with `altx.hookspec`; altx's own need none.
    """

    name: str
    hook: str
    spec: type[ComponentSpec]
    hookspecs: ModuleType | type | None = None

    def problem(self) -> str | None:
        """Why another package cannot add this kind, in words, or None if it is sound."""
        if not (isinstance(self.name, str) and NAME.fullmatch(self.name)):
            return f"name {shown(self.name)} does not match {NAME.pattern}"
        sound = isinstance(self.spec, type) and issubclass(self.spec, ComponentSpec)
        if not sound or getattr(self.spec, "kind", None) != self.name:
            return f"spec must be a subclass of altx.spec.ComponentSpec whose kind is {self.name!r}, not {self.spec!r}"
        hook = getattr(self.hookspecs, self.hook, None) if isinstance(self.hook, str) else None
        if not hasattr(hook, "altx_spec"):
            return f"hookspecs declares no hook {shown(self.hook)} with @altx.hookspec"
        return None
