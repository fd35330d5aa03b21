"""How memories join layers: what each attach mode builds, and what it refuses."""

from __future__ import annotations

import pytest

from altx import recipe
from altx.attach import MemoryLayer
from altx.compose import compose
from altx.errors import CompositionError
from altx.registry import Registry
from altx.resolve import resolve
from altx.testing import prove

IN_SLOT = {"mixer": "average", "memory": "notebook", "attach": "ffn", "dim": 16}


def kinds(data: dict, toy: Registry) -> list[list[str]]:
    blueprint = resolve(recipe.load(data), toy)
    # The config written out gives the same model.
    assert resolve(recipe.load(recipe.dump(blueprint.config)), toy).config == blueprint.config
    return [[branch.part.component.spec.kind for branch in block] for block in blueprint.blocks]


def test_a_memory_takes_the_feed_forwards_place(toy: Registry) -> None:
    assert kinds(IN_SLOT, toy) == [["mixer", "memory"]] * 2
    model = compose(IN_SLOT, plugins=toy)
    assert sum(isinstance(module, MemoryLayer) for module in model.modules()) == 2
    assert [r for r in prove(model) if r.status == "failed"] == []


def test_a_memory_in_the_feed_forwards_place_is_announced(toy: Registry) -> None:
    assert "notebook takes the feed-forward's place" in resolve(recipe.load(IN_SLOT), toy).notes
    notes = resolve(recipe.load({**IN_SLOT, "feed_forward": "none"}), toy).notes
    assert not any("takes" in note for note in notes)


def test_blocks_without_a_memory_keep_their_feed_forward(toy: Registry) -> None:
    assert kinds({**IN_SLOT, "memory": "none,notebook"}, toy) == [["mixer", "feed-forward"], ["mixer", "memory"]]


def test_a_memory_makes_itself_a_slot_where_there_is_no_feed_forward(toy: Registry) -> None:
    sublayers = [{"mixer": "average", "memory": "notebook", "attach": "ffn"}, {"mixer": "average"}]
    assert kinds({"dim": 16, "blocks": [{"sublayers": sublayers}]}, toy) == [["mixer", "memory", "mixer"]]
    assert kinds({"dim": 16, "blocks": [{"sublayers": sublayers[:1], "repeat": 2}]}, toy) == [["mixer", "memory"]] * 2


def test_a_slot_that_is_not_there_is_refused(toy: Registry) -> None:
    with pytest.raises(CompositionError, match="holds a router"):
        resolve(recipe.load({**IN_SLOT, "router": "router", "feed_forward": "4*swiglu"}), toy)
    target = {"mixer": "average", "memory": "notebook", "attach": "ffn"}
    with pytest.raises(CompositionError, match="a router's target has no feed-forward slot"):
        resolve(recipe.load({"dim": 16, "blocks": [{"sublayers": [{"router": "router", "targets": [target]}]}]}), toy)
    with pytest.raises(CompositionError, match="so it only attaches as controller"):
        resolve(recipe.load({**IN_SLOT, "memory": "echo"}), toy)
