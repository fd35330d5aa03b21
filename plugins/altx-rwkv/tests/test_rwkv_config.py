"""Settings, what is refused, what the optimizer is told, and what a token costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from altx_rwkv.config import RWKV5ChannelConfig, RWKV7Config
from torch.utils.flop_counter import FlopCounterMode

from altx import registry
from altx.compose import compose
from altx.errors import AltxError
from altx.optim import optimizer_groups

VERSIONS = (4, 5, 6, 7)


def model(version: int, **data: Any) -> Any:
    return compose(
        {"dim": 32, "layers": 2, "mixer": f"rwkv{version}", "feed_forward": f"rwkv{version}-channel", **data}, seed=0
    )


@pytest.mark.parametrize(("dim", "heads"), [(16, 1), (24, 3), (32, 1), (64, 1), (96, 3), (768, 12), (2560, 40)])
def test_heads_are_as_published_or_as_wide_as_fits(dim: int, heads: int) -> None:
    assert RWKV7Config().heads(dim) == heads


def test_sizes_are_those_of_published_models() -> None:
    # RWKV-7 World 0.1B and 2.9B; RWKV-5 World 7B and 0.1B.
    assert RWKV7Config().ranks(768) == {"decay_rank": 64, "iclr_rank": 64, "value_rank": 32, "gate_rank": 128}
    assert RWKV7Config().ranks(2560) == {"decay_rank": 96, "iclr_rank": 96, "value_rank": 64, "gate_rank": 320}
    assert RWKV5ChannelConfig().width(4096) == 14336 and RWKV5ChannelConfig().width(768) == 2688


REFUSED = [
    (
        {"mixer": [{"name": "rwkv5", "head_dim": 12}]},
        "dim 32 is not divisible by head_dim 12; use head_dim 4, or dim 36",
    ),
    ({"mixer": [{"name": "rwkv6", "head_dim": 0}]}, "greater than 0"),
    ({"mixer": [{"name": "rwkv7", "gate_rank": "big"}]}, "gate_rank"),
    ({"mixer": [{"name": "rwkv4", "heads": 4}]}, "heads: unknown key"),
    ({"mixer": [{"name": "rwkv6", "mix_rnk": 4}]}, "did you mean 'mix_rank'"),
    ({"mixer": "rwkv4", "feed_forward": [{"name": "rwkv4-channel", "hidden": 0}]}, "greater than 0"),
    ({"mixer": "rwkv8"}, "did you mean 'rwkv7'"),
    ({"mixer": "rwkv"}, "did you mean 'rwkv7'"),
    ({"mixer": "rwkv4-channel"}, "rwkv4-channel"),
    ({"mixer": "rwkv4", "feed_forward": "rwkv4"}, "rwkv4"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_what_cannot_be_is_refused_in_words(data: dict[str, Any], message: str) -> None:
    with pytest.raises(AltxError) as caught:
        compose({"dim": 32, "layers": 1, **data})
    assert message in f"{caught.value} {caught.value.hint or ''}"


@pytest.mark.parametrize("version", VERSIONS)
def test_rates_and_decay_are_those_of_the_authors_training_code(version: int) -> None:
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer_groups(model(version), lr=1.0, weight_decay=0.1)
        for name in group["names"]
    }
    scales = {"time_decay": 2.0, "time_first": 3.0, "w0": 2.0}
    for name, (lr, decay) in found.items():
        if "layers.0.body" in name or "layers.1.body" in name:
            last = name.rpartition(".")[2]
            matrix = last == "weight" and "ln_x" not in name
            assert (lr, decay) == (scales.get(last, 1.0), 0.1 if matrix else 0.0), name
    expected = {4: {2.0, 3.0}, 5: {2.0}, 6: {2.0}, 7: {2.0}}[version]
    assert {lr for lr, _ in found.values()} == {1.0} | expected


@pytest.mark.parametrize("version", VERSIONS)
def test_a_token_costs_the_same_and_a_state_weighs_the_same_however_many_went_before(version: int) -> None:
    one = model(version).eval()
    costs, sizes = [], []
    with torch.no_grad():
        state = one.init_state(1)
        for length in (10, 3000):
            state = one(torch.randint(256, (1, length)), state=state).state
            with FlopCounterMode(display=False) as counter:
                out = one(torch.zeros(1, 1, dtype=torch.int64), state=state)
            costs.append(counter.get_total_flops())
            sizes.append(out.state.bytes())
    assert costs[0] == costs[1] > 0 and sizes[0] == sizes[1]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_run_forward_and_backward(version: int, dtype: torch.dtype) -> None:
    tokens = torch.randint(256, (2, 12))
    half = model(version).to(dtype)
    state = half.init_state(2)
    out = half(tokens, state=state)
    assert out.y.isfinite().all()
    wide = [name for name, leaf in out.state.flat().items() if name.endswith(("wkv", "kv"))]
    assert wide and all(out.state.flat()[name].dtype == torch.float32 for name in wide)
    out.y.float().square().mean().backward()
    whole = model(version)
    with torch.autocast("cpu", dtype=dtype):
        whole(tokens).y.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in whole.parameters())


def test_every_component_says_what_it_is() -> None:
    found = [c for c in registry.default().components() if c.qualified.startswith("altx-rwkv:")]
    assert {c.name for c in found} == {f"rwkv{v}{part}" for v in VERSIONS for part in ("", "-channel")}
    for component in found:
        assert 3 <= len(component.spec.description.splitlines()) <= 8 and "arXiv" in component.spec.paper
        assert max(map(len, component.spec.description.splitlines())) <= 110
