"""Performer equals the paper's equations, written as loops, and performer-pytorch with the same weights."""

from __future__ import annotations

import itertools
import math
import warnings
from functools import partial

import pytest
import torch
from altx_performer import favor
from altx_performer.config import PerformerConfig
from altx_performer.features import draw
from altx_performer.performer import Performer, build
from torch import Tensor

from altx import pieces
from altx.context import Context
from altx.spec import BuildContext
from altx_kernels.linear_recurrence import linear_recurrence

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = pytest.importorskip("performer_pytorch.performer_pytorch")

SHAPES = [
    {"heads": 2, "head_dim": 8},
    {"heads": 3, "head_dim": 5, "features": 21, "qkv_bias": True, "out_bias": False},
    {"heads": 1, "head_dim": 16, "features": 7, "feature_norm": "constant"},
]
SETTINGS = [shape | {"kernel": kernel} for shape in SHAPES for kernel in ("softmax", "relu")]


def make(dim: int = 16, scale: float = 0.6, dtype: torch.dtype = torch.float64, **settings: object) -> Performer:
    torch.manual_seed(0)
    layer = build(PerformerConfig(**settings), BuildContext(dim=dim)).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return layer


def equations(layer: Performer, x: Tensor, sees: list[list[int]]) -> Tensor:
    """Equations 4 and 5 for one row x (T, dim), in which token t looks at the tokens `sees[t]`."""
    W, d = layer.fast_attention.projection_matrix, layer.head_dim
    q, k, v = (p(x).unflatten(-1, (layer.heads, d)) for p in (layer.to_q, layer.to_k, layer.to_v))

    def f(u: Tensor) -> Tensor:
        u = u / d**0.25
        if layer.kernel == "relu":
            return torch.stack([max(w @ u, u.new_zeros(())) + layer.relu_eps for w in W])
        return torch.stack([torch.exp(w @ u - u @ u / 2) for w in W]) / math.sqrt(len(W))

    rows = []
    for t, visible in enumerate(sees):
        heads = []
        for h in range(layer.heads):
            weights = torch.stack([f(q[t, h]) @ f(k[s, h]) for s in visible])
            heads.append(sum(w * v[s, h] for w, s in zip(weights / weights.sum(), visible, strict=True)))
        rows.append(torch.cat(heads))
    return layer.to_out(torch.stack(rows))


