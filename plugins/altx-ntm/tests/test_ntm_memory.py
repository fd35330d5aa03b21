"""The memory against the paper's equations, written out here once more and slot by slot."""

from __future__ import annotations

import pytest
import torch
from altx_ntm.config import NTMConfig
from altx_ntm.memory import NTM
from pydantic import ValidationError
from torch.nn import functional as F

from altx.attach import ControllerAttach, ResidualAttach
from altx.capabilities import Capabilities
from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError
from altx.layer import FRESH, Layer, Output, advanced
from altx.memory import Memory
from altx.state import Leaf, State

DIM = 6
CONFIGS = [
    {},
    {"read_heads": 2, "write_heads": 3},
    {"shift": 2},
    {"order": "write-read"},
    {"order": "write-read", "read_heads": 2, "write_heads": 2, "shift": 2},
]


def make(scale: float = 3.0, **settings) -> NTM:
    """A memory with weights far from their initial values, in float64."""
    torch.manual_seed(0)
    memory = NTM(NTMConfig(slots=7, width=4, **settings), DIM).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(scale).add_(0.3 * torch.randn_like(parameter))
    return memory


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def paper(ntm: NTM, x: torch.Tensor) -> torch.Tensor:
    """Graves et al. 2014, section 3, for one row x (T, D): the read values (T, D)."""
    c = ntm.config
    slots, width, shifts = range(c.slots), c.width, 2 * c.shift + 1
    memory = torch.full((c.slots, c.width), c.memory_init, dtype=x.dtype)
    read_w = [ntm.read_start[h].softmax(-1) for h in range(c.read_heads)]
    write_w = [ntm.write_start[h].softmax(-1) for h in range(c.write_heads)]

    def address(h: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        key, shift, (beta, gate, gamma) = h[:width].tanh(), h[width : width + shifts].softmax(-1), h[width + shifts :]
        gate, gamma = gate.sigmoid(), 1 + F.softplus(gamma)
        cosine = torch.stack([key @ row / (key.norm() * row.norm()) for row in memory])  # (6)
        content = (F.softplus(beta) * cosine).exp()
        content = content / content.sum()  # (5)
        gated = gate * content + (1 - gate) * previous  # (7)
        moved = torch.stack(
            [sum(gated[(i - j) % c.slots] * shift[j + c.shift] for j in range(-c.shift, c.shift + 1)) for i in slots]
        )  # (8)
        powers = (moved + 1e-8) ** gamma
        return powers / powers.sum()  # (9)

    def read(h: torch.Tensor) -> torch.Tensor:
        for head, own in enumerate(h.chunk(c.read_heads)):
            read_w[head] = address(own, read_w[head])
        return ntm.out_proj(torch.cat([sum(w[i] * memory[i] for i in slots) for w in read_w]))

    def write(h: torch.Tensor) -> torch.Tensor:
        heads = h.chunk(c.write_heads)
        for head, own in enumerate(heads):
            write_w[head] = address(own[2 * width :], write_w[head])
        new = memory
        for w, own in zip(write_w, heads, strict=True):
            new = new * (1 - torch.outer(w, own[:width].sigmoid()))  # (3)
        for w, own in zip(write_w, heads, strict=True):
            new = new + torch.outer(w, own[width : 2 * width].tanh())  # (4)
        return new

    values = []
    for token in x:
        reading, writing = (linear(token).clamp(-c.clip, c.clip) for linear in (ntm.read_heads, ntm.write_heads))
        if c.order == "read-write":
            values.append(read(reading))
            memory = write(writing)
        else:
            memory = write(writing)
            values.append(read(reading))
    return torch.stack(values)


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_scan_is_the_papers_loop(settings):
    ntm, x = make(**settings), tokens()
    value = ntm.scan(x, ntm.init_state(2)).read.value
    assert value.std() > 0.05  # Not the near-uniform addresses of a fresh memory.
    torch.testing.assert_close(value, torch.stack([paper(ntm, row) for row in x]), rtol=1e-9, atol=1e-9)


def loop(ntm: NTM, x: torch.Tensor, state: State, ctx: Context) -> tuple[torch.Tensor, State]:
    """`read` and `write` one token at a time, in the config's order."""
    values = []
    for t in range(x.shape[1]):
        here, token = ctx.slice(t, t + 1), x[:, t : t + 1]
        if ntm.config.order == "write-read":
            state, _ = ntm.write(token, state, here)
        read, state = ntm.read(token, state, here)
        if ntm.config.order == "read-write":
            state, _ = ntm.write(token, state, here)
        values.append(read.value)
    return torch.cat(values, 1), state


CONTEXTS = {
    "plain": {},
    "mask": {"mask": torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 1, 1, 1]]).bool()},
    "reset": {"reset": torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0, 0, 0, 0]]).bool()},
}
CONTEXTS["both"] = CONTEXTS["mask"] | CONTEXTS["reset"]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_scan_is_the_loop_of_reads_and_writes_with_the_same_gradients(settings, context):
    ntm, x, ctx = make(**settings), tokens().requires_grad_(), Context(**CONTEXTS[context])
    real = ctx.mask if ctx.mask is not None else torch.ones(2, 9, dtype=torch.bool)
    results = []
    for run in (lambda s: ntm.scan(x, s, ctx), lambda s: loop(ntm, x, s, ctx)):
        out = run(ntm.init_state(2))
        value, state = out if isinstance(out, tuple) else (out.read.value, out.state)
        torch.manual_seed(2)
        loss = (value * torch.randn_like(value))[real].sum()
        loss = loss + sum((leaf * torch.randn_like(leaf)).sum() for leaf in state.leaves.values())
        results.append([value[real], *state.flat().values(), *torch.autograd.grad(loss, [x, *ntm.parameters()])])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)


