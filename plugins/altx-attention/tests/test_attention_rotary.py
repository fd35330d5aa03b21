"""The op rotary: its reference turns complex numbers, its backends are the reference."""

from __future__ import annotations

import math

import pytest
import torch
from altx_attention.kernels.rotary import OP, native, reference, rotary
from altx_attention.kernels.rotary.cases import example
from altx_attention.rotary import turns

from altx_kernels import KernelError
from altx_kernels.verify import verify


@pytest.mark.parametrize("interleave", [False, True])
def test_the_reference_multiplies_complex_numbers(interleave: bool) -> None:
    x = torch.randn(2, 3, 2, 9, dtype=torch.float64)
    positions = torch.tensor([[0, 5, 1000], [2, 3, 4]])
    y = reference.rotary(x, *turns(positions, 6, 100.0, x.dtype), first=1, interleave=interleave)
    for b in range(2):
        for t in range(3):
            for i in range(3):
                first, second = (1 + 2 * i, 2 + 2 * i) if interleave else (1 + i, 4 + i)
                angle = int(positions[b, t]) * 100.0 ** (-2 * i / 6)
                for h in range(2):
                    z = complex(x[b, t, h, first], x[b, t, h, second]) * complex(math.cos(angle), math.sin(angle))
                    assert abs(complex(y[b, t, h, first], y[b, t, h, second]) - z) < 1e-10
    assert torch.equal(y[..., [0, 7, 8]], x[..., [0, 7, 8]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_backends_equal_the_reference_with_all_gradients(dtype: torch.dtype) -> None:
    names = ["reference", *["native"] * (not OP.backends["native"].absent())]
    for finding in verify(OP, names, dtypes=[dtype]):
        assert finding.status == "passed", finding


def test_a_gradient_of_the_angles_is_the_references() -> None:
    arguments = dict(example(1, 3, 2, 4, 2).arguments)
    arguments["cos"] = arguments["cos"].requires_grad_()
    assert OP.choose(**arguments).backend == "reference"
    assert native.unavailable(**arguments) == "it has no gradient of cos and sin"
    assert torch.autograd.grad(rotary(**arguments).sum(), arguments["cos"])[0].any()


@pytest.mark.parametrize(
    ("cos", "first", "message"),
    [
        ((3, 5, 2), 0, "cos has 3 rows and x 2"),
        ((1, 5, 4), 1, "4 planes from feature 1 on do not fit 8 features"),
        ((1, 4, 4), 0, "cos has shape (1, 4, 4), not (A, T, E)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(cos: tuple[int, ...], first: int, message: str) -> None:
    with pytest.raises(KernelError) as caught:
        rotary(torch.zeros(2, 5, 3, 8), torch.zeros(cos), torch.zeros(cos), first=first)
    assert message in str(caught.value)
