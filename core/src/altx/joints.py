"""Which memory may join which mixer, and how. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence

from altx.capabilities import Capabilities, MemoryCapabilities

IN_A_LAYER = ("residual", "gate", "controller", "kv", "context")
"""Attach modes of `altx.attach` that make one layer of a mixer and a memory."""

WITH_A_VALUE = ("residual", "gate", "controller", "ffn")
"""Attach modes of memories that read a value for each token, and so can be a sublayer by themselves."""


def misfit(
    mode: str,
    mixer: tuple[str, Capabilities],
    adapters: Sequence[str],
    memory: tuple[str, MemoryCapabilities],
) -> tuple[str, str] | None:
    """Why a memory cannot be attached to a mixer in this way, and what to do; None if it can.

    Args:
        mixer, memory: each by name, with what it can do.
        adapters: what stands around the mixer.
    """
    (whose, can), (what, holds) = mixer, memory
    if holds.scope == "stack" and mode != "tokens":
        return f"{what} is one for the whole stack of blocks, so it only attaches as tokens", ""
    if holds.feedback and mode != "controller":
        return f"{what} must hear what it read, so it only attaches as controller", ""
    if mode == "ffn":
        return f"a router's target has no feed-forward slot for {what}", "give the memory a body of its own"
    if mode == "tokens":
        return f"{what} stands around a whole stack of blocks, and this is a router's target", "name it for each block"
    if mode == "controller" and not can.steps:
        return (
            f"{whose} cannot be fed one token at a time, so it is no controller of {what}",
            "use attach residual or gate, or a mixer that streams by token (mamba, attention, ...)",
        )
    if mode == "controller" and not holds.steps:
        return f"{what} cannot be fed one token at a time, so it has no controller", "use attach residual or gate"
    if mode == "context" and (adapters or not can.cross or can.streaming != "token"):
        lacks = "does not attend across to tokens" if not can.cross else "cannot be cut where the memory's chunks end"
        return f"{whose} {lacks}, such as {what} reads", "use a mixer that declares cross and streams by token"
    if mode == "kv" and (adapters or not can.accepts_kv):
        return (
            f"{whose} takes no keys and values, such as {what} holds, into a softmax of its own",
            "use a mixer that declares accepts_kv, such as attention",
        )
    return None


def unsegmented(
    stack: Capabilities, causal: bool, memory: tuple[str, MemoryCapabilities], culprit: str
) -> tuple[str, str] | None:
    """Why a stack of blocks cannot run in segments with a memory's tokens around each, and what to do; None if it can.

    Args:
        stack: what all blocks together can do.
        causal: whether the model is.
        memory: by name, with what it can do.
        culprit: names of the parts that cannot stream token by token.
    """
    what, holds = memory
    longest = holds.chunk + holds.tokens
    if causal and stack.streaming != "token":
        return (
            f"{culprit} cannot be fed one token at a time, and the tokens of {what} come between its own",
            "use a mixer that streams by token (mamba, attention, ...)",
        )
    if not causal and not holds.bidirectional:
        return f"{what} looks only backwards", "use it in a causal model"
    if stack.graph == "required":
        return f"the tokens of {what} have no place in a graph, which a layer here needs", "use another memory"
    if stack.requires:
        return f"the tokens of {what} have no {', '.join(sorted(stack.requires))}, which a layer here needs", ""
    if stack.max_len is not None and longest > stack.max_len:
        return (
            f"segments of {holds.chunk} tokens with {holds.tokens} of {what} are longer than the {stack.max_len} "
            "that a layer here accepts",
            "use shorter segments",
        )
    return None
