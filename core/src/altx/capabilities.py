"""What a component with a given config can do: declared as data, checked when composing, proved by tests.

Nothing here imports torch. The functions at the end say what a composition of parts can do, so that the
check before a model is built and the model itself never disagree.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Literal, get_args, get_origin, get_type_hints

Growth = Literal["none", "constant", "window", "linear"]
GROWTHS: tuple[Growth, ...] = ("none", "constant", "window", "linear")
Rollback = Literal["crop", "snapshot", "none"]


_hints = functools.cache(get_type_hints)
"""Of a class's fields: slow to find, and the same for each of thousands of parts."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Promises of a layer. `altx check` tests them, as far as the shape of a promise allows: not `cross`, `max_len`
    and `includes`, which say what a composition may do with the layer.

    Args:
        causal: with `ctx.causal=True`, no output depends on a later token.
        bidirectional: accepts `ctx.causal=False`.
        streaming: "token": a sequence may be cut anywhere and continued from the state, one token at a
            time included; "chunk": only at multiples of `split_multiple`; "none": no state at all.
        split_multiple: with "chunk", where cuts are legal.
        partial: what may happen between two legal cuts: "any" length, "single" tokens, or "none".
        growth: how the state grows with the tokens seen: at most so, where a router keeps tokens from it.
        rollback: "crop": the last tokens can be dropped exactly; "snapshot": keep an earlier state
            instead (states are immutable, so keeping one costs nothing); "none": there is no state.
        masked: honours `ctx.mask`: masked tokens change no other output and no state.
        reset: honours `ctx.reset`: a token where it is true starts a fresh sequence.
        packing: honours `ctx.cu_seqlens` itself (otherwise composition unpacks the batch for it).
        cross: reads `ctx.cross`.
        graph: whether it reads `ctx.graph`.
        max_len: longest sequence it accepts, or None.
        len_multiple: a sequence's length must be a multiple of this.
        deterministic: same weights, inputs and state give the same output.
        requires: names in `ctx.shared` that an earlier layer must export.
        provides: names it exports.
        shares: names that the first layer of a model exports and the later ones read: in a model, each is one that
            the layer provides or one that it requires. A router's target provides none.
        includes: which of "norm" and "residual" it already contains, so that a block adds neither.
        accepts_kv: a memory may add keys and values to its softmax: the layer asks `ctx.recall`, and `hands` says what
            it hands over.
        shares_kv: applied again, it can look up the keys and values of the first time, as `ctx.shared_kv` says.
        losses: names of the auxiliary losses it returns, with the weight that training should give each.
        compiles: `torch.compile(fullgraph=True)` can take it.
    """

    causal: bool = True
    bidirectional: bool = False
    streaming: Literal["none", "chunk", "token"] = "token"
    split_multiple: int = 1
    partial: Literal["any", "single", "none"] = "any"
    growth: Growth = "none"
    rollback: Rollback = "none"
    masked: bool = True
    reset: bool = True
    packing: bool = False
    cross: bool = False
    graph: Literal["ignored", "optional", "required"] = "ignored"
    max_len: int | None = None
    len_multiple: int = 1
    deterministic: bool = True
    requires: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    shares: frozenset[str] = frozenset()
    includes: frozenset[str] = frozenset()
    accepts_kv: bool = False
    shares_kv: bool = False
    losses: Mapping[str, float] = field(default_factory=dict)
    compiles: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for a word that means nothing: a misspelt promise would go unchecked."""
        for name, kind in _hints(type(self)).items():  # type: ignore[arg-type]  # mypy: not of its objects
            value, words = getattr(self, name), get_args(kind)
            if get_origin(kind) is Literal and value not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, not {value!r}")
            if kind is bool and not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, not {value!r}")
        for name in ("split_multiple", "len_multiple", "max_len"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value > 0) and not (name == "max_len" and value is None):
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        for name in ("requires", "provides", "shares", "includes"):
            value = getattr(self, name)
            if not isinstance(value, frozenset) or not all(isinstance(each, str) for each in value):
                raise ValueError(f"{name} must be a frozenset of names, not {value!r}")
        if not isinstance(self.losses, Mapping) or not all(
            isinstance(name, str) and isinstance(weight, (int, float)) for name, weight in self.losses.items()
        ):
            raise ValueError(f"losses must be weights by name, not {self.losses!r}")
        if not self.includes <= {"norm", "residual"}:
            raise ValueError(f"includes may hold norm and residual, not {sorted(self.includes)}")

    @property
    def steps(self) -> bool:
        """Whether it can be fed one token at a time."""
        return self.streaming == "token" or (self.streaming == "chunk" and self.partial != "none")


