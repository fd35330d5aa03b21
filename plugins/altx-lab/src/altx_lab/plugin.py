"""What altx-lab offers: a kind of component, and the text that every Python has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx import Kind, hookimpl
from altx_lab import hookspecs

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_kinds() -> Iterable[Kind]:
    return [Kind("text", "altx_texts", hookspecs.TextSpec, hookspecs)]


@hookimpl
def altx_texts() -> Iterable[hookspecs.TextSpec]:
    return [
        hookspecs.TextSpec(
            "python-docs",
            summary="Python's language reference, about 466 KB of English; what is trained on by default",
            description="pydoc_data.topics, topic by topic in the order of their names. It differs between Pythons.",
            build="altx_lab.text:python_docs",
            licence="PSF-2.0",
        )
    ]
