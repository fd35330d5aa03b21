"""Where the values of offsets and documents say that a call is a simpler one: a cache without resets, filled alike."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(q: Tensor, *places: Tensor | None) -> bool:
    """Whether looking at the values of integer arguments costs next to nothing: on a CPU, if nothing watches."""
    return (
        q.device.type == "cpu"
        and any(place is not None for place in places)
        and not torch.compiler.is_compiling()
        and all(place is None or type(place) is Tensor for place in places)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def narrowed(
    q: Tensor, k: Tensor, v: Tensor, offset: Tensor, slot_document: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same causal call without the slots behind the last query of every row; and without offset if it is theirs."""
    ends = (offset + q.shape[1]).tolist()
    slots = min(max(ends), k.shape[1])
    slot_document = None if slot_document is None else slot_document[:, :slots]
    # Masked tokens may stand behind the last slot.
    at_the_end = min(ends) == max(ends) == slots
    return k[:, :slots], v[:, :slots], None if at_the_end else offset, slot_document


def one_document(document: Tensor, slot_document: Tensor) -> bool:
    """Whether all queries and all slots are of one document."""
    if not document.numel() or not slot_document.numel():
        return False
    first = document[0, 0]
    return bool((document == first).all()) and bool((slot_document == first).all())
