"""The memory against its equations, written out here once more token by token, and what has to hold of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from altx_nsm.config import NSMConfig
from altx_nsm.memory import NSM
from pydantic import ValidationError
from torch.nn import functional as F

from altx.attach import MemoryLayer
from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError
from altx.memory import Memory

DIM = 6
CONFIGS = [
    {},
    {"chunk": 1},
    {"chunk": 5, "k": 3, "heads": 1},
    {"chunk": 2, "width": 4, "living": 3},
    {"slots": 2, "chunk": 4},
]


def make(scale: float = 2.0, **settings) -> NSM:
    """A memory with weights far from their initial values, in float64."""
    torch.manual_seed(0)
    memory = NSM(NSMConfig(**{"slots": 5, "chunk": 3, "heads": 2, **settings}), DIM).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(scale).add_(0.3 * torch.randn_like(parameter))
        memory.logit_scale.fill_(1.0)  # so that no share of a choice is next to nothing
    return memory


def tokens(batch: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(s: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return s / (s.square().mean() + 1e-6).sqrt() * weight


def unit(s: torch.Tensor) -> torch.Tensor:
    return rms(s, torch.ones_like(s)) / len(s) ** 0.5


def equations(nsm: NSM, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row x (T, D), state by state: values read (T, D), keys and values (S, W) after the last whole chunk.

    The update is PyTorch's own GRUCell, the attention among states its own multi-head attention.
    """
    c, cell = nsm.config, nsm.cell
    living = [i for i in range(c.slots) if nsm.population.alive[i]]
    keys, states = (list(half) for half in nsm.initial.chunk(2, -1))
    told = [[] for _ in range(c.slots)]
    values = []
    for t, token in enumerate(x):
        query = unit(nsm.q_proj.weight @ token)
        score = {i: nsm.logit_scale.exp()[0] * (query @ unit(keys[i])) for i in living}
        chosen = sorted(living, key=lambda i: -float(score[i].detach()))[: c.k]
        share = torch.stack([score[i] for i in chosen]).exp()
        share = share / share.sum()
        values.append(nsm.out_proj.weight @ sum(a * states[i] for a, i in zip(share, chosen, strict=True)))
        for a, i in zip(share, chosen, strict=True):
            write = a * torch.sigmoid(nsm.write_gate(token))
            told[i].append((write, query, nsm.v_proj.weight @ token, write))
        if (t + 1) % c.chunk:
            continue
        changed, strength = list(states), {}
        for i in range(c.slots):
            if told[i]:
                mass = sum(a for a, *_ in told[i])
                new_key, mean, strength[i] = (sum(each[0] * each[j] for each in told[i]) / mass for j in (1, 2, 3))
                keys[i] = keys[i] + strength[i] * (new_key - keys[i])
                changed[i] = states[i] + strength[i] * (cell.gru(mean[None], states[i][None])[0] - states[i])
        normed = torch.stack([rms(s, cell.norm.weight) for s in changed])[:, None]
        heard, _ = F.multi_head_attention_forward(
            normed, normed, normed, normed.shape[-1], c.heads, cell.in_proj.weight, None, None, None, False, 0.0,
            cell.out_proj.weight, None, key_padding_mask=~nsm.population.alive[None],
        )  # fmt: skip
        states = [s + strength.get(i, 0) * heard[i, 0] for i, s in enumerate(changed)]
        told = [[] for _ in range(c.slots)]
    return torch.stack(values), torch.stack(keys), torch.stack(states)


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_scan_is_the_equations_with_the_same_gradients(settings):
    nsm, x = make(**settings), tokens().requires_grad_()
    rows = [equations(nsm, row) for row in x]
    out = nsm.scan(x, nsm.init_state(2))
    results = [
        (out.read.value, out.state["keys"], out.state["values"]),
        tuple(torch.stack(each) for each in zip(*rows, strict=True)),
    ]
    gradients = []
    for result in results:
        torch.manual_seed(2)
        loss = sum((each * torch.randn_like(each)).sum() for each in result)
        gradients.append(torch.autograd.grad(loss, [x, *nsm.parameters()]))
    for ours, wanted in [*zip(*results, strict=True), *zip(*gradients, strict=True)]:
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def flags(*places: tuple[int, int]) -> torch.Tensor:
    out = torch.zeros(2, 11, dtype=torch.bool)
    for place in places:
        out[place] = True
    return out