@dataclass(frozen=True, kw_only=True)
class MemoryCapabilities(Capabilities):
    """Promises of a memory.

    Args:
        chunk: tokens that are read together and written together; 1 means token by token. A chunk that is
            written first must be 1, or a token would see later ones.
        feedback: what is read must reach the controller before the next write, so it can only be
            attached as "controller".
        order: what comes first for the tokens of a chunk.
        scope: who shares one state: a "layer", the whole "stack" of blocks, or all layers that name this memory
            ("shared").
        tokens: how many tokens it puts around each segment of `chunk` tokens, where it attaches as "tokens".
    """

    chunk: int = 1
    feedback: bool = False
    order: Literal["read-write", "write-read"] = "read-write"
    scope: Literal["layer", "stack", "shared"] = "layer"
    tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.chunk, int) and self.chunk > 0):
            raise ValueError(f"chunk must be a positive integer, not {self.chunk!r}")
        if self.order == "write-read" and self.chunk > 1:
            raise ValueError("a memory that is written first must have chunk 1, or tokens would see later ones")


@dataclass(frozen=True, kw_only=True)
class RouterCapabilities(Capabilities):
    """Promises of a router.

    Args:
        lookahead: how far a token's decision looks: its own "token", the "past", the whole "sequence",
            or the whole "batch".
        decode: what a router that looks ahead does in a causal model: the "same" (it needs no
            lookahead), use the "argmax" or a trained "predictor", or "forbid".
        mixes: gives its targets mixtures of tokens, which have no order: its routes have `slots`.
        chunk: tokens of a sequence that are routed before what they hold may change a later choice.
        stepwise: chooses among depths only (see `altx.recursion`), and is asked at each, about the tokens that are
            left: use `Targets.depth` or leave. It keeps no state.
    """

    lookahead: Literal["token", "past", "sequence", "batch"] = "token"
    decode: Literal["same", "argmax", "predictor", "forbid"] = "same"
    mixes: bool = False
    chunk: int = 1
    stepwise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.chunk, int) and self.chunk > 0):
            raise ValueError(f"chunk must be a positive integer, not {self.chunk!r}")
        if self.stepwise and (self.mixes or self.growth != "none"):
            raise ValueError("a stepwise router mixes no tokens and keeps no state: growth must be 'none'")


def meet(parts: Iterable[Capabilities]) -> Capabilities:
    """What a chain of layers can do: only what each of them can, and it needs what any of them needs.

    `losses` stay with the components that return them.
    """
    parts = list(parts)
    if not parts:
        return Capabilities(bidirectional=True, packing=True)
    streams = [part.streaming for part in parts]
    states = [part.rollback for part in parts if part.growth != "none"]
    lengths = [part.max_len for part in parts if part.max_len is not None]
    partials = [part.partial for part in parts if part.streaming == "chunk"]
    graphs = [part.graph for part in parts]
    provides: frozenset[str] = frozenset().union(*(part.provides for part in parts))
    return Capabilities(
        causal=all(part.causal for part in parts),
        bidirectional=all(part.bidirectional for part in parts),
        streaming="none" if "none" in streams else "chunk" if "chunk" in streams else "token",
        split_multiple=lcm(*(part.split_multiple for part in parts)),
        partial=next((p for p in ("none", "single") if p in partials), "any"),
        growth=max((part.growth for part in parts), key=GROWTHS.index),
        rollback="none" if not states else "crop" if set(states) == {"crop"} else "snapshot",
        masked=all(part.masked for part in parts),
        reset=all(part.reset for part in parts),
        packing=all(part.packing for part in parts),
        cross=any(part.cross for part in parts),
        graph=next((g for g in ("required", "optional") if g in graphs), "ignored"),
        max_len=min(lengths, default=None),
        len_multiple=lcm(*(part.len_multiple for part in parts)),
        deterministic=all(part.deterministic for part in parts),
        requires=frozenset().union(*(part.requires for part in parts)) - provides,
        provides=provides,
        shares=frozenset().union(*(part.shares for part in parts)),
        # What streams and carries nothing looks at no other token, so it has nothing to share.
        shares_kv=all(part.shares_kv or (part.streaming == "token" and part.growth == "none") for part in parts),
        compiles=all(part.compiles for part in parts),
    )