def seen_by(causal: bool, length: int, starts: tuple[int, ...] = ()) -> list[list[int]]:
    def same(i: int, j: int) -> bool:
        return sum(s <= i for s in starts) == sum(s <= j for s in starts)

    return [[j for j in range(length) if same(i, j) and (j <= i or not causal)] for i in range(length)]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_equals_the_equations(settings: dict, causal: bool) -> None:
    layer, x = make(**settings), torch.randn(2, 11, 16, dtype=torch.float64)
    expected = torch.stack([equations(layer, row, seen_by(causal, 11)) for row in x])
    torch.testing.assert_close(layer(x, Context(causal=causal)).y, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@torch.no_grad()
def test_a_masked_batch_with_resets_equals_the_equations_on_its_real_tokens(kernel: str, causal: bool) -> None:
    layer, x = make(kernel=kernel), torch.randn(4, 13, 16, dtype=torch.float64)
    mask, reset = torch.rand(4, 13) < 0.7, torch.rand(4, 13) < 0.3
    mask[3] = False
    x[~mask] = torch.nan
    y = layer(x, Context(causal=causal, mask=mask, reset=reset)).y
    assert y.isfinite().all()
    for b in range(3):
        starts = tuple(reset[b, mask[b]].nonzero().flatten().tolist())
        expected = equations(layer, x[b, mask[b]], seen_by(causal, int(mask[b].sum()), starts))
        torch.testing.assert_close(y[b, mask[b]], expected, atol=1e-11, rtol=0)


def peer(
    layer: Performer, dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch, eps: bool = False
) -> torch.nn.Module:
    """Their layer with our weights. Their epsilons, which the paper has not, are left out unless `eps`."""
    if not eps:
        monkeypatch.setattr(theirs, "softmax_kernel", partial(theirs.softmax_kernel, eps=0.0))
        monkeypatch.setattr(
            theirs, "causal_linear_attention_noncuda", partial(theirs.causal_linear_attention_noncuda, eps=0.0)
        )
    other = theirs.SelfAttention(
        dim, causal=causal, heads=layer.heads, dim_head=layer.head_dim,
        nb_features=len(layer.fast_attention.projection_matrix), generalized_attention=layer.kernel == "relu",
        qkv_bias=layer.to_q.bias is not None, attn_out_bias=layer.to_out.bias is not None,
    )  # fmt: skip
    other = other.to(layer.to_q.weight.dtype)
    other.load_state_dict(layer.state_dict())  # the same names and shapes
    return other


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize(("dim", "heads", "length"), [(16, 2, 9), (48, 3, 40), (64, 8, 130)])
def test_equals_performer_pytorch(
    dim: int, heads: int, length: int, kernel: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(dim, scale=1.2 / dim**0.5, heads=heads, kernel=kernel)
    other, x = peer(layer, dim, causal, monkeypatch), torch.randn(2, length, dim, dtype=torch.float64)
    ours, ctx = layer(x, Context(causal=causal)).y, Context(causal=causal)
    torch.testing.assert_close(ours, other(x), atol=1e-8, rtol=0)
    weights = torch.randn(ours.shape, dtype=torch.float64)
    (ours * weights).sum().backward()
    (other(x) * weights).sum().backward()
    for name, parameter in other.named_parameters():
        mine = layer.get_parameter(name).grad
        torch.testing.assert_close(mine, parameter.grad, atol=1e-8 * float(parameter.grad.abs().max()), rtol=1e-8)
    with torch.no_grad():
        single = layer.float()(x.float(), ctx).y
        torch.testing.assert_close(single.double(), other(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@torch.no_grad()
def test_their_epsilons_are_all_the_difference(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They add 1e-4 to every feature, in units of the largest of the whole sequence: later tokens included."""
    torch.manual_seed(0)
    layer = build(PerformerConfig(heads=2), BuildContext(dim=32)).double()
    x = torch.randn(2, 64, 32, dtype=torch.float64)
    other = peer(layer, 32, causal, monkeypatch, eps=True)
    torch.testing.assert_close(layer(x, Context(causal=causal)).y, other(x), atol=1e-2, rtol=0)


@torch.no_grad()
def test_converges_to_softmax_attention() -> None:
    """Root mean square errors over draws fall as 1 / sqrt(F)."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 12, 2, 8, dtype=torch.float64) for _ in range(3))
    q, k = 0.5 * q, 0.5 * k
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 8**0.5
    for causal in (True, False):
        hidden = torch.ones(12, 12).triu(1).bool() if causal else torch.zeros(12, 12).bool()
        exact = torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        errors = []
        for count in (32, 512, 8192):
            found = []
            for seed in range(8):
                features = favor_features(count, 8, seed)
                found.append(attend(q, k, v, features, causal))
            errors.append(float((torch.stack(found) - exact).square().mean().sqrt()))
        assert errors[1] < errors[0] / 2.5 and errors[2] < errors[1] / 2.5  # 1 / 4, but for chance
        assert errors[2] < 0.02


def attend(q: Tensor, k: Tensor, v: Tensor, features: Tensor, causal: bool) -> Tensor:
    if not causal:
        q, k, u = map(favor.heads_as_rows, (q, k, v))
        y = favor.summed(*favor.whole_features(q, k, features, None), u)
        return y.unflatten(0, (len(v), -1)).transpose(1, 2)
    qf, kf, decay, _ = favor.causal_features(q, k, features, None, None, None)
    return favor.divided(linear_recurrence(qf, kf, favor.with_ones(v), decay)[0])


def favor_features(count: int, width: int, seed: int) -> Tensor:
    return draw(count, width, "gaussian", torch.Generator().manual_seed(seed))


def test_the_kernel_estimate_is_unbiased() -> None:
    """The mean of f(q).f(k) over many draws is exp(q.k), within 4 standard errors."""
    torch.manual_seed(1)
    q, k = 0.5 * torch.randn(5, 4, dtype=torch.float64), 0.5 * torch.randn(5, 4, dtype=torch.float64)
    estimates = []
    for seed in range(3000):
        W = favor_features(4, 4, seed)
        f = [torch.exp(u @ W.T - u.square().sum(-1, keepdim=True) / 2) / 2 for u in (q, k)]
        estimates.append((f[0] * f[1]).sum(-1))
    found = torch.stack(estimates)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - (q * k).sum(-1).exp()).abs() < 4 * error).all()
    # And smaller by orthogonality than of independent features (theorem 2).
    independent = torch.randn(3000, 4, 4, dtype=torch.float64)
    f = [torch.exp(independent @ u.T - u.square().sum(-1) / 2) / 2 for u in (q, k)]
    assert (found.var(0) < (f[0] * f[1]).sum(1).var(0)).double().mean() > 0.5


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_norms_of_any_size_neither_overflow_nor_vanish(size: float, dtype: torch.dtype) -> None:
    """exp(|x|^2) of these is up to exp(1e6): the ratio of the sums is computed from logarithms here."""
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 20, 2, 8, dtype=torch.float64) for _ in range(3))
    # Keys and queries point away from each other, the worst case; and some keys are tiny among huge ones.
    q, k = size * q, size * (0.1 * k - q)
    k[:, ::3] *= 1e-3
    features = favor_features(16, 8, 0)
    a = torch.einsum("bthd,fd->bthf", q, features) / 8**0.25
    b = torch.einsum("bthd,fd->bthf", k, features) / 8**0.25 - k.square().sum(-1, keepdim=True) / (2 * 8**0.5)
    logits = torch.logsumexp(a[:, :, None] + b[:, None], -1)  # (B, T, S, H)
    future = torch.ones(20, 20).triu(1).bool()[None, :, :, None]
    expected = torch.einsum("btsh,bshd->bthd", logits.masked_fill(future, -torch.inf).softmax(2), v)
    single = [t.to(dtype) for t in (q, k, v, features)]
    y = attend(*single, causal=True)
    assert y.isfinite().all()
    assert (y <= v.cummax(1).values + 1e-4).all()  # an average of the values so far
    both = attend(*single, causal=False)
    assert both.isfinite().all()
    if dtype == torch.float64 or size == 1:
        bound = 1e-8 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(y.double(), expected, atol=bound, rtol=0)
        everywhere = torch.einsum("btsh,bshd->bthd", logits.softmax(2), v)
        torch.testing.assert_close(both.double(), everywhere, atol=bound, rtol=0)


@torch.no_grad()
def test_a_huge_key_changes_nothing_before_it() -> None:
    """Bit by bit: what is subtracted from exponents must not come from later tokens, nor leave anything behind."""
    layer = make(dtype=torch.float32)
    x = torch.randn(1, 40, 16)
    y = layer(x).y
    x[:, 25] *= 1e4
    assert torch.equal(layer(x).y[:, :25], y[:, :25])
    assert layer(x).y.isfinite().all()


@torch.no_grad()
def test_streams_exactly_from_any_cut_also_where_norms_grow_and_shrink() -> None:
    layer = make()
    x = torch.randn(2, 24, 16, dtype=torch.float64) * torch.linspace(-4, 4, 24, dtype=torch.float64)[None, :, None]
    whole = layer(x).y
    for cuts in ([0, 1, 2, 24], [0, 7, 8, 19, 24], list(range(25))):
        state, outputs = layer.init_state(2), []
        for start, stop in itertools.pairwise(cuts):
            out = layer(x[:, start:stop], Context(), state)
            state, outputs = out.state, [*outputs, out.y]
        torch.testing.assert_close(torch.cat(outputs, 1), whole, atol=1e-11, rtol=0)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@torch.no_grad()
def test_a_long_sequence_in_pieces_equals_the_whole(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(kernel=kernel), torch.randn(2, 23, 16, dtype=torch.float64)
    ctx = Context(mask=torch.rand(2, 23) < 0.7, reset=torch.rand(2, 23) < 0.2)
    whole = layer(x, ctx, layer.init_state(2))
    monkeypatch.setattr(pieces, "TOKENS", 10)
    monkeypatch.setattr(pieces, "SHORTEST", 3)
    found = layer(x, ctx, layer.init_state(2))
    torch.testing.assert_close(found.y[ctx.mask], whole.y[ctx.mask], atol=1e-12, rtol=0)
    for name, leaf in whole.state.flat().items():
        torch.testing.assert_close(found.state.flat()[name], leaf, atol=1e-12, rtol=0)