MASK = ~flags((0, 0), (0, 1), (0, 6), (1, 3), (1, 4), (1, 10))
RESET = flags((0, 0), (0, 5), (0, 6), (1, 4), (1, 9))
CONTEXTS = {"plain": {}, "mask": {"mask": MASK}, "reset": {"reset": RESET}, "both": {"mask": MASK, "reset": RESET}}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("settings", [{}, {"chunk": 1}, {"chunk": 4, "living": 4}], ids=str)
def test_scan_is_the_loop_of_reads_and_writes_and_every_split_of_it(settings, context):
    nsm, x, ctx = make(**settings), tokens(), Context(**CONTEXTS[context])
    before = nsm.scan(tokens(2, 5, seed=3), nsm.init_state(2)).state
    whole, plain = nsm.scan(x, before, ctx), Memory.scan(nsm, x, before, ctx)
    real = torch.ones(2, 11, dtype=torch.bool) if ctx.mask is None else ctx.mask
    torch.testing.assert_close(whole.read.value[real], plain.read.value[real], rtol=1e-11, atol=1e-11)
    for cuts in ((0, 4, 11), (0, 6, 6, 7, 11), tuple(range(12))):
        state, values = before, []
        for start, stop in pairwise(cuts):
            out = nsm.scan(x[:, start:stop], state, ctx.slice(start, stop))
            state = out.state
            values.append(out.read.value)
        torch.testing.assert_close(torch.cat(values, 1)[real], whole.read.value[real], rtol=1e-11, atol=1e-11)
        for name, leaf in whole.state.flat().items():
            torch.testing.assert_close(state.flat()[name], leaf, rtol=1e-11, atol=1e-11, msg=name)
            torch.testing.assert_close(plain.state.flat()[name], leaf, rtol=1e-11, atol=1e-11, msg=name)


def test_a_row_counts_its_chunks_from_its_first_real_token_and_from_a_reset():
    nsm, x = make(), tokens(1, 6)
    alone = nsm.scan(x, nsm.init_state(1)).read.value
    for extra in (1, 2, 4):
        mask = torch.arange(6 + extra)[None] >= extra
        padded = torch.cat([torch.full((1, extra, DIM), torch.nan).double(), x], 1)
        value = nsm.scan(padded, nsm.init_state(1), Context(mask=mask)).read.value[:, extra:]
        torch.testing.assert_close(value, alone, rtol=1e-12, atol=1e-12)
        reset = torch.arange(6 + extra)[None] == extra
        two = nsm.scan(torch.cat([tokens(1, extra, seed=4), x], 1), nsm.init_state(1), Context(reset=reset))
        torch.testing.assert_close(two.read.value[:, extra:], alone, rtol=1e-12, atol=1e-12)


def test_no_token_of_a_chunk_sees_another_of_it_and_the_next_chunk_sees_all():
    nsm, x = make(), tokens(1, 6)
    value = nsm.scan(x, nsm.init_state(1)).read.value
    for t in range(3):
        other = x.clone()
        other[:, t] += 1
        moved = (nsm.scan(other, nsm.init_state(1)).read.value - value).abs().amax((0, 2)) > 1e-9
        assert moved.tolist() == [i == t for i in range(3)] + [True] * 3


def test_repeating_a_chunks_tokens_writes_the_same():
    once, twice, x = make(chunk=3), make(chunk=6), tokens(1, 3)
    twice.load_state_dict(once.state_dict())
    first = once.scan(x, once.init_state(1)).state
    again = twice.scan(torch.cat([x, x], 1), twice.init_state(1)).state
    for name, before in zip(("keys", "values"), once.initial.chunk(2, -1), strict=True):
        assert not torch.equal(first[name][0], before)
        torch.testing.assert_close(again[name], first[name], rtol=1e-12, atol=1e-12)


def test_a_token_that_does_not_write_leaves_no_mark_on_what_others_of_its_chunk_write():
    nsm, x = make(chunk=3), tokens(1, 3)
    with torch.no_grad():
        nsm.q_proj.weight.zero_()  # all choose the same states
        nsm.write_gate.weight.zero_()[0, 0] = 1000.0
        nsm.write_gate.bias.zero_()
    x[0, :, 0] = torch.tensor([-1.0, 1.0, -1.0])
    other = x.clone()
    other[0, [0, 2], 1:] += 5
    one, two = (nsm.scan(each, nsm.init_state(1)).state for each in (x, other))
    for name, before in zip(("keys", "values"), nsm.initial.chunk(2, -1), strict=True):
        assert not torch.equal(one[name][0], before)
        assert torch.equal(one[name], two[name])


def test_states_that_no_token_chose_hold_every_bit():
    nsm, x = make(slots=9, chunk=2), tokens(1, 2)
    out = nsm.scan(x, nsm.init_state(1))
    chosen = out.metrics["load"] > 0
    assert 2 <= int(chosen.sum()) <= 4
    for name, before in zip(("keys", "values"), nsm.initial.chunk(2, -1), strict=True):
        assert ((out.state[name][0] != before).any(-1) == chosen).all()


