"""In models: in the feed-forward's place, with values that layers share, at any width, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from altx_product_key.config import MemoryLayerConfig, ProductKeyConfig
from altx_product_key.memory_layer import MemoryLayer
from altx_product_key.product_key import ProductKey

from altx import checkpoint, recipe, registry
from altx.compose import build, compose
from altx.errors import AltxError
from altx.memory import Lookup
from altx.optim import optimizer_groups
from altx.resolve import resolve
from altx.testing import prove

SMALL = {"keys": 8, "topk": 4, "heads": 2, "key_dim": 4}


def model(name: str = "memory-layer", layers: int = 3, dim: int = 16, mixer: str = "attention", **settings: Any):
    return compose(
        {
            "mixer": f"{layers}*{mixer}",
            "dim": dim,
            "memory": {"name": name, **SMALL, **settings},
            "feed_forward": "mlp",
        },
        seed=1,
    )


def memories(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Lookup)]


@pytest.mark.parametrize("name", ["product-key", "memory-layer"])
def test_takes_the_feed_forwards_place(name: str) -> None:
    built = model(name, layers=2)
    assert len(memories(built)) == 2 and not [m for m in built.modules() if type(m).__name__ == "MLP"]
    assert all(result.status != "failed" for result in prove(built))


def test_layers_share_one_table() -> None:
    built = model()
    first, *later = memories(built)
    assert all(layer.table is first.values and layer.values is None for layer in later)
    assert sum("values" in name for name, _ in built.named_parameters()) == 1
    assert sum("values" in name for name in built.state_dict()) == 1
    twin = copy.deepcopy(built)
    assert len({id(layer.table) for layer in memories(twin)} | {id(first.table)}) == 2
    later[-1].look_up(torch.randn(2, 5, 16)).sum().backward()
    assert float(first.values.weight.grad.abs().sum()) > 0


def test_shared_values_survive_a_checkpoint(tmp_path: Path) -> None:
    built = model().eval()
    with torch.no_grad():
        memories(built)[0].values.weight.mul_(3)
    checkpoint.save(built, tmp_path / "saved")
    loaded = checkpoint.load(tmp_path / "saved").eval()
    assert len({id(layer.table.weight) for layer in memories(loaded)}) == 1
    x = torch.randint(11, (2, 7))
    assert torch.equal(loaded(x).y, built(x).y)


@pytest.mark.parametrize("change", [{"share_values": False}, {"keys": 9}, {"value_dim": 8}])
def test_layers_that_differ_or_do_not_share_have_values_of_their_own(change: dict[str, Any]) -> None:
    blocks = [
        {"sublayers": [{"memory": {"name": "memory-layer", **SMALL, **settings}}]} for settings in (change, {}, change)
    ]
    tables = [layer.table for layer in memories(compose({"dim": 16, "blocks": blocks}))]
    assert tables[0] is not tables[1] and tables[1] is not tables[2]
    assert (tables[0] is tables[2]) == ("share_values" not in change)


def test_two_models_share_nothing() -> None:
    assert memories(model())[0].table is not memories(model())[0].table


@pytest.mark.parametrize(("name", "decay"), [("product-key", 0.0), ("memory-layer", 0.1)])
@pytest.mark.parametrize(("rate", "wanted"), [({}, 1e-3), ({"value_lr": 0.02}, 0.02), ({"value_lr": None}, 0.5)])
def test_values_have_a_learning_rate_of_their_own(name: str, decay: float, rate: dict, wanted: float) -> None:
    for group in optimizer_groups(model(name, **rate), lr=0.5, weight_decay=0.1):
        for path in group["names"]:
            if "values" in path:
                assert (group["lr"], group["weight_decay"]) == (wanted, decay)
            else:
                assert group["lr"] == 0.5


def test_training_lowers_the_loss() -> None:
    built = model(layers=2, value_lr=0.05)
    optimizer = torch.optim.AdamW(optimizer_groups(built, lr=0.01, weight_decay=0.0))
    x = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(built(x).y[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dim", [16, 32, 64, 768])
@pytest.mark.parametrize("name", ["product-key", "memory-layer"])
def test_defaults_fit_any_width(name: str, dim: int) -> None:
    blueprint = resolve(recipe.load({"mixer": "attention", "dim": dim, "memory": name}), registry.default())
    built = build(blueprint, device="meta")
    values = (memories(built)[0].values).weight
    published = 512 if name == "product-key" else 1024
    assert values.shape == (min(max(dim, 32), published) ** 2, dim)


@torch.no_grad()
def test_first_weights_are_as_published() -> None:
    torch.manual_seed(0)
    pkm = ProductKey(ProductKeyConfig(keys=64), 64)
    assert float(pkm.keys.std()) == pytest.approx(128**-0.5, rel=0.02)
    assert float(pkm.values.weight.std()) == pytest.approx(64**-0.5, rel=0.02)
    layer = MemoryLayer(MemoryLayerConfig(keys=64, output_gate=True), 64)
    assert layer.values is not None and layer.swilu_projection and layer.value_proj and layer.gating
    assert float(layer.keys.abs().max()) <= 512**-0.5 and float(layer.keys.std()) == pytest.approx(1536**-0.5, rel=0.02)
    for linear in (layer.values, layer.swilu_projection, layer.value_proj):
        assert float(linear.weight.std()) == pytest.approx(64**-0.5, rel=0.05)
    bound = (6 / (64 + 4 * 512)) ** 0.5
    assert float(layer.query_proj.query_mlps[0].weight.abs().max()) == pytest.approx(bound, rel=0.01)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("product-key", {"topk": 9}, "topk 9 is more than the 8 keys of each half.*at most 8, or at least 9 keys"),
        ("memory-layer", {"topk": 0}, "topk"),
        ("memory-layer", {"keys": 0}, "keys"),
        ("memory-layer", {"projection": "none", "value_dim": 8}, "value_dim must be the width 16, not 8"),
        ("product-key", {"value_dim": 8}, "value_dim"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AltxError, match=message):
        model(name, **settings)
