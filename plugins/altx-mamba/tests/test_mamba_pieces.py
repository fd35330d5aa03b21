"""A long sequence without gradients, computed in pieces, is what it is as a whole."""

from __future__ import annotations

import pytest
import torch

from altx import pieces
from altx.compose import compose
from altx.context import Context
from altx.layer import Layer

TOKENS = 23


def make(name: str) -> Layer:
    sizes = {} if name == "mamba" else {"head_dim": 8, "state_size": 8}
    model = compose({"dim": 16, "layers": 1, "mixer": [{"name": name, **sizes}], "feed_forward": "none"}, seed=0)
    return next(m for m in model.modules() if type(m).__name__.lower() == name).double()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "TOKENS", 10)
    monkeypatch.setattr(pieces, "SHORTEST", 3)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba3"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_pieces_equal_the_whole(name, streaming, with_mask, monkeypatch):
    layer, seed = make(name), torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS, 16, dtype=torch.float64, generator=seed)
    mask, reset = (torch.rand(2, TOKENS, generator=seed) < share for share in (0.7, 0.2))
    ctx = Context(mask=mask, reset=reset) if with_mask else Context()
    state = layer.init_state(2) if streaming else None
    whole = layer(x, ctx, state)
    lengths = []
    monkeypatch.setattr(type(layer), "forward", spy(type(layer).forward, lengths))
    with torch.no_grad():
        found = layer(x, ctx, state)
    assert lengths == [TOKENS, 5, 5, 5, 5, 3]
    real = mask if with_mask else torch.ones_like(mask)
    torch.testing.assert_close(found.y[real], whole.y[real], atol=1e-12, rtol=0)
    assert (found.state is None) == (state is None)
    if state is not None:
        for key, leaf in whole.state.flat().items():
            torch.testing.assert_close(found.state.flat()[key], leaf, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba3"])
def test_the_dtype_that_autocast_chooses_is_that_of_the_whole(name):
    layer, x = make(name).float(), torch.randn(2, TOKENS, 16)
    with torch.autocast("cpu", torch.bfloat16):
        whole = layer(x)
        with torch.no_grad():
            found = layer(x)
    assert found.y.dtype == whole.y.dtype == torch.bfloat16


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba3"])
def test_a_graph_is_exported_for_all_lengths(name, grad):
    layer = make(name)
    length = torch.export.Dim("length", min=3, max=2**20)
    with torch.set_grad_enabled(grad):
        graph = torch.export.export(Values(layer), (torch.randn(2, TOKENS, 16).double(),), dynamic_shapes=[{1: length}])
    x = torch.randn(2, 2 * TOKENS, 16, dtype=torch.float64)
    torch.testing.assert_close(graph.module()(x), layer(x).y)


class Values(torch.nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).y


def spy(forward, lengths):
    def wrapped(self, x, *args, **kwargs):
        lengths.append(x.shape[1])
        return forward(self, x, *args, **kwargs)

    return wrapped
