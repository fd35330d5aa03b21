"""What PyTorch does to functions, done to every op: each backend is right under it, or says that it is not for it."""

from __future__ import annotations

import pytest
import torch
from altx_mamba.kernels import selective_scan, ssd
from altx_ntm.kernels import dnc, ntm
from altx_performer.kernels import positive_features
from altx_rwkv.kernels import wkv4
from altx_s4.kernels import diagonal_ssm
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from altx_kernels import KernelError, Op, causal_conv1d, delta_rule, gated_rms_norm, linear_recurrence
from altx_kernels.trees import leaves, map_leaves

OPS = {
    op.name: op
    for op in (
        causal_conv1d.CAUSAL_CONV1D,
        gated_rms_norm.GATED_RMS_NORM,
        linear_recurrence.OP,
        delta_rule.DELTA_RULE,
        selective_scan.OP,
        ssd.OP,
        diagonal_ssm.OP,
        positive_features.OP,
        wkv4.OP,
    )
} | {"ntm": ntm.SCAN, "dnc": dnc.SCAN}


def call(op: Op) -> dict:
    """The arguments of the longest example without packing, whose states are kept at several places."""
    plain = (e.arguments for e in op.examples() if e.arguments.get("cu_seqlens") is None)

    def tokens(arguments: dict) -> int:
        found = leaves(arguments)
        return max((t.shape[1] for t in found.values() if t.dim() > 2 and t.numel()), default=0)

    return dict(max(plain, key=tokens))


def backends(op: Op) -> list[str]:
    return [name for name, backend in op.backends.items() if backend.reason(**call(op)) is None]


CASES = [(name, backend) for name, op in OPS.items() for backend in backends(op)]


def differentiable(arguments: dict) -> dict[str, Tensor]:
    found = {name: tensor.detach() for name, tensor in leaves(arguments).items() if tensor.requires_grad}
    assert found
    return found


def loss(op: Op, arguments: dict, tensors: dict[str, Tensor], backend: str | None) -> Tensor:
    given = map_leaves(lambda name, tensor: tensors.get(name, tensor.detach()), arguments)
    return sum(output.square().mean() for output in leaves(op(**given, backend=backend)).values())


def gradients(op: Op, backend: str | None) -> tuple[dict[str, Tensor], Tensor, dict]:
    arguments = call(op)
    tensors = {name: tensor.requires_grad_() for name, tensor in differentiable(arguments).items()}
    return tensors, loss(op, arguments, tensors, backend), arguments


def close(found, wanted) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_checkpoint_gives_the_same_gradients(name, backend):
    tensors, plain, arguments = gradients(OPS[name], backend)
    wanted = torch.autograd.grad(plain, list(tensors.values()), materialize_grads=True)
    again = checkpoint(lambda: loss(OPS[name], arguments, tensors, backend), use_reentrant=False)
    close(torch.autograd.grad(again, list(tensors.values()), materialize_grads=True), wanted)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_gradient_of_a_gradient_is_right_or_refused(name, backend):
    def twice(which: str) -> tuple[Tensor, ...]:
        tensors, plain, _ = gradients(OPS[name], which)
        first = torch.autograd.grad(plain, list(tensors.values()), create_graph=True, materialize_grads=True)
        sum(gradient.square().sum() for gradient in first).backward()
        return tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in tensors.values())

    try:
        found = twice(backend)
    except RuntimeError as error:
        assert "differentiate" in str(error) or "no autograd formula" in str(error)
    else:
        close(found, twice("reference"))


@pytest.mark.parametrize("name", OPS)
def test_transforms_of_torch_func_find_the_reference(name):
    op = OPS[name]
    tensors, plain, arguments = gradients(op, "reference")
    wanted = torch.autograd.grad(plain, list(tensors.values()), materialize_grads=True)
    given = differentiable(arguments)
    found = torch.func.grad(lambda tensors: loss(op, arguments, tensors, None))(given)
    close(found.values(), wanted)
    for backend in backends(op)[:-1]:
        with pytest.raises(KernelError, match=r"torch\.func"):
            torch.func.grad(lambda tensors, which=backend: loss(op, arguments, tensors, which))(given)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own, at the first of them
@pytest.mark.parametrize("name", OPS)
def test_a_forward_mode_derivative_is_never_dropped(name):
    op, arguments = OPS[name], call(OPS[name])
    given = differentiable(arguments)
    tensors, plain, _ = gradients(op, "reference")
    slope = sum(g.sum() for g in torch.autograd.grad(plain, list(tensors.values()), materialize_grads=True))
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(tensor, torch.ones_like(tensor)) for name, tensor in given.items()}
        found = forward_ad.unpack_dual(loss(op, arguments, duals, None)).tangent
        for backend in backends(op)[:-1]:
            with pytest.raises(KernelError, match="forward-mode"):
                loss(op, arguments, duals, backend)
    close([found], [slope])


@pytest.mark.parametrize("name", OPS)
def test_a_gradient_of_a_graph_made_without_any_is_refused(name):
    """Not read from states that were never kept."""
    op, arguments = OPS[name], call(OPS[name])
    if reason := op.backends["native"].absent():
        pytest.skip(reason)
    given = differentiable(arguments)

    with torch.no_grad():
        graph = make_fx(lambda tensors: loss(op, arguments, tensors, "native"))(given)
    value = graph({name: tensor.requires_grad_() for name, tensor in given.items()})
    close([value.detach()], [loss(op, arguments, given, "reference").detach()])
    if name not in ("causal-conv1d", "gated-rms-norm", "positive-features"):  # which keep only arguments and results
        with pytest.raises(KernelError, match="no gradients are wanted"):
            value.backward()
