"""How memories join layers: what each attach mode builds, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toy_plugin import Pages, Relay

from altx import recipe
from altx.attach import ContextAttach, KVAttach, MemoryLayer
from altx.block import Stack
from altx.compose import compose
from altx.context import Context, Cross
from altx.errors import CompositionError, UnsupportedContext
from altx.layer import FRESH
from altx.memory import NOTHING, Attended, Read, attended, split_heads
from altx.registry import Registry
from altx.resolve import resolve
from altx.segment_loop import SegmentLoop
from altx.spec import Heads
from altx.state import Leaf, State
from altx.testing import prove
from altx.testing.case import difference
from altx.testing.partners import Across, Ledger, MovingAverage, SelfAttention
from altx.testing.runner import check_component

IN_SLOT = {"mixer": "average", "memory": "notebook", "attach": "ffn", "dim": 16}

VECTORS = {"input": {"kind": "vectors", "size": 3}, "head": {"kind": "vectors", "size": 3}}


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


def test_a_memory_of_all_keys_makes_attention_to_oneself_attention_to_all() -> None:
    mixer = SelfAttention(16).double()
    assert mixer.hands
    layer, x = KVAttach(mixer, Ledger(mixer.hands)), torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = (t.transpose(1, 2) for t in split_heads(mixer.input(x), mixer.hands))
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert difference(layer(x).y, mixer.output(whole.flatten(2))) < 1e-12


@pytest.mark.parametrize("shared", [True, False], ids=["keys for all", "keys for each"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_to_a_memory_is_softmax_attention(shared: bool, groups: int) -> None:
    torch.manual_seed(0)
    each, q = (1 if shared else 5), torch.randn(2, 5, 4, 3, dtype=torch.float64)
    keys, values = (torch.randn(2, each, 6, groups, n, dtype=torch.float64) for n in (3, 2))
    mask = torch.rand(2, each, 6) > 0.4
    mask[0, 0] = False
    found = attended(q, keys, values, mask)
    for b in range(2):
        for t in range(5):
            for h in range(4):
                at, g = (0 if shared else t), h // (4 // groups)
                score = (keys[b, at, :, g] @ q[b, t, h])[mask[b, at]]
                if not len(score):
                    assert found.weight[b, t, h] == NOTHING and (found.value[b, t, h] == 0).all()
                    continue
                assert difference(found.weight[b, t, h], score.logsumexp(0)) < 1e-12
                assert difference(found.value[b, t, h], score.softmax(0) @ values[b, at, mask[b, at], g]) < 1e-12
    nothing = attended(q, keys[:, :, :0], values[:, :, :0])
    assert (nothing.weight == NOTHING).all() and nothing.value.shape == (2, 5, 4, 2)


def test_what_a_layer_hands_over_is_split_as_it_was_joined() -> None:
    heads = Heads(query=4, kv=2, key_dim=3, value_dim=5)
    x = torch.arange(2.0 * heads.width).reshape(1, 2, -1)
    q, k, v = split_heads(x, heads)
    assert q.shape == (1, 2, 4, 3) and k.shape == (1, 2, 2, 3) and v.shape == (1, 2, 2, 5)
    assert torch.equal(torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1), x)


def test_a_memory_joins_a_softmax(toy: Registry) -> None:
    model = compose({"mixer": "self", "memory": "ledger", "dim": 16}, plugins=toy)
    assert [r for r in prove(model) if r.status == "failed"] == []
    results = check_component("ledger", "memory", plugins=toy) + check_component("self", plugins=toy)
    assert [(r.subject, r.check, r.message) for r in results if r.status == "failed"] == []
    assert {r.subject for r in results if r.status == "passed"} == {"ledger[kv]", "self", "self[encoder]"}


def test_a_memory_with_a_gate_is_mixed_by_its_share() -> None:
    mixer, x = SelfAttention(16).double(), torch.randn(2, 7, 16, dtype=torch.float64)
    share, held = torch.rand(2, 7, 2, dtype=torch.float64), torch.randn(2, 1, 3, 1, 8, dtype=torch.float64)

    def recall(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: Context) -> Attended:
        return attended(q, held[..., :4], held)._replace(share=share)

    assert mixer.hands
    q, _, v = split_heads(mixer.input(x), mixer.hands)
    far = attended(q * 4**-0.5, held[..., :4], held).value
    wanted = mixer.output((share[..., None] * far + (1 - share[..., None]) * v).flatten(2))
    assert difference(mixer(x, Context(recall=recall)).y, wanted) < 1e-12


def test_a_memory_without_parameters_has_its_state_where_the_mixers_are() -> None:
    mixer = SelfAttention(16).double()
    assert mixer.hands
    layer = KVAttach(mixer, Ledger(mixer.hands))
    held = layer.init_state(2).children["memory"]["held"]
    assert held.dtype == torch.float64
    assert layer.init_state(2, dtype=torch.float32).children["memory"]["held"].dtype == torch.float32
    assert layer.to("meta").init_state(2).children["memory"]["held"].is_meta


def test_a_mixer_without_a_softmax_to_join_is_refused(toy: Registry) -> None:
    data = {"mixer": "average", "memory": "ledger", "dim": 16}
    with pytest.raises(CompositionError, match=r"mixer .average. .* takes no keys and values") as caught:
        resolve(recipe.load(data), toy)
    assert "accepts_kv" in str(caught.value)
    with pytest.raises(CompositionError, match="reads no value for a token, so it is no sublayer by itself"):
        resolve(recipe.load({"dim": 16, "blocks": [{"sublayers": [{"memory": "ledger"}]}]}), toy)


def test_a_layer_that_does_not_ask_for_what_it_accepts_is_found_out() -> None:
    heads = Heads(query=1, kv=1, key_dim=4, value_dim=4)
    with pytest.raises(TypeError, match="asked 0 times"):
        KVAttach(MovingAverage(16), Ledger(heads))(torch.zeros(1, 2, 16), Context())


def test_a_mixer_attends_across_to_what_was_read_for_its_chunk() -> None:
    """Against the plain loop."""
    mixer, memory, x = Across(16).double(), Pages(16).double(), torch.randn(2, 10, 16, dtype=torch.float64)
    held, ys = torch.zeros(2, 2, 16, dtype=torch.float64), []
    for chunk in x.split(4, 1):
        tokens = torch.cat([memory.title.expand(2, 1, -1), held], 1)
        ys.append(mixer(chunk, Context(cross=Cross(tokens))).y)
        held = torch.stack([held[:, 1], chunk.mean(1)], 1)
    layer = ContextAttach(mixer, memory)
    assert difference(layer(x).y, torch.cat(ys, 1)) < 1e-12
    with pytest.raises(UnsupportedContext, match=r"ctx\.cross is taken"):
        layer(x, Context(cross=Cross(x)))


@pytest.mark.parametrize("tokens", [False, True], ids=["a value", "tokens"])
def test_a_mixer_attends_across_to_what_each_token_has_read(tokens: bool) -> None:
    """Against the loop token by token: the last page and a title, or the last page alone."""

    class Single(Pages):
        capabilities = replace(Pages.capabilities, chunk=1)

        def read(self, q: torch.Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
            last = state["pages"][:, -1:]
            if not tokens:
                return Read(value=last.expand(-1, q.shape[1], -1)), state
            return Read(tokens=torch.cat([self.title.expand(len(q), 1, -1), last], 1)), state

    mixer, memory, x = Across(16).double(), Single(16).double(), torch.randn(2, 6, 16, dtype=torch.float64)
    state, ys = memory.init_state(2, dtype=torch.float64), []
    for token in x.split(1, 1):
        read, _ = memory.read(token, state)
        ys.append(mixer(token, Context(cross=Cross(read.tokens if read.value is None else read.value))).y)
        state, _ = memory.write(token, state)
    layer = ContextAttach(mixer, memory)
    assert difference(layer(x).y, torch.cat(ys, 1)) < 1e-12
    assert layer(x[:, :0]).y.shape == (2, 0, 16)


def test_a_memory_as_context(toy: Registry) -> None:
    model = compose({"mixer": "across", "memory": "pages", "dim": 16}, plugins=toy)
    assert not model.capabilities.cross
    assert [r for r in prove(model) if r.status == "failed"] == []
    results = check_component("pages", plugins=toy)
    assert [(r.subject, r.check, r.message) for r in results if r.status == "failed"] == []
    assert {r.subject for r in results} == {"pages", "pages[context]", "pages[residual]", "pages[gate]"}


def test_a_mixer_that_does_not_attend_across_is_refused(toy: Registry) -> None:
    with pytest.raises(CompositionError, match=r"mixer .average. .* does not attend across to tokens") as caught:
        resolve(recipe.load({"mixer": "average", "memory": "pages", "dim": 16}), toy)
    assert "declares cross" in str(caught.value)


def test_segments_pass_on_what_became_of_the_tokens_after_them() -> None:
    """Against the plain loop."""
    mixer, memory = MovingAverage(16).double(), Relay(16, 4).double()
    loop, x = SegmentLoop(mixer, memory), torch.randn(2, 10, 16, dtype=torch.float64)
    held, ys = memory.start.expand(2, -1, -1), []
    for segment in x.split(4, 1):
        y = mixer(torch.cat([held, segment, held], 1)).y
        ys.append(y[:, 2:-2])
        held = torch.tanh(y[:, -2:])
    assert difference(loop(x).y, torch.cat(ys, 1)) < 1e-12
    out = loop(x, Context(), loop.init_state(2, dtype=torch.float64))
    assert difference(out.y, torch.cat(ys, 1)) < 1e-12
    assert out.state and out.state.seen is not None and out.state.seen.tolist() == [10, 10]
    held = memory.start.expand(2, -1, -1)
    for segment, found in zip(x.split(4, 1), loop(x, Context(causal=False)).y.split(4, 1), strict=True):
        y = mixer(torch.cat([held, segment], 1)).y
        assert difference(found, y[:, 2:]) < 1e-12
        held = torch.tanh(y[:, :2])


class Shift(Relay):
    """With a part in every block: it adds what the last tokens after a segment became there, per block."""

    def init_state(self, batch: int, **options: Any) -> State:
        state = super().init_state(batch, **options)
        blank = torch.zeros_like(state["held"][:, 0])
        parts = {str(n): State({"shift": blank}, {"shift": Leaf()}) for n in range(2)}
        return replace(state, children=parts)

    def enter(self, layer: int, x: Tensor, state: State, ctx: Context = FRESH) -> Tensor:
        return x + state.children[str(layer)]["shift"][:, None]

    def leave(self, layer: int, u: Tensor, state: State, ctx: Context = FRESH) -> State:
        part = state.children[str(layer)]
        shift = u[:, -1] if ctx.mask is None else torch.where(ctx.mask[:, -1:], u[:, -1], part["shift"])
        return replace(state, children={**state.children, str(layer): part.replace(shift=shift)})


def test_a_memory_has_a_part_in_every_block() -> None:
    """Against the plain loop, and streamed by rows whose segments end apart."""
    blocks, memory = [MovingAverage(16).double(), MovingAverage(16).double()], Shift(16, 4).double()
    loop, x = SegmentLoop(Stack(blocks), memory), torch.randn(2, 10, 16, dtype=torch.float64)
    held, shifts, ys = memory.start.expand(2, -1, -1), [torch.zeros(2, 1, 16).double()] * 2, []
    for segment in x.split(4, 1):
        y = torch.cat([held, segment, held], 1)
        for n, block in enumerate(blocks):
            y = block(y + shifts[n]).y
            shifts = [y[:, -1:] if i == n else shift for i, shift in enumerate(shifts)]
        ys.append(y[:, 2:-2])
        held = torch.tanh(y[:, -2:])
    wanted = torch.cat(ys, 1)
    assert difference(loop(x).y, wanted) < 1e-12
    assert difference(loop(x).y, SegmentLoop(Stack(blocks), Relay(16, 4).double())(x).y) > 1e-3
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, :3] = mask[1, [2, 7, 12]] = False
    spread = torch.randn(2, 13, 16, dtype=torch.float64).masked_scatter(mask[..., None], x)
    state, found = loop.init_state(2, dtype=torch.float64), []
    for start, stop in ((0, 6), (6, 7), (7, 13)):
        out = loop(spread[:, start:stop], Context(mask=mask[:, start:stop]), state)
        state = out.state
        found.append(out.y)
    assert difference(torch.cat(found, 1)[mask].reshape(wanted.shape), wanted) < 1e-12


def test_each_row_has_segments_of_its_own(toy: Registry) -> None:
    """Rows with masked tokens anywhere and resets in different places, in calls of any length."""
    loop = SegmentLoop(MovingAverage(16), Relay(16, 4)).double()
    x = torch.randn(3, 24, 16, dtype=torch.float64)
    mask = torch.rand(3, 24, generator=torch.Generator().manual_seed(0)) > 0.3
    reset = torch.zeros(3, 24, dtype=torch.bool)
    reset[0, 9] = reset[1, [2, 3, 13, 17]] = reset[2, 11] = True
    ctx = Context(mask=mask, reset=reset)
    whole, state, ys = loop(x, ctx).y, loop.init_state(3, dtype=torch.float64), []
    for start, stop in ((0, 5), (5, 6), (6, 6), (6, 24)):
        out = loop(x[:, start:stop], ctx.slice(start, stop), state)
        assert out.state
        state = out.state
        ys.append(out.y)
    assert difference(torch.cat(ys, 1)[mask], whole[mask]) < 1e-12
    for row in range(3):
        real = x[row, mask[row]][None]
        cuts = (reset & mask)[row, mask[row]].nonzero().flatten().tolist()
        parts = [part for part in real.tensor_split(cuts, 1) if part.shape[1]]
        alone = torch.cat([loop(part).y for part in parts], 1)
        assert difference(whole[row, mask[row]][None], alone) < 1e-12


def test_a_memory_stands_around_the_whole_stack(toy: Registry) -> None:
    data = {"mixer": "average", "memory": "relay", "dim": 16, "layers": 2}
    blueprint = resolve(recipe.load(data, {"relay.segment": 3}), toy)
    assert blueprint.config.stack_memory and blueprint.config.stack_memory.config == {"segment": 3}
    assert kinds(data, toy) == [["mixer", "feed-forward"]] * 2
    assert "relay stands around all blocks, which run in segments of 3 tokens" in blueprint.notes
    model = compose(data, plugins=toy)
    assert isinstance(model.body.inner, SegmentLoop)
    assert model.capabilities == replace(blueprint.capabilities, packing=True)
    assert [r for r in prove(model) if r.status == "failed"] == []
    both = compose({**data, "causal": False, "mixer": "whole", **VECTORS}, plugins=toy)
    assert both(torch.randn(2, 9, 3)).y.shape == (2, 9, 3)
    results = check_component("relay", plugins=toy)
    assert [(r.subject, r.check, r.message) for r in results if r.status == "failed"] == []
    assert {r.subject for r in results} == {"relay[tokens]", "relay[tokens][encoder]"}


def test_a_stack_memory_is_set_by_name_and_by_path(toy: Registry) -> None:
    blocks = [{"sublayers": [{"mixer": "average"}]}]
    for data, settings in (
        ({"stack_memory": "relay"}, {"relay.segment": 7}),
        ({"stack_memory": "relay"}, {"stack_memory.segment": 7}),
        ({"stack_memory": {"name": "relay", "segment": 7}}, {}),
        ({"stack_memory": "relay", "defaults": {"relay": {"segment": 7}}}, {}),
    ):
        config = resolve(recipe.load({"dim": 16, "blocks": blocks, **data}, settings), toy).config
        assert config.stack_memory and config.stack_memory.config["segment"] == 7


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"memory": "relay,none"}, "blocks[0].sublayers[0].memory: a memory attached as tokens stands around the"),
        (
            {"memory": [{"name": "relay", "segment": 2}, {"name": "relay", "segment": 3}]},
            "blocks[1].sublayers[0].memory: a memory attached as tokens stands around the whole stack of blocks",
        ),
        ({"memory": "relay", "stack_memory": {"name": "relay", "segment": 3}}, "so there is one, for all of them"),
        ({"stack_memory": "notebook"}, "memory 'notebook' of toy-plugin unknown does not attach as 'tokens'"),
        ({"mixer": "chunky", "memory": "relay"}, "cannot be fed one token at a time, and the tokens of memory 'relay'"),
        ({"mixer": "short", "memory": "relay"}, "are longer than the 6 that a layer here accepts"),
        ({"memory": "relay", "attach": "residual"}, "does not attach as 'residual'"),
        (
            {"mixer": None, "blocks": [{"sublayers": [{"router": "router", "targets": [
                {"mixer": "average", "memory": "relay"}]}]}]},
            "stands around a whole stack of blocks, and this is a router's target",
        ),
        (
            {"mixer": None, "blocks": [{"sublayers": [{"memory": "relay"}]}]},
            "reads no value for a token, so it is no sublayer by itself",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_stack_memory_that_does_not_fit_is_refused(toy: Registry, data: dict, message: str) -> None:
    wanted = {"mixer": "average", "dim": 16, "layers": 2, **data}
    if wanted["mixer"] is None:
        del wanted["mixer"], wanted["layers"]
    with pytest.raises(CompositionError) as caught:
        resolve(recipe.load(wanted), toy)
    assert message in str(caught.value)


def test_what_segments_cannot_honour_is_refused() -> None:
    loop, x = SegmentLoop(MovingAverage(16), Relay(16, 4)), torch.zeros(1, 3, 16)
    for ctx, message in (
        (Context(positions=torch.zeros(1, 3, dtype=torch.int64)), "cannot honour ctx.positions"),
        (Context(shared={"token_ids": x[..., 0]}), "a memory's tokens have no token_ids"),
    ):
        with pytest.raises(UnsupportedContext, match=message):
            loop(x, ctx)
    with pytest.raises(UnsupportedContext, match="cannot continue a state"):
        loop(x, Context(causal=False), loop.init_state(1))