def test_the_default_order_is_the_default_scan_of_a_memory():
    ntm, x = make(), tokens()
    fast, plain = ntm.scan(x, ntm.init_state(2)), Memory.scan(ntm, x, ntm.init_state(2))
    torch.testing.assert_close(fast.read.value, plain.read.value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", ["read-write", "write-read"])
def test_padding_holds_memory_and_addresses_even_with_large_weights(order):
    # With small weights addresses are so uniform that not holding them hardly shows.
    ntm, x = make(scale=6.0, order=order), tokens(1, 6)
    mask = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0]]).bool()
    spread = torch.full((1, 11, DIM), torch.nan, dtype=torch.float64)
    spread[mask] = x[0]
    out, alone = ntm.scan(spread, ntm.init_state(1), Context(mask=mask)), ntm.scan(x, ntm.init_state(1))
    assert torch.equal(out.read.value[mask], alone.read.value[0])
    for name, leaf in alone.state.flat().items():
        assert torch.equal(out.state.flat()[name], leaf), name


def test_a_masked_token_changes_no_bit_of_the_state():
    ntm, x = make(scale=6.0, write_heads=2), tokens()
    state = ntm.scan(x, ntm.init_state(2)).state
    held = ntm.scan(x, state, Context(mask=torch.zeros(2, 9, dtype=torch.bool))).state
    for name, leaf in state.flat().items():
        assert torch.equal(held.flat()[name], leaf), name


@pytest.mark.parametrize("settings", [{}, {"read_heads": 2, "write_heads": 2, "shift": 2}], ids=str)
def test_gradcheck(settings):
    ntm, x = make(**settings), tokens(1, 3).requires_grad_()
    state = ntm.init_state(1).detach()
    leaves = [(leaf + 0.1).requires_grad_() for leaf in state.leaves.values()]
    ctx = Context(reset=torch.tensor([[False, False, True]]), mask=torch.tensor([[True, False, True]]))

    def run(x, *leaves):
        out = ntm.scan(x, state.replace(**dict(zip(state.leaves, leaves, strict=True))), ctx)
        return out.read.value[:, ctx.mask[0]], *out.state.leaves.values()

    assert torch.autograd.gradcheck(run, (x, *leaves))


