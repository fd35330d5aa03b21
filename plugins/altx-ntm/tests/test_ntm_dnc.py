"""The memory `dnc` against the paper's equations, written out here once more and slot by slot."""

from __future__ import annotations

import pytest
import torch
from altx_ntm.config import DNCConfig
from altx_ntm.dnc import DNC
from altx_ntm.kernels.dnc.reference import Slots, allocation
from pydantic import ValidationError

from altx.capabilities import MemoryCapabilities
from altx.compose import compose
from altx.context import Context
from altx.memory import Memory
from altx.state import State

DIM = 6
EPS = 1e-6  # under the roots of the cosine, as in deepmind/dnc, dnc/addressing.py
ALIKE = 128 * 2.0**-52
CONFIGS = [{}, {"read_heads": 1}, {"read_heads": 3, "slots": 12, "width": 5}, {"slots": 1, "width": 1}]


def make(scale: float = 3.0, **settings) -> DNC:
    """A memory with weights far from their initial values, in float64."""
    torch.manual_seed(0)
    memory = DNC(DNCConfig(**{"slots": 7, "width": 4, **settings}), DIM).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(scale).add_(0.3 * torch.randn_like(parameter))
    return memory


def tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sigmoid(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).sigmoid())


def softmax(x: list[float]) -> list[float]:
    # Element by element, so that equal numbers stay equal.
    powers = [float(torch.tensor(v - max(x), dtype=torch.float64).exp()) for v in x]
    return [p / sum(powers) for p in powers]


