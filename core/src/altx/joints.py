"""Which memory may join which mixer, and how. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence

from altx.capabilities import Capabilities, MemoryCapabilities

IN_A_LAYER = ("residual", "gate", "controller", "kv")
"""Attach modes of `altx.attach` that make one layer of a mixer and a memory."""

IMPLEMENTED = (*IN_A_LAYER, "ffn")
"""Attach modes that this altx has."""

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
    if holds.feedback and mode != "controller":
        return f"{what} must hear what it read, so it only attaches as controller", ""
    if mode == "ffn":
        return f"a router's target has no feed-forward slot for {what}", "make the memory a target by itself"
    if mode == "controller" and not can.steps:
        return (
            f"{whose} cannot be fed one token at a time, so it is no controller of {what}",
            "use attach residual or gate, or a mixer that streams by token (mamba, attention, ...)",
        )
    if mode == "controller" and not holds.steps:
        return f"{what} cannot be fed one token at a time, so it has no controller", "use attach residual or gate"
    if mode == "kv" and (adapters or not can.accepts_kv):
        return (
            f"{whose} takes no keys and values, such as {what} holds, into a softmax of its own",
            "use a mixer that declares accepts_kv, such as attention",
        )
    return None