class Recurrent(Layer):
    """h = tanh(W x + h), the smallest controller."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = Capabilities(growth="constant", rollback="snapshot")
        self.input = torch.nn.Linear(DIM, DIM)

    def init_state(self, batch, *, capacity=None, device=None, dtype=None):
        h = torch.zeros(batch, DIM, device=device, dtype=dtype or self.input.weight.dtype)
        return State({"h": h}, {"h": Leaf()}, seen=torch.zeros(batch, dtype=torch.int64))

    def forward(self, x, ctx=FRESH, state=None):
        start = state or self.init_state(x.shape[0], dtype=x.dtype)
        h, outputs = start["h"], [x[:, :0]]
        for t in range(x.shape[1]):
            new = torch.tanh(self.input(x[:, t]) + h)
            h = new if ctx.mask is None else torch.where(ctx.mask[:, t, None], new, h)
            outputs.append(h[:, None])
        return Output(torch.cat(outputs, 1), start.replace(h=h, seen=advanced(start.seen, x, ctx)) if state else None)


@pytest.mark.parametrize("attach", ["residual", "controller"])
def test_an_attached_memory_streams_holds_on_padding_and_trains(attach):
    memory = make(scale=6.0)
    layer = (
        ResidualAttach(Recurrent(), memory) if attach == "residual" else ControllerAttach(Recurrent(), memory, DIM)
    ).double()
    x = tokens()
    whole = layer(x).y
    state, pieces = layer.init_state(2, dtype=torch.float64), []
    for start, stop in ((0, 4), (4, 4), (4, 5), (5, 9)):
        out = layer(x[:, start:stop], FRESH, state)
        state = out.state
        pieces.append(out.y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)

    mask = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1]).bool().expand(2, -1)
    spread = torch.full((2, 13, DIM), 9.0, dtype=torch.float64)
    spread[mask] = x.reshape(-1, DIM)
    padded = layer(spread, Context(mask=mask)).y[mask].reshape(whole.shape)
    torch.testing.assert_close(padded, whole, rtol=1e-10, atol=1e-10)

    whole.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_extreme_inputs_for_200_steps_stay_finite_forward_and_backward():
    torch.manual_seed(0)
    ntm = NTM(NTMConfig(slots=16, width=8), DIM)
    x = (1e4 * torch.randn(2, 200, DIM)).requires_grad_()
    out = ntm.scan(x, ntm.init_state(2))
    out.read.value.sum().backward()
    assert out.read.value.isfinite().all()
    assert all(leaf.isfinite().all() for leaf in out.state.leaves.values())
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in ntm.parameters())


def test_many_slots_do_not_underflow_in_float32():
    # (1/N)^gamma is below float32 for N = 256 and gamma = 21.
    torch.manual_seed(0)
    ntm = NTM(NTMConfig(slots=256, width=4), DIM)
    with torch.no_grad():
        ntm.read_heads.bias[-1] = ntm.write_heads.bias[-1] = 100.0
        ntm.read_start.zero_()
        ntm.write_start.zero_()
    with torch.no_grad():
        out = ntm.scan(torch.randn(1, 5, DIM), ntm.init_state(1))
    assert out.read.value.isfinite().all()
    torch.testing.assert_close(out.state["write_address"].sum(-1), torch.ones(1, 1), rtol=1e-4, atol=1e-4)


def test_the_state_stays_in_float32_under_bfloat16():
    ntm = NTM(NTMConfig(slots=8, width=4), DIM).bfloat16()
    state = ntm.init_state(2, dtype=torch.bfloat16)
    out = ntm.scan(torch.randn(2, 3, DIM).bfloat16(), state)
    assert out.read.value.dtype == torch.bfloat16
    assert all(leaf.dtype == torch.float32 for leaf in [*state.leaves.values(), *out.state.leaves.values()])


def test_more_shifts_than_slots_are_refused_with_what_would_be_accepted():
    with pytest.raises(ValidationError, match="shift of at most 2"):
        NTMConfig(slots=5, shift=3)
    with pytest.raises(AltxError, match="shift of at most 2"):
        compose({"dim": 8, "blocks": [{"sublayers": [{"memory": {"name": "ntm", "slots": 5, "shift": 3}}]}]})
