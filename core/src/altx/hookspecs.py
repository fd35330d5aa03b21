"""The hooks that a plugin may implement: one for each kind of component."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from altx.spec import FeedForwardSpec, Kind, MemorySpec, MixerSpec, RouterSpec

hookspec = pluggy.HookspecMarker("altx")
hookimpl = pluggy.HookimplMarker("altx")


@hookspec
def altx_token_mixers() -> Iterable[MixerSpec]:
    """Offer token mixers: layers that move information between positions.

    When: once per process, the first time this plugin's names are needed. The module that implements
    the hook must not import torch or the mixers themselves; a spec names them by import strings.

    Returns:
        One MixerSpec per mixer, for example
        `MixerSpec("mamba", summary="Selective SSM", build="altx_mamba.mixer:build",
        config="altx_mamba.config:MambaConfig", capabilities="altx_mamba.config:capabilities")`.
    """
    raise NotImplementedError


@hookspec
def altx_feed_forwards() -> Iterable[FeedForwardSpec]:
    """Offer layers for the feed-forward slot; routers use the same layers as experts.

    When: as for `altx_token_mixers`.

    Returns:
        One FeedForwardSpec per layer.
    """
    raise NotImplementedError


@hookspec
def altx_memories() -> Iterable[MemorySpec]:
    """Offer memories: written to and read from, with their own state.

    When: as for `altx_token_mixers`.

    Returns:
        One MemorySpec per memory, with the attach modes it supports.
    """
    raise NotImplementedError


@hookspec
def altx_routers() -> Iterable[RouterSpec]:
    """Offer routers: they decide which targets (experts, mixers, memories, ...) each token uses.

    When: as for `altx_token_mixers`.

    Returns:
        One RouterSpec per router.
    """
    raise NotImplementedError


@hookspec
def altx_kinds() -> Iterable[Kind]:
    """Offer kinds of component beside altx's own, each with a hook that other plugins implement.

    When: as for `altx_token_mixers`; it does not matter whether plugins that implement the new hooks come before.

    Returns:
        One altx.spec.Kind per kind.
    """
    raise NotImplementedError
