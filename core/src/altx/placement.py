"""Where a model's memories stand: with a mixer, in the feed-forward's slot, or around all blocks.

Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable

from altx.config import Block, ComponentRef, ModelConfig, Sublayer
from altx.errors import CompositionError
from altx.registry import Component, Registry
from altx.spec import MemorySpec

Place = tuple[Sublayer, str]
"""A sublayer, and the path in the config that it comes from."""


def attach_mode(memory: Component, wanted: str | None, path: str, note: Callable[[str], None]) -> str:
    """How a memory is attached.

    Args:
        wanted: as the config has it; None for the memory's default.
        path: of that in the config.
        note: is told what a user who named none should know.

    Raises:
        CompositionError: if it does not attach so.
    """
    spec = memory.spec
    assert isinstance(spec, MemorySpec)
    if wanted is None:
        wanted = spec.default_attach
        if spec.attach_note:
            note(f"{memory.name} is attached as {wanted}. {spec.attach_note}")
    if wanted not in spec.attach:
        raise CompositionError(
            f"{path}: {memory} does not attach as {wanted!r}", hint=f"it attaches as {', '.join(spec.attach)}"
        )
    return wanted


def sublayers(block: Block, path: str, registry: Registry, note: Callable[[str], None]) -> list[Place]:
    """A block's sublayers: a memory attached as "ffn" takes the feed-forward's place, one as "tokens" is left out.

    Args:
        path: of the sublayers in the config.
    """
    placed: list[Place] = []
    memory: Place | None = None
    for index, sublayer in enumerate(block.sublayers):
        where = f"{path}[{index}]"
        if memory:
            if sublayer.router:
                raise CompositionError(
                    f"{memory[1]}.attach: the feed-forward slot that the memory would take holds a router",
                    hint="leave out the router, or attach the memory in another way",
                )
            placed.append(memory)
            memory = None
            if sublayer.feed_forward:
                continue
        if sublayer.mixer and sublayer.memory:
            component = registry.get("memory", sublayer.memory.name)
            attach = attach_mode(component, sublayer.attach, f"{where}.attach", note)
            if attach == "ffn":
                memory = Sublayer(memory=sublayer.memory, norm=sublayer.norm), where
                if index + 1 < len(block.sublayers) and block.sublayers[index + 1].feed_forward:
                    note(f"{component.name} takes the feed-forward's place")
            if attach in ("ffn", "tokens"):
                sublayer = sublayer.model_copy(update={"memory": None, "attach": None})
        placed.append((sublayer, where))
    return [*placed, memory] if memory else placed


def around(config: ModelConfig, registry: Registry) -> tuple[ComponentRef, str] | None:
    """The memory around the whole stack of blocks, which the config names by itself or for every block; and where.

    Raises:
        CompositionError: if there would be two, or if only some blocks name it.
    """
    named = [(config.stack_memory, "stack_memory")] if config.stack_memory else []
    everywhere = True
    for index, block in enumerate(config.blocks):
        found = [
            (sublayer.memory, f"blocks[{index}].sublayers[{i}].memory")
            for i, sublayer in enumerate(block.sublayers)
            if sublayer.mixer and sublayer.memory and _tokens(sublayer.memory, sublayer.attach, registry)
        ]
        everywhere = everywhere and bool(found)
        named += found
    other = next((path for ref, path in named if ref != named[0][0]), None)
    if other or (named and not config.stack_memory and not everywhere):
        raise CompositionError(
            f"{other or named[0][1]}: a memory attached as tokens stands around the whole stack of blocks, so there is "
            "one, for all of them",
            hint="name the same for every block, with the same settings, or once as `stack_memory`",
        )
    return named[0] if named else None


def _tokens(ref: ComponentRef, wanted: str | None, registry: Registry) -> bool:
    spec = registry.get("memory", ref.name).spec
    assert isinstance(spec, MemorySpec)
    return (wanted or spec.default_attach) == "tokens"
