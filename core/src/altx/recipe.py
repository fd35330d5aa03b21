"""Short forms of a model: patterns, repeats, defaults and overrides, all of which expand to `ModelConfig`.

    mixer: "3*mamba,attention"      # cycles over the blocks
    memory: ntm
    layers: 8

is the same model as its 8 blocks written out. Never imports torch.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from altx import plain
from altx.config import (
    MAX_BLOCKS,
    MAX_PARTS,
    Block,
    ComponentRef,
    Config,
    Head,
    Input,
    ModelConfig,
    TokensInput,
    validate,
)
from altx.errors import ConfigError, shown

ELEMENT = re.compile(r"(?:(\d{1,4})\s*\*\s*)?([a-z][a-z0-9-]*(?::[a-z][a-z0-9-]*)?)")
PATH = re.compile(r"[^.\[\]]+(\[[0-9]{1,6}\])*(\.[^.\[\]]+(\[[0-9]{1,6}\])*)*")
DEFAULT_EXPERTS = 8
DEFAULT_LAYERS = 2
MAX_FILE_BYTES = 4 << 20
NONE = "none"


class PatternEntry(ComponentRef):
    """An element of a pattern written as a mapping: a component, its settings, how often."""

    repeat: int = Field(1, ge=1, le=MAX_BLOCKS)


def _listed(value: Any) -> Any:
    """A single entry as a list of one."""
    return [value] if isinstance(value, Mapping) else value


Pattern = Annotated[str | list[str | PatternEntry], BeforeValidator(_listed)]


class Recipe(Config):
    """A model in short. Either `blocks`, or a `mixer` with what goes beside it."""

    altx: Literal[1] = Field(1, description="version of this schema")
    dim: int = Field(128, gt=0, le=1 << 20, description="model width D")
    causal: bool = Field(True, description="no output depends on a later token")
    input: Input = Field(TokensInput(), description="what goes in")
    head: Head | None = Field(None, description="what comes out; a language model for tokens")
    norm: Literal["rms", "layer", "none"] = Field("rms", description="norm of every sublayer of the pattern")
    final_norm: Literal["rms", "layer", "none"] = Field("rms", description="the norm before the head")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of every norm")
    blocks: list[Block] | None = Field(None, max_length=MAX_BLOCKS, description="the layers, in order")
    stack_memory: ComponentRef | None = Field(
        None, description="a memory whose tokens stand around each segment of all blocks together"
    )
    mixer: Pattern | None = Field(None, description='pattern of token mixers, e.g. "3*mamba,attention"')
    memory: Pattern | None = Field(None, description='pattern of memories; "none" leaves a block without')
    attach: str | None = Field(None, description="how the memories are attached")
    feed_forward: Pattern = Field(
        "swiglu", description='pattern of feed-forwards; with a router, "8*swiglu" are its experts'
    )
    router: Pattern | None = Field(
        None, description='pattern of routers over the feed-forwards, or over depths; "none" leaves a block dense'
    )
    depths: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="routers choose how often, up to this, blocks are applied; neighbours under the same router are "
        "one stack",
    )
    kv_sharing: bool = Field(False, description="all depths look up the keys and values of the first")
    layers: int | None = Field(
        None, ge=1, le=MAX_BLOCKS, description="number of blocks; a multiple of the mixer pattern's length"
    )
    defaults: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="settings by component name, wherever it is used: {mamba: {state_size: 8}}"
    )  # fmt: skip

    def expand(self) -> ModelConfig:
        """The canonical form.

        Raises:
            ConfigError: if a pattern cannot be read, or the parts contradict each other.
        """
        head = self.head.model_dump() if self.head else {"kind": "language-model"}
        if self.head is None and self.input.kind == "vectors":
            raise ConfigError(
                "head: missing", hint="with vectors as input, say what comes out, e.g. {kind: classifier, classes: 10}"
            )
        data = {
            "altx": self.altx, "dim": self.dim, "causal": self.causal, "input": self.input.model_dump(),
            "head": head, "final_norm": self.final_norm, "norm_eps": self.norm_eps, "blocks": self._blocks(),
            "stack_memory": self.stack_memory and self.stack_memory.model_dump(),
        }  # fmt: skip
        self._apply_defaults(data)
        return validate(ModelConfig, data)

    def _blocks(self) -> list[dict[str, Any]]:
        if self.blocks is None:
            blocks = self._blocks_from_patterns()
        else:
            clash = sorted(
                self.model_fields_set
                & {"mixer", "memory", "attach", "feed_forward", "router", "depths", "kv_sharing", "layers", "norm"}
            )
            if clash:
                raise ConfigError(
                    f"{clash[0]}: the model already lists its blocks", hint="change it there, or leave out `blocks`"
                )
            blocks = [block.model_dump(exclude_none=True) for block in self.blocks]
        return blocks

    def _apply_defaults(self, model: dict[str, Any]) -> None:
        used = {ref["name"].split(":")[-1] for ref in _references(_bodies(model))}
        for name, settings in self.defaults.items():
            if name not in used:
                raise ConfigError(f"defaults.{name}: no part of this model is called {name!r}", hint=_parts(model))
            for ref in _references(_bodies(model)):
                if ref["name"].split(":")[-1] == name:
                    ref.update({**settings, **ref})

    def _blocks_from_patterns(self) -> list[dict[str, Any]]:
        if self.mixer is None:
            raise ConfigError(
                "mixer: missing", hint="name a token mixer, e.g. --mixer mamba; `altx list` shows what is installed"
            )
        mixers = parse(self.mixer, "mixer")
        memories = parse(self.memory or NONE, "memory")
        routers = parse(self.router or NONE, "router")
        layers = self.layers or math.ceil(DEFAULT_LAYERS / len(mixers)) * len(mixers)
        if layers % len(mixers):
            lower = layers // len(mixers) * len(mixers)
            near = " or ".join(str(n) for n in (lower, lower + len(mixers)) if n)
            raise ConfigError(
                f"layers: {layers} is not a multiple of the mixer pattern's {len(mixers)} entries", hint=f"use {near}"
            )
        for name, pattern in (("memory", memories), ("router", routers)):
            if layers % len(pattern):
                raise ConfigError(
                    f"{name}: a pattern of {len(pattern)} entries does not fit {layers} layers",
                    hint=f'use {_fitting(layers, mixers, pattern)} layers; "none" in a pattern is a block without',
                )
        if self.attach and not any(memories):
            raise ConfigError("attach: there is no memory to attach", hint="name one with memory (--memory)")
        if self.depths and not any(routers):
            raise ConfigError(
                "depths: there is no router to choose among them",
                hint="name one with router (--router), e.g. mixture-of-recursions",
            )
        if self.kv_sharing and not self.depths:
            raise ConfigError("kv_sharing: there are no depths to share between", hint="give depths (--depths)")
        # Beside a router the feed-forward's pattern lists the experts of every block; else, and in depths, it cycles.
        feed_forwards = parse(self.feed_forward, "feed_forward")
        over_experts = any(routers) and not self.depths
        if not over_experts and layers % len(feed_forwards):
            raise ConfigError(
                f"feed_forward: a pattern of {len(feed_forwards)} entries does not fit {layers} layers",
                hint=f"use {_fitting(layers, mixers, feed_forwards)} layers",
            )
        experts = self._experts(feed_forwards) if over_experts else []
        if layers * len(experts) > MAX_PARTS:
            raise ConfigError(f"router: {layers} layers of {len(experts)} experts are more than {MAX_PARTS} parts")
        blocks = []
        for i in range(layers):
            mixer: dict[str, Any] = {"mixer": mixers[i % len(mixers)]}
            if memory := memories[i % len(memories)]:
                mixer["memory"] = memory
                if self.attach:
                    mixer["attach"] = self.attach
            sublayers = [mixer] if mixer["mixer"] else []
            router = routers[i % len(routers)]
            if router and over_experts:
                sublayers.append({"router": router, "targets": experts})
            elif feed_forward := feed_forwards[i % len(feed_forwards)]:
                sublayers.append({"feed_forward": feed_forward})
            blocks.append([{**copy.deepcopy(sublayer), "norm": self.norm} for sublayer in sublayers])
        if self.depths:
            blocks = self._stacks(blocks, [routers[i % len(routers)] for i in range(layers)])
        return [{"sublayers": sublayers} for sublayers in blocks]

    def _stacks(
        self, blocks: list[list[dict[str, Any]]], routers: list[dict[str, Any] | None]
    ) -> list[list[dict[str, Any]]]:
        """The sublayers of blocks, where those that stand beside each other under the same router are one stack."""
        found = []
        for router, group in itertools.groupby(zip(blocks, routers, strict=True), key=itemgetter(1)):
            members = [sublayers for sublayers, _ in group]
            if router is None:
                found += members
                continue
            stack = [sublayer for sublayers in members for sublayer in sublayers]
            targets = {"depths": self.depths, "kv_sharing": self.kv_sharing, "sublayers": stack}
            found.append([{"router": copy.deepcopy(router), "targets": [targets]}])
        return found

    def _experts(self, pattern: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
        experts = [ref for ref in pattern if ref]
        if not experts:
            raise ConfigError(
                "feed_forward: a router needs experts to choose among", hint='e.g. feed_forward: "8*swiglu"'
            )
        if len(experts) == 1:
            experts *= DEFAULT_EXPERTS
        targets: list[dict[str, Any]] = []
        for ref in experts:
            if targets and targets[-1]["feed_forward"] == ref:
                targets[-1]["repeat"] += 1
            else:
                targets.append({"feed_forward": ref, "repeat": 1})
        return targets


def parse(pattern: Pattern, path: str) -> list[dict[str, Any] | None]:
    """A pattern as one entry per place; None for "none".

    Raises:
        ConfigError: with the element that cannot be read.
    """
    elements: list[str | PatternEntry] = [*pattern.split(",")] if isinstance(pattern, str) else list(pattern)
    entries: list[dict[str, Any] | None] = []
    for element in elements:
        if isinstance(element, PatternEntry):
            entries += [element.model_dump(exclude={"repeat"})] * element.repeat
        else:
            match = ELEMENT.fullmatch(element.strip())
            if not match or (match[1] is not None and not 1 <= int(match[1]) <= MAX_BLOCKS):
                raise ConfigError(
                    f"{path}: cannot read {shown(element.strip())}",
                    hint='a pattern is names and counts, e.g. "3*mamba,attention"',
                )
            entries += [None if match[2] == NONE else {"name": match[2]}] * int(match[1] or 1)
        if len(entries) > MAX_BLOCKS:
            raise ConfigError(f"{path}: a pattern of more than {MAX_BLOCKS} entries")
    if not entries:
        raise ConfigError(f"{path}: the pattern is empty", hint='leave it out, or write "none"')
    return entries


def _fitting(layers: int, *patterns: list[Any]) -> int:
    """The next number of layers that all patterns divide."""
    each = math.lcm(*map(len, patterns))
    return math.ceil(layers / each) * each


def _references(node: Any) -> list[dict[str, Any]]:
    """Every component reference in plain blocks."""
    if isinstance(node, list):
        return [ref for item in node for ref in _references(item)]
    if not isinstance(node, dict):
        return []
    if "name" in node:
        return [node]
    return [ref for value in node.values() for ref in _references(value)]


def read(path: Path) -> dict[str, Any]:
    """A recipe file as plain data; see `altx.plain` for what it may hold.

    Raises:
        ConfigError: if it is missing, unreadable, too large, or not a YAML mapping.
    """
    try:
        with path.open("rb") as file:
            # Not by its size, which a device or a pipe does not tell.
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; this is not a model's config")
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        known = error.strerror if isinstance(error, OSError) else ""
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else known or error
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    data = plain.parse(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping such as {{mixer: mamba, dim: 128}}, found {type(data).__name__}")
    return data


def load(data: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> ModelConfig:
    """The canonical config of plain data.

    Args:
        data: as read from a file or collected from flags.
        settings: values by path, applied last: `{"dim": 64, "mamba.state_size": 8,
            "blocks[1].sublayers[0].mixer.state_size": 8}`. A path that starts with a component's name
            sets it wherever that component is used.

    Raises:
        ConfigError: naming the path of each wrong value.
    """
    raw: dict[str, Any] = copy.deepcopy(dict(data))
    late: dict[str, Any] = {}
    for path, value in (settings or {}).items():
        if not PATH.fullmatch(path):
            raise ConfigError(f"{path}: not a path, such as dim, mamba.state_size or blocks[1].sublayers[0].norm")
        head = re.split(r"[.\[]", path, maxsplit=1)[0]
        if head in Recipe.model_fields and head != "blocks":
            _assign(raw, path, value)
        elif head == "blocks" or "." in path:
            late[path] = value
        else:
            raise ConfigError(
                f"{path}: unknown key", hint=f"known: {', '.join(sorted(Recipe.model_fields))}, or COMPONENT.KEY"
            )
    model = validate(Recipe, raw).expand()
    if not late:
        return model
    expanded = dump(model)
    for path, value in late.items():
        name, _, key = path.partition(".")
        if re.match(r"blocks(\[|$)", name):
            _assign(expanded, path, value)
            continue
        used = [ref for ref in _references(_bodies(expanded)) if ref["name"].split(":")[-1] == name]
        if not used:
            raise ConfigError(f"{path}: no part of this model is called {name!r}", hint=_parts(expanded))
        for ref in used:
            _assign(ref, key, value)
    return validate(ModelConfig, expanded)


def _bodies(model: dict[str, Any]) -> list[Any]:
    """What of a model's plain data names components."""
    return [model["blocks"], model.get("stack_memory")]


