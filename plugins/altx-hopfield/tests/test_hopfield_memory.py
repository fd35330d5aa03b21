"""`hopfield` against its authors' code and the paper's equations; in models; and what is refused.

hopfield_upstream_values.safetensors was made by ml-jku/hopfield-layers at commit
f56f929c95b77a070ae675ea4f56b6d54d36e730, `HopfieldLayer` in float64 on a CPU, torch.manual_seed(3), every parameter 1.5
times its first value and 0.4 times a normal number, inputs normal, and 1e-300 as the threshold below which a head's
updates stop: that looks at all tokens at once, so it is not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from altx_hopfield.config import HopfieldConfig
from altx_hopfield.hopfield import Hopfield
from safetensors.torch import load_file
from torch.nn import functional as F

from altx.compose import compose
from altx.errors import AltxError

CASES: dict[str, dict[str, Any]] = {
    "plain": {"patterns": 7},
    "heads": {"patterns": 9, "heads": 3, "head_dim": 5, "separate_values": True, "updates": 3, "beta": 0.7},
    "unbiased": {"patterns": 5, "heads": 2, "bias": False, "beta": 2.0, "updates": 5},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_authors_code_agrees(case: str, dtype: torch.dtype, within: float, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = load_file(Path(__file__).with_name("hopfield_upstream_values.safetensors"))
    named = {name.rpartition("/")[2]: t.to(dtype) for name, t in stored.items() if name.startswith(f"{case}/")}
    x, wanted = named.pop("x"), named.pop("y")
    memory = Hopfield(HopfieldConfig(**CASES[case]), x.shape[-1]).to(dtype)
    memory.load_state_dict(
        {name.removeprefix("hopfield.").removeprefix("association_core."): t for name, t in named.items()}
    )
    for few in (False, True):
        # In both orders of the products.
        monkeypatch.setattr(memory, "_few_are", lambda tokens, few=few: few)
        torch.testing.assert_close(memory.look_up(x), wanted, rtol=0, atol=within)


@torch.no_grad()
def test_the_papers_equations() -> None:
    torch.manual_seed(0)
    memory = Hopfield(HopfieldConfig(patterns=5, heads=2, updates=4, beta=1.3, separate_values=True), 6).double()
    for parameter in memory.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))

    def normed(rows: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
        return F.layer_norm(rows, (6,), norm.weight, norm.bias)

    assert memory.in_proj_bias is not None and memory.target_weights is not None
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    for token, y in zip(x[0], memory.look_up(x)[0], strict=True):
        found = []
        for h in range(2):
            rows = [slice(6 * part + 3 * h, 6 * part + 3 * h + 3) for part in range(3)]
            w_q, w_k, w_v = (memory.in_proj_weight[r] for r in rows)
            b_q, b_k, b_v = (memory.in_proj_bias[r] for r in rows)
            state = w_q @ normed(token, memory.norm_state_pattern) + b_q
            keys = torch.stack([w_k @ normed(p, memory.norm_stored_pattern) + b_k for p in memory.lookup_weights[0]])
            values = [w_v @ normed(p, memory.norm_pattern_projection) + b_v for p in memory.target_weights[0]]
            for _ in range(3):
                state = keys.T @ torch.softmax(1.3 * keys @ state, 0)
            shares = torch.softmax(1.3 * keys @ state, 0)
            found.append(sum(share * value for share, value in zip(shares, values, strict=True)))
        torch.testing.assert_close(y, memory.out_proj(torch.cat(found)), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_high_beta_brings_a_single_pattern_back() -> None:
    """Section 2: with patterns far enough from each other one update retrieves the nearest."""
    torch.manual_seed(0)
    memory = Hopfield(HopfieldConfig(patterns=4, beta=200.0, bias=False), 16).double()
    eye = torch.eye(16, dtype=torch.float64)
    memory.in_proj_weight.copy_(eye.repeat(3, 1))
    memory.out_proj.weight.copy_(eye)
    patterns = F.layer_norm(memory.lookup_weights[0], (16,))
    noisy = patterns + 0.1 * torch.randn_like(patterns)
    torch.testing.assert_close(memory.look_up(noisy[None])[0], patterns, rtol=0, atol=1e-3)


@pytest.mark.parametrize("mode", [None, "ffn"])
def test_joins_a_mixer_or_takes_the_feed_forwards_place(mode: str | None) -> None:
    recipe: dict[str, Any] = {"mixer": "2*attention", "dim": 16, "feed_forward": "mlp"}
    model = compose(recipe | {"memory": {"name": "hopfield", "patterns": 5}} | ({"attach": mode} if mode else {}))
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("Hopfield") == 2 and kinds.count("ResidualAttach") == (0 if mode else 2)
    assert kinds.count("MLP") == (0 if mode else 2)


@pytest.mark.parametrize("dim", [16, 32, 64, 768])
def test_defaults_fit_any_width(dim: int) -> None:
    memory = Hopfield(HopfieldConfig(), dim)
    assert memory.lookup_weights.shape == (1, 256, dim) and memory.in_proj_weight.shape == (3 * dim, dim)


def test_a_token_by_itself_projects_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Hopfield(HopfieldConfig(), 64)
    monkeypatch.setattr(memory, "_many", None)
    memory.look_up(torch.randn(1, 1, 64))
    assert not memory._few_are(1000)


@torch.no_grad()
def test_first_weights_are_as_published() -> None:
    torch.manual_seed(0)
    memory = Hopfield(HopfieldConfig(separate_values=True), 64)
    assert memory.target_weights is not None and memory.in_proj_bias is not None
    for weight in (memory.lookup_weights, memory.target_weights, memory.in_proj_weight, memory.out_proj.weight):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    assert not memory.in_proj_bias.any() and not memory.out_proj.bias.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "3 heads do not divide the width; use a divisor of 16, or give head_dim"),
        ({"patterns": 0}, "patterns"),
        ({"updates": 0}, "updates"),
        ({"beta": 0.0}, "beta"),
        ({"head_dim": 0}, "head_dim"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AltxError, match=message):
        compose({"mixer": "attention", "dim": 16, "memory": {"name": "hopfield", **settings}})
