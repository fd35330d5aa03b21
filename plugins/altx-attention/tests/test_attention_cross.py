"""A second sequence takes part in attention's softmax as if its keys stood beside the others, without positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from altx_attention.attention import Attention, build
from altx_attention.config import AttentionConfig, capabilities
from torch import Tensor

from altx.compose import compose
from altx.context import Context, Cross
from altx.errors import UnsupportedContext
from altx.spec import BuildContext
from altx.testing.case import agitate, difference

HEADS, WIDTH, LENGTH = 4, 4, 7


def layer(**settings: Any) -> Attention:
    torch.manual_seed(0)
    config = AttentionConfig(heads=HEADS, **settings)
    made = build(config, BuildContext(dim=16))
    made.capabilities = capabilities(config)
    agitate(made)
    return made.double()


def softmax(mixer: Attention, x: Tensor, tokens: Tensor, there: Tensor, *, window: int, causal: bool) -> Tensor:
    """Query by query and head by head, in an attention without positions; tokens, there (B, T, S, ...)."""
    rows = []
    for b in range(len(x)):
        for t in range(x.shape[1]):
            low, high = max(0, t - window + 1), t + 1 if causal else min(x.shape[1], t + window)
            seen = torch.cat([x[b, low:high], tokens[b, t][there[b, t]]])
            q = mixer.q_proj(x[b, t]).unflatten(-1, (HEADS, WIDTH))
            k, v = (project(seen).unflatten(-1, (-1, WIDTH)) for project in (mixer.k_proj, mixer.v_proj))
            k, v = (each.repeat_interleave(HEADS // each.shape[1], 1) for each in (k, v))
            if mixer.q_norm and mixer.k_norm:
                q, k = mixer.q_norm(q), mixer.k_norm(k)
            score = torch.einsum("hd,shd->hs", q, k) / WIDTH**0.5
            sink = torch.empty(HEADS, 0, dtype=x.dtype) if mixer.sinks is None else mixer.sinks[:, None]
            share = torch.cat([score, sink], 1).softmax(-1)[:, : len(seen)]
            rows.append(mixer.o_proj(torch.einsum("hs,shd->hd", share, v).flatten()))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("own", [False, True], ids=["one for all", "each token's own"])
@pytest.mark.parametrize(
    "settings", [{}, {"kv_heads": 2, "window": 3}, {"kv_heads": 1, "sinks": True}, {"qk_norm": "head"}], ids=str
)
def test_it_is_one_softmax_over_both(settings: dict[str, Any], own: bool, causal: bool) -> None:
    mixer, x = layer(rotary=False, **settings), torch.randn(2, LENGTH, 16, dtype=torch.float64)
    shape = (2, LENGTH, 3, 16) if own else (2, 5, 16)
    tokens = torch.randn(shape, dtype=torch.float64)
    mask = None if own else torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)
    wide = tokens if own else tokens[:, None].expand(-1, LENGTH, -1, -1)
    there = torch.ones(wide.shape[:3], dtype=torch.bool) if mask is None else mask[:, None].expand(-1, LENGTH, -1)
    wanted = softmax(mixer, x, wide, there, window=settings.get("window", LENGTH), causal=causal)
    if mask is not None:
        # What is not there may hold anything.
        tokens = tokens.masked_fill(~mask[..., None], torch.nan)
    assert difference(mixer(x, Context(causal=causal, cross=Cross(tokens, mask))).y, wanted) < 1e-12


def test_what_is_not_of_the_sequence_has_no_position_in_it() -> None:
    """With no slot but itself in view, only the second sequence could tell where a token stands."""
    mixer, tokens = layer(window=1), torch.randn(1, 4, 16, dtype=torch.float64)
    x = torch.randn(1, 1, 16, dtype=torch.float64).expand(1, 5, 16)
    y = mixer(x, Context(cross=Cross(tokens))).y
    assert difference(y, y[:, :1].expand_as(y)) < 1e-12
    assert difference(mixer(x, Context(cross=Cross(tokens.flip(1)))).y, y) < 1e-12
    assert difference(mixer(x).y, y) > 1e-3


def test_a_tokens_own_goes_with_it_through_masks_and_calls() -> None:
    mixer, x = layer(), torch.randn(2, LENGTH, 16, dtype=torch.float64)
    own = torch.randn(2, LENGTH, 2, 16, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    y = mixer(x, Context(mask=mask, cross=Cross(own))).y
    for b in range(2):
        real = mask[b]
        alone = mixer(x[b : b + 1, real], Context(cross=Cross(own[b : b + 1, real]))).y
        assert difference(y[b, real], alone[0]) < 1e-12
    state, pieces, start = mixer.init_state(2, dtype=torch.float64), [], 0
    for length in (1, 4, 2):
        part = slice(start, start + length)
        out = mixer(x[:, part], Context(mask=mask[:, part], cross=Cross(own[:, part])), state)
        state, start = out.state, start + length
        pieces.append(out.y)
    assert difference(torch.cat(pieces, 1)[mask], y[mask]) < 1e-12
    # Whatever a masked token has read stays out of gradients.
    hurt = own.masked_fill(~mask[..., None, None], torch.nan).requires_grad_()
    found = mixer(x, Context(mask=mask, cross=Cross(hurt))).y
    for gradient in torch.autograd.grad(found[mask].sum(), [*mixer.parameters()]):
        assert gradient.isfinite().all()


def test_a_model_takes_one_and_refuses_one_that_does_not_fit() -> None:
    config = {"dim": 16, "layers": 2, "mixer": "attention", "input": {"kind": "tokens", "vocab": 11}}
    model, x, tokens = compose(config, seed=0), torch.arange(6).view(2, 3), torch.randn(2, 4, 16)
    assert difference(model(x, Context(cross=Cross(tokens))).y, model(x).y) > 1e-3
    with pytest.raises(UnsupportedContext, match=r"ctx\.cross\.tokens must be \(2, any number, 16\); .* \(2, 4, 8"):
        model(x, Context(cross=Cross(tokens[..., :8])))
    with pytest.raises(UnsupportedContext, match=r"ctx\.cross\.mask must be \(2, 4\) bool; it is \(2, 3\) bool"):
        model(x, Context(cross=Cross(tokens, torch.ones(2, 3, dtype=torch.bool))))
    for changed in ({"mixer": "mamba"}, {"mixer": {"name": "attention", "softcap": 30.0}}, {"memory": "knn"}):
        with pytest.raises(UnsupportedContext, match=r"cannot honour ctx\.cross"):
            compose({**config, **changed}, seed=0)(x, Context(cross=Cross(tokens)))