def _parts(model: dict[str, Any]) -> str:
    return f"its parts: {', '.join(sorted({ref['name'].split(':')[-1] for ref in _references(_bodies(model))}))}"


def _assign(data: dict[str, Any], path: str, value: Any) -> None:
    """Set `a.b[2].c` in plain data; mappings on the way are made, lists are not."""
    steps: list[str | int] = [int(s[1:-1]) if s.startswith("[") else s for s in re.findall(r"\[\d+\]|[^.\[\]]+", path)]
    node: Any = data
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        try:
            if isinstance(node, list) and isinstance(step, int):
                node[step]
            elif not isinstance(node, dict) or isinstance(step, int):
                raise KeyError(step)
            if last:
                node[step] = value
            else:
                if isinstance(node, dict) and node.get(step) is None:
                    node[step] = {}
                elif isinstance(node[step], str):
                    node[step] = {"name": node[step]}
                node = node[step]
        except (KeyError, IndexError):
            raise ConfigError(f"{path}: there is no {step!r} here to set") from None


def dump(config: ModelConfig) -> dict[str, Any]:
    """A config as plain data, without what goes without saying: empty keys, and things that are there once."""
    implied = {"repeat": 1, "kv_sharing": False}

    def tidy(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: tidy(value) for key, value in node.items() if key not in implied or value != implied[key]}
        return [tidy(item) for item in node] if isinstance(node, list) else node

    data: dict[str, Any] = tidy(config.model_dump(exclude_none=True))
    return data