def test_what_was_written_is_found_by_its_key_after_other_writes():
    torch.manual_seed(0)
    nsm = NSM(NSMConfig(slots=16, chunk=1, width=32), 64).double()
    with torch.no_grad():
        # Tokens are a key and a value, always written; what other states hold is not mixed in.
        nsm.q_proj.weight.copy_(torch.eye(64)[:32])
        nsm.v_proj.weight.copy_(torch.eye(64)[32:])
        nsm.write_gate.bias.fill_(10)
        nsm.logit_scale.fill_(2)
        nsm.cell.out_proj.weight.zero_()
    told = torch.randn(8, 1, 64).double()
    asked = told * (torch.arange(64) < 32)
    alone = nsm.read(asked, nsm.scan(told, nsm.init_state(8)).state)[0].value[:, 0]
    among = nsm.read(asked.transpose(0, 1), nsm.scan(told.transpose(0, 1), nsm.init_state(1)).state)[0].value[0]
    likeness = F.cosine_similarity(among[:, None], alone, dim=-1)
    assert likeness.argmax(1).tolist() == list(range(8)) and likeness.diagonal().min() > 0.8


def test_losses_and_metrics_count_real_tokens_and_are_neutral_without_any():
    nsm, x = make(), tokens()
    x[~MASK] = torch.nan
    out = nsm.scan(x, nsm.init_state(2), Context(mask=MASK))
    assert out.metrics["load"].sum().item() == pytest.approx(int(MASK.sum()))
    assert out.losses["balance"].item() > 0 and out.metrics["alive"].item() == 5
    for empty in (x[:, :0], x):
        ctx = Context(mask=torch.zeros(empty.shape[:2], dtype=torch.bool))
        state = nsm.scan(tokens(), nsm.init_state(2)).state
        neutral = nsm.scan(empty, state, ctx)
        assert neutral.losses["balance"].item() == 0
        assert all(float(neutral.metrics[name].sum()) == 0 for name in ("load", "max_load", "entropy"))
        for name, leaf in state.flat().items():
            assert torch.equal(neutral.state.flat()[name], leaf), name


def test_the_balance_loss_is_one_when_balanced_and_at_most_the_number_of_states():
    nsm = make(k=2, slots=4)
    with torch.no_grad():
        nsm.q_proj.weight.zero_()
        even = nsm.scan(tokens(), nsm.init_state(2)).losses["balance"]
        assert even.item() == pytest.approx(1)
        nsm.q_proj.weight.normal_(std=100)
        assert 1 < nsm.scan(tokens(), nsm.init_state(2)).losses["balance"].item() <= 4


def test_the_states_stay_in_float32_in_bfloat16_and_under_autocast():
    nsm = NSM(NSMConfig(slots=4, chunk=2), 8)
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = nsm.scan(x, nsm.init_state(2))
    assert out.state["values"].dtype == torch.float32
    plain = nsm.scan(x, nsm.init_state(2))
    torch.testing.assert_close(out.read.value.float(), plain.read.value, rtol=0.1, atol=0.1)
    nsm.bfloat16()
    state = nsm.init_state(2, dtype=torch.bfloat16)
    out = nsm.scan(x.bfloat16(), state)
    assert out.read.value.dtype == torch.bfloat16
    assert all(out.state[name].dtype == torch.float32 for name in ("keys", "values", "total", "square"))
    assert nsm.population.usage.dtype == torch.float32


def test_extreme_inputs_stay_finite_forward_and_backward():
    torch.manual_seed(0)
    nsm = NSM(NSMConfig(slots=8, chunk=4), 8)
    x = (1e4 * torch.randn(2, 200, 8)).requires_grad_()
    out = nsm.scan(x, nsm.init_state(2))
    (out.read.value.sum() + out.losses["balance"]).backward()
    assert out.read.value.isfinite().all() and out.state["values"].isfinite().all()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in nsm.parameters())


@pytest.mark.parametrize("dim", [16, 32, 64, 768])
def test_the_defaults_fit_every_usual_width(dim):
    NSMConfig().fit(dim)
    with torch.device("meta"):
        assert NSM(NSMConfig(), dim).initial.shape == (64, 2 * min(dim, 128))


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"slots": 4, "k": 5}, "use a k of at most 4"),
        ({"living": 1}, "from 2 to 64"),
        ({"living": 65}, "from 2 to 64"),
        ({"width": 10, "heads": 4}, "use one of .1, 2, 5, 10."),
        ({"slots": 1}, "greater than or equal to 2"),
        ({"k": 1}, "greater than or equal to 2"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(settings, wanted):
    with pytest.raises(ValidationError, match=wanted):
        NSMConfig(**settings)


def test_refusals_when_composing():
    with pytest.raises(AltxError, match="4 heads do not divide states of width 10"):
        compose({"dim": 10, "blocks": [{"sublayers": [{"memory": "nsm"}]}]})
    with pytest.raises(AltxError, match="controller"):
        compose({"dim": 16, "mixer": "mamba", "memory": "nsm", "attach": "controller"})


def test_the_memory_layer_names_its_metrics_where_on_step_finds_them():
    layer = MemoryLayer(make()).double()
    assert {"memory.load", "memory.alive"} <= layer(tokens()).metrics.keys()