def paper(dnc: DNC, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Graves et al. 2016, Methods, for one row x (T, D), in plain numbers: the read values (T, D), the last state."""
    n, width, readers = dnc.config.slots, dnc.config.width, dnc.config.read_heads
    slots, words = range(n), range(width)
    memory = [[0.0] * width for _ in slots]
    link = [[0.0] * n for _ in slots]
    precedence, usage, write_w = [0.0] * n, [0.0] * n, [0.0] * n
    read_w = [[0.0] * n for _ in range(readers)]

    def oneplus(v: float) -> float:
        return 1 + float(torch.nn.functional.softplus(torch.tensor(v, dtype=torch.float64)))

    def content(key: list[float], strength: float) -> list[float]:
        def length(vector: list[float]) -> float:
            return (sum(v * v for v in vector) + EPS) ** 0.5

        cosines = [sum(key[w] * memory[i][w] for w in words) / (length(key) * length(memory[i])) for i in slots]
        return softmax([strength * c for c in cosines])

    values = []
    for token in x:
        xi = dnc.write_head(token).clamp(-dnc.config.clip, dnc.config.clip).tolist()
        key, strength = xi[:width], oneplus(xi[width])
        erase = [sigmoid(v) for v in xi[width + 1 : 2 * width + 1]]
        vector = xi[2 * width + 1 : 3 * width + 1]
        *free, allocate, gate = (sigmoid(v) for v in xi[3 * width + 1 :])

        retention = [1.0] * n
        for i in slots:
            for r in range(readers):
                retention[i] *= 1 - free[r] * read_w[r][i]
        usage = [(usage[i] + write_w[i] - usage[i] * write_w[i]) * retention[i] for i in slots]
        # Slots that were never written differ by less than rounding: they are taken in their order.
        free_list = sorted(slots, key=lambda i: round(usage[i] / ALIKE))
        product, allocated = 1.0, [0.0] * n
        for i in free_list:
            allocated[i] = (1 - usage[i]) * product
            product *= usage[i]
        similar = content(key, strength)
        write_w = [gate * (allocate * allocated[i] + (1 - allocate) * similar[i]) for i in slots]
        memory = [[memory[i][w] * (1 - write_w[i] * erase[w]) + write_w[i] * vector[w] for w in words] for i in slots]
        link = [
            [0.0 if i == j else (1 - write_w[i] - write_w[j]) * link[i][j] + write_w[i] * precedence[j] for j in slots]
            for i in slots
        ]
        precedence = [(1 - sum(write_w)) * precedence[i] + write_w[i] for i in slots]

        read = []
        for r, own in enumerate(dnc.read_heads(token).clamp(-dnc.config.clip, dnc.config.clip).chunk(readers)):
            head = own.tolist()
            modes = softmax(head[width + 1 :])
            similar = content(head[:width], oneplus(head[width]))
            forward = [sum(link[i][j] * read_w[r][j] for j in slots) for i in slots]
            backward = [sum(link[j][i] * read_w[r][j] for j in slots) for i in slots]
            read_w[r] = [modes[0] * backward[i] + modes[1] * similar[i] + modes[2] * forward[i] for i in slots]
            read += [sum(memory[i][w] * read_w[r][i] for i in slots) for w in words]
        values.append(dnc.out_proj(torch.tensor(read, dtype=x.dtype)))
    last = Slots(memory, link, precedence, usage, read_w, write_w)
    return torch.stack(values), {k: torch.tensor(v, dtype=x.dtype) for k, v in last._asdict().items()}


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_scan_is_the_papers_loop(settings, scale):
    dnc, x = make(scale, **settings), tokens()
    with torch.no_grad():
        scan = dnc.scan(x, dnc.init_state(2))
        rows = [paper(dnc, row) for row in x]
    assert scan.read.value.std() > 0.05
    torch.testing.assert_close(scan.read.value, torch.stack([y for y, _ in rows]), rtol=1e-9, atol=1e-9)
    for name, leaf in scan.state.leaves.items():
        torch.testing.assert_close(leaf, torch.stack([state[name] for _, state in rows]), rtol=1e-9, atol=1e-9)


def test_the_addresses_are_those_of_the_paper():
    """Nothing sums to more than 1, nothing links to itself, and a slot is free until it is written."""
    dnc, x = make(), tokens(3, 40)
    with torch.no_grad():
        state = dnc.scan(x, dnc.init_state(3)).state
    link = state["link"]
    assert (link >= 0).all() and (link.sum(-1) <= 1 + 1e-12).all() and (link.sum(-2) <= 1 + 1e-12).all()
    assert not link.diagonal(dim1=1, dim2=2).any()
    for name in ("precedence", "read_address", "write_address"):
        assert (state[name] >= 0).all() and (state[name].sum(-1) <= 1 + 1e-12).all(), name
    assert ((state["usage"] >= 0) & (state["usage"] <= 1)).all()


def test_allocation_takes_the_least_used_slot_and_the_first_of_equals():
    usage = torch.tensor([[0.5, 0.2, 1.0, 0.8], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    found = allocation(usage)
    expected = [[0.5 * 0.2, 0.8, 0.0, 0.2 * 0.2 * 0.5], [1.0, 0, 0, 0], [0.0, 0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    # Alike but for rounding.
    noisy = torch.full((1, 4), 0.3, dtype=torch.float64) + torch.tensor(
        [3e-16, 0.0, -2e-16, 1e-16], dtype=torch.float64
    )
    assert allocation(noisy)[0].argsort(descending=True).tolist() == [0, 1, 2, 3]


def loop(dnc: DNC, x: torch.Tensor, state: State, ctx: Context) -> tuple[torch.Tensor, State]:
    values = []
    for t in range(x.shape[1]):
        here, token = ctx.slice(t, t + 1), x[:, t : t + 1]
        state, _ = dnc.write(token, state, here)
        read, state = dnc.read(token, state, here)
        values.append(read.value)
    return torch.cat(values, 1), state


CONTEXTS = {
    "plain": {},
    "mask": {"mask": torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 1, 1, 1]]).bool()},
    "reset": {"reset": torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0, 0, 0, 0]]).bool()},
}
CONTEXTS["both"] = CONTEXTS["mask"] | CONTEXTS["reset"]


@pytest.mark.parametrize("context", CONTEXTS)
def test_scan_is_the_loop_of_writes_and_reads_with_the_same_gradients(context):
    dnc, x, ctx = make(), tokens(length=9).requires_grad_(), Context(**CONTEXTS[context])
    shown = ctx.mask if ctx.mask is not None else torch.ones(2, 9, dtype=torch.bool)
    results = []
    for run in (lambda s: dnc.scan(x, s, ctx), lambda s: loop(dnc, x, s, ctx)):
        out = run(dnc.init_state(2))
        value, state = out if isinstance(out, tuple) else (out.read.value, out.state)
        torch.manual_seed(2)
        loss = (value * torch.randn_like(value))[shown].sum()
        loss = loss + sum((leaf * torch.randn_like(leaf)).sum() for leaf in state.leaves.values())
        results.append([value[shown], *state.flat().values(), *torch.autograd.grad(loss, [x, *dnc.parameters()])])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)


def test_its_order_is_that_of_the_paper():
    assert make().capabilities == MemoryCapabilities(growth="constant", rollback="snapshot", order="write-read")
    dnc, x = make(), tokens()
    fast, plain = dnc.scan(x, dnc.init_state(2)), Memory.scan(dnc, x, dnc.init_state(2))
    torch.testing.assert_close(fast.read.value, plain.read.value, rtol=1e-10, atol=1e-10)


def test_padding_holds_the_state_even_with_large_weights():
    dnc, x = make(scale=6.0), tokens(1, 6)
    mask = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0]]).bool()
    spread = torch.full((1, 11, DIM), torch.nan, dtype=torch.float64)
    spread[mask] = x[0]
    out, alone = dnc.scan(spread, dnc.init_state(1), Context(mask=mask)), dnc.scan(x, dnc.init_state(1))
    torch.testing.assert_close(out.read.value[mask], alone.read.value[0], rtol=1e-12, atol=1e-12)
    for name, leaf in alone.state.flat().items():
        torch.testing.assert_close(out.state.flat()[name], leaf, rtol=1e-12, atol=1e-12)


def test_extreme_inputs_for_200_steps_stay_finite_forward_and_backward():
    torch.manual_seed(0)
    dnc = DNC(DNCConfig(slots=16, width=8), DIM)
    x = (1e4 * torch.randn(2, 200, DIM)).requires_grad_()
    out = dnc.scan(x, dnc.init_state(2))
    out.read.value.sum().backward()
    assert out.read.value.isfinite().all()
    assert all(leaf.isfinite().all() for leaf in out.state.leaves.values())
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in dnc.parameters())


def test_the_state_stays_in_float32_under_bfloat16():
    dnc = DNC(DNCConfig(slots=8, width=4), DIM).bfloat16()
    out = dnc.scan(torch.randn(2, 3, DIM).bfloat16(), dnc.init_state(2, dtype=torch.bfloat16))
    assert out.read.value.dtype == torch.bfloat16
    assert all(leaf.dtype == torch.float32 for leaf in out.state.leaves.values())


@pytest.mark.parametrize("mixer", ["attention", "mamba", "gated-deltanet"])
@pytest.mark.parametrize("attach", ["residual", "gate", "controller"])
def test_it_composes_streams_and_gives_every_parameter_a_gradient(mixer, attach):
    data = {"dim": 32, "mixer": mixer, "memory": "dnc", "attach": attach, "layers": 1}
    model = compose(data, {"dnc.slots": 6, "dnc.width": 4}, seed=0).double()
    x = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(3))
    whole = model(x).y
    state, parts = model.init_state(2), []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        out = model(x[:, start:stop], state=state)
        state = out.state
        parts.append(out.y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    (whole * torch.randn_like(whole)).sum().backward()
    for name, parameter in model.named_parameters():
        if "dnc" in name or "memory" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("setting", ["slots", "width", "read_heads"])
def test_sizes_below_one_are_refused(setting):
    with pytest.raises(ValidationError, match=f"{setting}\n.*greater than 0"):
        DNCConfig(**{setting: 0})