def placed(part: Capabilities, exported: Iterable[str], *, target: bool = False) -> Capabilities:
    """A layer at its place in a model: what it shares is exported by an earlier layer, or else by it.

    Args:
        exported: what earlier layers export.
        target: whether a router chooses it. It does not get every token then, and exports nothing of what it shares.
    """
    if not part.shares:
        return part
    read = part.shares & frozenset(exported)
    own: frozenset[str] = frozenset() if target else part.shares - read
    return replace(part, shares=frozenset(), requires=part.requires | read, provides=part.provides | own)


def routed(router: Capabilities, targets: Iterable[Capabilities]) -> Capabilities:
    """A router over targets."""
    targets = list(targets)
    parts = meet([router, *targets])
    stateful = any(target.growth != "none" for target in targets)
    # A target's state counts only the tokens routed to it, so dropping the last n tokens is not exact; and they differ
    # from one application to the next.
    return replace(parts, rollback="snapshot", shares_kv=False) if stateful else parts


def recursed(router: Capabilities, body: Capabilities) -> Capabilities:
    """A stack of layers that a router has applied to each token as often as it says; see `altx.recursion`."""
    return replace(routed(router, [body]), packing=False, includes=frozenset({"norm"}))


def adapted(inner: Capabilities, adapter: str) -> Capabilities:
    """A layer inside one of the adapters of `altx.adapters`."""
    inner = replace(inner, losses={}, shares_kv=False)
    if adapter == "pad":
        if inner.masked:
            return replace(inner, len_multiple=1)
        # Its state would count the padding.
        return replace(inner, len_multiple=1, streaming="none", growth="none", rollback="none")
    if adapter == "replay":
        return replace(
            inner, bidirectional=False, streaming="token", split_multiple=1, partial="any",
            growth="linear", rollback="crop", masked=True, len_multiple=1,
        )  # fmt: skip
    if adapter == "bidirectional":
        return replace(
            inner, causal=False, bidirectional=True, streaming="none",
            growth="none", rollback="none", packing=False, reset=False,
        )  # fmt: skip
    if adapter == "unpack":
        return replace(inner, packing=True)
    raise ValueError(f"unknown adapter {adapter!r}")


def segmented(inner: Capabilities, memory: MemoryCapabilities) -> Capabilities:
    """A stack of layers run in segments, with a memory's tokens around each; see `altx.segment_loop`."""
    return replace(
        meet([inner, memory]),
        streaming=inner.streaming,
        growth="constant" if inner.growth in ("none", "constant") else "window",
        rollback="snapshot" if inner.streaming != "none" else "none",
        packing=False,
        graph="ignored",
        max_len=None,
        compiles=False,
    )


def split_plan(offset: int, n: int, capabilities: Capabilities) -> list[int]:
    """Cut n tokens, the first at absolute position `offset`, into lengths that a layer accepts.

    Returns:
        Lengths that add up to n, e.g. `split_plan(0, 6, m)` is `[4, 1, 1]` for split_multiple 4 with
        single tokens between.

    Raises:
        ValueError: if there is no legal way.
    """
    if capabilities.streaming == "none":
        raise ValueError("a layer that does not stream cannot be split; wrap it in PrefixReplay")
    multiple = capabilities.split_multiple
    if multiple == 1 or capabilities.partial == "any":
        return [n] if n else []
    plan = []
    while n:
        if offset % multiple == 0 and n >= multiple:
            step = n - n % multiple
        elif capabilities.partial == "single":
            step = 1
        else:
            raise ValueError(f"{n} tokens at position {offset} cannot be cut at multiples of {multiple}")
        plan.append(step)
        offset, n = offset + step, n - step
    return plan
