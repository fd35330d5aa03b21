"""What a memory holds takes part in attention's softmax as if its keys stood beside the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from altx_attention.attention import Attention, build
from altx_attention.config import AttentionConfig, capabilities
from torch import Tensor

from altx.attach import KVAttach
from altx.context import Context
from altx.memory import Attended, attended
from altx.spec import BuildContext
from altx.testing.case import agitate, difference
from altx.testing.partners import Ledger


def layer(**settings: Any) -> Attention:
    torch.manual_seed(0)
    config = AttentionConfig(**settings)
    made = build(config, BuildContext(dim=16))
    made.capabilities = capabilities(config)
    agitate(made)
    return made.double()


@pytest.mark.parametrize("length", [5, 40], ids=["few", "many"])
@pytest.mark.parametrize(
    "settings", [{}, {"kv_heads": 2}, {"kv_heads": 1, "sinks": True, "gate": True}, {"qk_norm": "head", "scale": 0.7}],
    ids=str,
)  # fmt: skip
def test_a_window_of_one_and_a_memory_of_all_is_attention_to_all(settings: dict[str, Any], length: int) -> None:
    near, whole = (layer(**settings, rotary=False, window=window) for window in (1, None))
    whole.load_state_dict(near.state_dict())
    assert near.hands
    x = torch.randn(2, length, 16, dtype=torch.float64)
    assert difference(KVAttach(near, Ledger(near.hands))(x).y, whole(x).y) < 1e-12


def test_keys_of_a_memory_have_no_positions_and_those_of_the_layer_do() -> None:
    """One softmax over rotated local keys and over keys as they were projected, head by head."""
    mixer, x = layer(kv_heads=2, window=3), torch.randn(2, 6, 16, dtype=torch.float64)
    held = torch.randn(2, 5, 2, 4, dtype=torch.float64), torch.randn(2, 5, 2, 4, dtype=torch.float64)
    asked: list[Tensor] = []

    def recall(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Attended:
        asked.extend((q, k, v))
        return attended(q, held[0][:, None], held[1][:, None])

    y = mixer(x, Context(recall=recall)).y
    q, k, v = (proj(x).unflatten(-1, (-1, 4)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    for given, wanted in zip(asked, (q / 2, k, v), strict=True):
        assert difference(given, wanted) < 1e-12
    (turned_q, *_), leaves, _ = mixer.project(x, torch.arange(6)[None])
    heads = torch.zeros(2, 6, 4, 4, dtype=torch.float64)
    for t in range(6):
        for h in range(4):
            near = leaves["k"][:, max(0, t - 2) : t + 1, h // 2] @ turned_q[:, t, h, :, None] / 2
            far = held[0][:, :, h // 2] @ q[:, t, h, :, None] / 2
            share = torch.cat([near, far], 1).softmax(1)
            values = torch.cat([v[:, max(0, t - 2) : t + 1, h // 2], held[1][:, :, h // 2]], 1)
            heads[:, t, h] = (share * values).sum(1)
    assert difference(y, mixer.o_proj(heads.flatten(2))) < 1e-12


@pytest.mark.parametrize("sinks", [False, True])
def test_a_gate_of_the_memory_mixes_the_two(sinks: bool) -> None:
    mixer, x = layer(kv_heads=2, sinks=sinks), torch.randn(2, 6, 16, dtype=torch.float64)
    far, share = torch.randn(2, 6, 4, 4, dtype=torch.float64), torch.rand(2, 6, 4, dtype=torch.float64)

    def recall(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Attended:
        return Attended(far, q[..., 0], share)

    near = torch.linalg.solve(mixer.o_proj.weight, mixer(x).y.mT).mT.unflatten(-1, (4, 4))
    wanted = share[..., None] * far + (1 - share[..., None]) * near
    assert difference(mixer(x, Context(recall=recall)).y, mixer.o_proj(wanted.flatten(2))) < 1e-10


def test_an_empty_memory_changes_nothing_and_takes_gradients() -> None:
    mixer, x = layer(), torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)

    def recall(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Attended:
        return attended(q, k[:, None, :0], v[:, None, :0])

    y = mixer(x, Context(recall=recall)).y
    assert difference(y, mixer(x).y) < 1e-12
    y.square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [4, 24])
def test_half_precision(dtype: torch.dtype, length: int) -> None:
    mixer = layer(kv_heads=2, window=2)
    assert mixer.hands
    attached, x = KVAttach(mixer, Ledger(mixer.hands)), torch.randn(2, length, 16)
    wanted = attached(x.double()).y
    attached.to(dtype)
    assert difference(attached(x.to(dtype)).y.double(), wanted) < 0.05


def test_a_memory_is_told_which_tokens_are_real_in_the_order_in_which_it_is_asked() -> None:
    mask = torch.tensor([[False, True, False, True]])
    seen: list[Context] = []

    def recall(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Attended:
        seen.append(ctx)
        return attended(q, k[:, None], v[:, None])

    reset = torch.tensor([[True, False, True, True]])
    layer()(torch.randn(1, 4, 16).double(), Context(mask=mask, reset=reset, recall=recall))
    assert seen[0].mask is not None and seen[0].mask.tolist() == [[True, True, False, False]]
    assert seen[0].reset is not None and seen[0].reset.tolist() == [[False, True, False, False]]
    assert seen[0].recall is None


def test_what_a_soft_cap_would_bend_is_refused() -> None:
    assert capabilities(AttentionConfig()).accepts_kv
    assert not capabilities(AttentionConfig(softcap=3.0)).accepts_kv
