"""Titans and TTT from their papers' equations: token by token, weight by weight, gradients by autograd.

Nothing here is of altx_titans but configs, parameters and calls.
"""

import pytest
import torch
from altx_titans.config import TitansConfig, TTTConfig
from altx_titans.titans import Titans
from altx_titans.ttt import TTT
from pydantic import ValidationError
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from altx.context import Context

TITANS = [
    {"depth": 1, "residual_norm": False, "momentum": False},
    {"depth": 1, "order": "write-read", "max_grad_norm": 0.05},
    {"depth": 2, "expansion": 1.5, "chunk": 3, "dampening": False},
    {"depth": 2, "residual_norm": False, "order": "write-read", "qk_norm": "none", "activation": "none"},
    {"depth": 2, "expansion": 2.0, "max_grad_norm": None, "max_lr": 0.3, "momentum": False},
]  # fmt: skip
TTTS = [{"layers": 1}, {"layers": 2, "gate": True}, {"layers": 1, "chunk": 3}]


def titans(settings):
    torch.manual_seed(0)
    memory = Titans(TitansConfig(**{"heads": 2, "head_dim": 4, "chunk": 4} | settings), 8).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return memory


def ttt(settings):
    torch.manual_seed(0)
    memory = TTT(TTTConfig(**{"heads": 2, "chunk": 4} | settings), 8).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return memory


