"""One token through a block: norm, mixer and residual as one op, and everything else as it was."""

from __future__ import annotations

import pytest
import torch
from altx_mamba.kernels.mamba2_step import cases as cases2
from altx_mamba.kernels.mamba2_step import mamba2_step
from altx_mamba.kernels.mamba3_step import cases as cases3
from altx_mamba.kernels.mamba3_step import mamba3_step
from altx_mamba.kernels.mamba_step import cases, mamba_step
from torch import nn

from altx.block import Residual
from altx.compose import compose
from altx.layer import FRESH
from altx.model import Model
from altx_kernels import KernelError


def model_of(mixer: str, norm: str = "rms") -> Model:
    model = compose({"mixer": mixer, "dim": 32, "layers": 2, "feed_forward": "none", "norm": norm}, seed=0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model.double().eval()


def first(model: Model) -> Residual:
    return next(module for module in model.modules() if isinstance(module, Residual))


def stepped(model: Model, text: torch.Tensor) -> torch.Tensor:
    state, found = model.init_state(len(text)), []
    for t in range(text.shape[1]):
        out = model(text[:, t : t + 1], state=state)
        state = out.state
        found.append(out.y)
    return torch.cat(found, 1)


TEXT = torch.randint(256, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
def test_a_block_computes_one_token_as_it_does_all(mixer: str, norm: str) -> None:
    model = model_of(mixer, norm)
    block = first(model)
    with torch.no_grad():
        x = torch.randn(2, 1, 32, dtype=torch.float64)
        fused = block.body.residual(x, block.norm, FRESH, block.init_state(2)) is not None
        assert fused == (norm == "rms")
        torch.testing.assert_close(stepped(model, TEXT), model(TEXT).y, atol=1e-10, rtol=0)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
@pytest.mark.parametrize("where", ["norm", "body"])
def test_what_is_changed_or_watched_is_called(mixer: str, where: str) -> None:
    model = model_of(mixer)
    called = []

    def watch(module: nn.Module, args: object, output: object) -> None:
        called.append(module)

    with torch.no_grad():
        whole = model(TEXT).y
        getattr(first(model), where).register_forward_hook(watch)
        torch.testing.assert_close(stepped(model, TEXT), whole, atol=1e-10, rtol=0)
        assert len(called) == TEXT.shape[1]


def test_gradients_go_through_the_parts() -> None:
    model = model_of("mamba").train()
    stepped(model, TEXT).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


OPS = [(mamba_step, cases), (mamba2_step, cases2), (mamba3_step, cases3)]


@pytest.mark.parametrize("op, made", OPS, ids=["mamba", "mamba2", "mamba3"])
def test_an_op_moves_the_count_of_tokens_on(op, made) -> None:
    arguments = {
        name: value.detach() if isinstance(value, torch.Tensor) else value
        for name, value in next(e.arguments for e in made.examples() if len(e.arguments["x"]) > 1).items()
    }
    rows = len(arguments["x"])
    for backend in op.backends:
        if op.backends[backend].absent():
            continue
        seen = torch.arange(rows)
        with torch.no_grad():
            op(**arguments, seen=seen, backend=backend)
            assert seen.tolist() == list(range(1, rows + 1))
            for wrong in (seen.int(), torch.zeros(1, dtype=torch.int64).expand(rows), torch.zeros(rows + 1).long()):
                with pytest.raises(KernelError):
                    op(**arguments, seen=wrong, backend=backend)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
def test_a_state_that_was_not_given_up_is_not_counted_on(mixer: str) -> None:
    model = model_of(mixer)
    with torch.no_grad():
        before = model(TEXT[:, :3], state=model.init_state(2)).state
        after = model(TEXT[:, 3:4], state=before).state
        assert before.tokens.tolist() == [3, 3] and after.tokens.tolist() == [4, 4]
        given = model(TEXT[:, 4:5], FRESH.replace(donate_state=True), after).state
        assert given.tokens.tolist() == [5, 5]
