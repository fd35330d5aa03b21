"""The kind of component that this package adds: texts to train on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from altx import ComponentSpec, hookspec


@dataclass(frozen=True)
class TextSpec(ComponentSpec):
    """A text: prose, or a task written as text. The last tenth is held out.

    `build` names a function `build() -> bytes`, which returns the same bytes whenever it is called: a run is resumed
    only with the text that it was started with. No config and no capabilities.
    """

    kind: ClassVar[str] = "text"
    roles: ClassVar[tuple[str, ...]] = ("build",)


@hookspec
def altx_texts() -> Iterable[TextSpec]:
    """Offer texts for `altx train --text NAME`.

    When: as for altx's own hooks.

    Returns:
        One TextSpec per text.
    """
    raise NotImplementedError