MEMORIES = [(titans, settings) for settings in TITANS] + [(ttt, settings) for settings in TTTS]
x = torch.randn(2, 11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def titans_of_the_paper(memory, tokens):
    """Equations (8) to (14) of one row (T, D), with |.|^2 as the mean over channels, and altx's bounds on a step."""
    c = memory.config
    d, values = 4, []

    def projected(linear, token):
        return linear(token).view(c.heads, d)

    def rate(linear, token):
        return torch.sigmoid(linear(token))

    for h in range(c.heads):
        first = [p[h].detach().clone() for p in memory.memory_model_parameters]

        def network(weights, k):
            scale, *matrices = weights if c.residual_norm else (None, *weights)
            y = k @ matrices[0]
            for matrix in matrices[1:]:
                y = F.gelu(y) @ matrix
            return F.layer_norm(y, (d,), eps=c.norm_eps) * (1 + scale) + k if c.residual_norm else y

        W, S, start, read = first, [torch.zeros_like(w) for w in first], first, []
        for t, token in enumerate(tokens):
            q, k, v = (projected(p, token)[h] for p in (memory.to_queries, memory.to_keys, memory.to_values))
            if c.qk_norm == "l2":
                q, k = q / q.norm(), k / k.norm()
            theta = memory.max_lr * rate(memory.to_adaptive_step, token)[h]
            alpha = rate(memory.to_decay_factor, token)[h]
            eta = rate(memory.to_momentum, token)[h] if c.momentum else torch.tensor(0.0)
            if c.momentum and c.dampening:
                theta = theta * (1 - eta)
            if c.order == "read-write":
                read.append(network(W, q))
            free = [w.detach().requires_grad_() for w in start]
            with torch.enable_grad():
                loss = (network(free, k.detach()) - v.detach()).square().mean()
                slopes = torch.autograd.grad(loss, free)
            if c.max_grad_norm is not None:
                slopes = [g * min(1.0, c.max_grad_norm / g.norm().item()) for g in slopes]
            S = [eta * s - theta * g for s, g in zip(S, slopes, strict=True)]
            W = [(1 - alpha) * w + s for w, s in zip(W, S, strict=True)]
            if c.order == "write-read":
                read.append(network(W, q))
            if (t + 1) % c.chunk == 0:
                start = W
        values.append(torch.stack(read))
    gates = memory.retrieve_gate(tokens)
    return memory.combine_heads(torch.cat([v * gates[:, h : h + 1] for h, v in enumerate(values)], 1))


def ttt_of_the_paper(memory, tokens):
    """Equations (1) to (6) and section 2.7 of one row (T, D): mini-batches, a step after every token of one."""
    c, heads, d = memory.config, memory.heads, 4
    first = [memory.W1, memory.b1] + ([memory.W2, memory.b2] if c.layers == 2 else [])

    def turned(row, place):
        pairs = row.view(heads, d // 2, 2)
        angles = torch.tensor([place * c.rope_theta ** (-2 * i / d) for i in range(d // 2)], dtype=row.dtype)
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angles), angles)).flatten(
            1
        )

    rows = []
    for h in range(heads):

        def network(weights, k, h=h):
            y = k @ weights[0] + weights[1][0]
            if c.layers == 2:
                y = F.gelu(y, approximate="tanh") @ weights[2] + weights[3][0]
            return k + F.layer_norm(y, (d,), memory.ttt_norm_weight[h], memory.ttt_norm_bias[h], eps=1e-6)

        W0, read = [w[h].detach() for w in first], []
        total = [torch.zeros_like(w) for w in W0]
        for t, token in enumerate(tokens):
            place = t % c.chunk
            k, q = (turned(p(token), place)[h].detach() for p in (memory.k_proj, memory.q_proj))
            v = memory.v_proj(token).view(heads, d)[h].detach()
            eta = torch.sigmoid(memory.learnable_ttt_lr_weight[h, 0] @ token + memory.learnable_ttt_lr_bias[h, 0])
            free = [w.detach().requires_grad_() for w in W0]
            with torch.enable_grad():
                slopes = torch.autograd.grad(0.5 * (network(free, k) - v).square().sum(), free)
            total = [a + c.base_lr / d * eta.detach() * g for a, g in zip(total, slopes, strict=True)]
            rate = max(0.0, 1 / (place + 1) + memory.learnable_token_idx[place].item())
            W = [w - rate * g for w, g in zip(W0, total, strict=True)]
            read.append(network(W, q))
            if place + 1 == c.chunk:
                W0, total = W, [torch.zeros_like(w) for w in W0]
        rows.append(torch.stack(read))
    y = memory.post_norm(torch.cat(rows, 1))
    return memory.o_proj(F.gelu(memory.g_proj(tokens), approximate="tanh") * y if c.gate else y)


@torch.no_grad()
@pytest.mark.parametrize(("build", "settings"), MEMORIES)
def test_scan_is_the_paper(build, settings):
    memory = build(settings)
    paper = titans_of_the_paper if build is titans else ttt_of_the_paper
    expected = torch.stack([paper(memory, row) for row in x])
    found = memory.scan(x, memory.init_state(2, dtype=torch.float64)).read.value
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def loop(memory, tokens, ctx=None):
    """Read and written one after another, in the order that the memory declares."""
    state, values = memory.init_state(len(tokens), dtype=torch.float64), []
    for t in range(tokens.shape[1]):
        token = tokens[:, t : t + 1]
        here = Context() if ctx is None else Context(mask=ctx.mask[:, t : t + 1], reset=ctx.reset[:, t : t + 1])
        if memory.capabilities.order == "write-read":
            state = memory.write(token, state, here)[0]
            values.append(memory.read(token, state, here)[0].value)
        else:
            values.append(memory.read(token, state, here)[0].value)
            state = memory.write(token, state, here)[0]
    return torch.cat(values, 1), state


def scanned(memory, tokens, ctx):
    found = memory.scan(tokens, memory.init_state(len(tokens), dtype=torch.float64), ctx)
    return found.read.value, found.state


@pytest.mark.parametrize(("build", "settings"), MEMORIES)
def test_gradients_of_scan_are_those_of_reads_and_writes(build, settings):
    memory = build(settings)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, 3], mask[1, 9:] = False, False
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[1, 5] = True
    found = []
    for call in (loop, scanned):
        tokens = x.clone().requires_grad_()
        value, state = call(memory, tokens, Context(mask=mask, reset=reset))
        loss = value.masked_fill(~mask[..., None], 0).square().sum()
        loss = loss + sum(leaf.sin().sum() for leaf in state.leaves.values() if leaf.is_floating_point())
        inputs = {"x": tokens, **dict(memory.named_parameters())}
        slopes = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        found.append({name: g for name, g in zip(inputs, slopes, strict=True) if g is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 8
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("build", "settings"), MEMORIES)
def test_inference_mode_gives_the_same(build, settings):
    memory = build(settings)
    expected = memory.scan(x, memory.init_state(2, dtype=torch.float64)).read.value
    with torch.inference_mode():
        found = memory.scan(x, memory.init_state(2, dtype=torch.float64))
        again = memory.scan(x, found.state).read.value
    assert torch.equal(found.read.value, expected)
    assert again.isfinite().all()


@pytest.mark.parametrize(("build", "settings"), MEMORIES)
def test_gradients_of_each_row_by_torch_func(build, settings):
    """vmap over grad: per-sample gradients, as differential privacy and influence functions take them."""
    memory = build(settings)
    parameters = {name: p.detach() for name, p in memory.named_parameters()}

    def loss(parameters, row):
        def value(module_parameters):
            bound = {f"memory.{name}": p for name, p in module_parameters.items()}
            return functional_call(Scanned(memory), bound, (row[None],)).square().sum()

        return value(parameters)

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(2):
        value = memory.scan(x[i : i + 1], memory.init_state(1, dtype=torch.float64)).read.value
        slopes = torch.autograd.grad(value.square().sum(), list(memory.parameters()), materialize_grads=True,
                                     allow_unused=True)  # fmt: skip
        for name, slope in zip(parameters, slopes, strict=True):
            torch.testing.assert_close(found[name][i], slope, rtol=1e-9, atol=1e-10)


class Scanned(torch.nn.Module):
    """A memory's scan from its fresh state as a module's forward pass."""

    def __init__(self, memory):
        super().__init__()
        self.memory = memory

    def forward(self, tokens):
        return self.memory.scan(tokens, self.memory.init_state(len(tokens), dtype=torch.float64)).read.value


@pytest.mark.parametrize(
    ("config", "dim", "says"),
    [
        (TitansConfig(heads=8), 8, "use 4 heads or fewer"),
        (TitansConfig(heads=1, head_dim=4, expansion=0.1), 8, "use 0.25 or more"),
        (TTTConfig(heads=3), 8, "use 1, 2, 4 heads"),
        (TTTConfig(), 7, "use an even dim"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(config, dim, says):
    with pytest.raises(ValueError, match=says):
        config.fit(dim)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (TitansConfig, "heads", 0), (TitansConfig, "depth", 3), (TitansConfig, "chunk", 0),
        (TitansConfig, "max_lr", 0.0), (TitansConfig, "max_grad_norm", 0.0),
        (TitansConfig, "norm_eps", 0.0), (TitansConfig, "order", "both"),
        (TTTConfig, "layers", 3), (TTTConfig, "chunk", 0), (TTTConfig, "base_lr", -1.0), (TTTConfig, "heads", 0),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused_by_name(config, field, value):
    with pytest.raises(ValidationError, match=field):
        config(**{field: value})
