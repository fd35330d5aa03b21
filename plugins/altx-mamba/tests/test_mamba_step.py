"""One token of Mamba-1 in one call equals the equations, and never writes to a state it was not given."""

from __future__ import annotations

import pytest
import torch
from altx_mamba.config import MambaConfig
from altx_mamba.kernels.mamba2_step import mamba2_step
from altx_mamba.kernels.mamba3_step import mamba3_step
from altx_mamba.kernels.mamba_step import mamba_step, native
from altx_mamba.kernels.mamba_step.cases import arguments
from altx_mamba.mixer import build
from torch import nn
from torch.nn.utils import parametrize

from altx.spec import BuildContext
from altx_kernels import KernelError
from altx_kernels.verify import verify

SIZES = (3, 21, 40, 16, 4, 5)


def detached(values):
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def test_every_backend_equals_the_reference():
    failures = [finding for finding in verify(mamba_step) if finding.status == "failed"]
    assert not failures, failures


@pytest.mark.parametrize("backend", mamba_step.backends)
def test_only_donated_states_are_written_to(backend):
    if reason := mamba_step.backends[backend].absent():
        pytest.skip(reason)
    values = detached(arguments(*SIZES))
    before = {name: values[name].clone() for name in ("past", "h")}
    with torch.no_grad():
        y, past, h = mamba_step(**values, backend=backend)
        assert all(torch.equal(values[name], before[name]) for name in before)
        donated = mamba_step(**values, donate=True, backend=backend)
    for found, expected in zip(donated, (y, past, h), strict=True):
        assert torch.equal(found, expected)


def test_two_threads_compute_what_one_does():
    values = detached(arguments(2, 300, 600, 16, 4, 19))
    assert native.ALONE < 300 * 600
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            torch.set_num_threads(1)
            one = mamba_step(**values)
            torch.set_num_threads(2)
            two = mamba_step(**values)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-13)


def test_a_nan_stays_in_its_row():
    values = detached(arguments(*SIZES))
    values["x"] = values["x"].clone()
    values["x"][1, 0] = float("nan")
    with torch.no_grad():
        y, _, h = mamba_step(**values)
    assert y[1].isnan().all() and h[1].isnan().any()
    assert y[[0, 2]].isfinite().all() and h[[0, 2]].isfinite().all()


def test_wrong_calls_are_refused_with_the_reason():
    values = arguments(*SIZES)
    if reason := mamba_step.backends["native"].absent():
        pytest.skip(reason)
    with pytest.raises(KernelError, match="gradients are wanted"):
        mamba_step(**values, backend="native")
    with pytest.raises(KernelError, match="float32"), torch.no_grad():
        mamba_step(**{**values, "D": values["D"].float()}, backend="native")
    with pytest.raises(KernelError, match="9 rows"), torch.no_grad():
        mamba_step(**arguments(9, *SIZES[1:]), backend="native")


@pytest.mark.parametrize("op", [mamba_step, mamba2_step, mamba3_step], ids=lambda op: op.name)
def test_an_argument_of_another_shape_is_refused_whatever_the_backend(op):
    example = next(e for e in op.examples() if all(v.numel() for v in e.arguments.values() if torch.is_tensor(v)))
    tensors = {name: value for name, value in detached(example.arguments).items() if torch.is_tensor(value)}
    for name, value in tensors.items():
        for axis in range(value.dim()):
            longer = torch.cat([value, value.narrow(axis, 0, 1)], axis)
            with pytest.raises(KernelError, match=op.name), torch.no_grad():
                op(**{**detached(example.arguments), name: longer})
        with pytest.raises(KernelError, match=op.name), torch.no_grad():
            op(**{**detached(example.arguments), name: value[None]})


class Doubled(nn.Linear):
    """What an adapter is to a step: a module of another class in the place of a known one."""

    def forward(self, x):
        return 2 * super().forward(x)


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def replace(layer):
    proj = layer.in_proj
    layer.in_proj = Doubled(proj.in_features, proj.out_features, bias=False)
    layer.in_proj.load_state_dict(proj.state_dict())


def negate(layer):
    parametrize.register_parametrization(layer.out_proj, "weight", Negated())


def hook(layer):
    layer.x_proj.register_forward_hook(lambda module, args, output: 3 * output)


@pytest.mark.parametrize("change", [replace, negate, hook])
def test_a_module_that_was_changed_is_called_while_decoding_too(change):
    torch.manual_seed(0)
    layer = build(MambaConfig(state_size=4), BuildContext(dim=8, num_layers=1))
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        before = layer(x).y
        change(layer)
        whole, state = layer(x).y, layer.init_state(2)
        assert (whole - before).abs().max() > 1e-3
        for t in range(5):
            out = layer(x[:, t : t + 1], state=state)
            state = out.state
            torch.testing.assert_close(out.y[:, 0], whole[:, t], atol=1e-5, rtol=1e-4)
