"""Functions that torch.compile, torch.export and autograd see as one node."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from altx_kernels.op import KernelError

_libraries: dict[str, torch.library.Library] = {}

PLAIN = (Tensor, torch.nn.Parameter)


class Primitive:
    """A function of tensors, registered with torch as `torch.ops.NAMESPACE.NAME`.

    Where nothing but the result is wanted (no gradient, no compiler, no mode that watches), the function is
    called directly, which saves several microseconds a call.

    Args:
        name: "namespace::name"; the namespace is the package's.
        impl: the function, annotated with Tensor, Tensor | None, int, float, bool; returns tensors that share no
            storage with its arguments.
        fake: given tensors without data, returns empty ones of the results' shapes and dtypes.
        save: `save(ctx, inputs, output)` keeps what `backward` needs; see torch.library.register_autograd.
        backward: `backward(ctx, *gradients)` returns a gradient or None for each input. Without it the
            function's results cannot be differentiated, and trying to is an error.
        keep: name of the bool argument that says whether the function keeps what `backward` needs. A graph that was
            made without gradients has it false for good; then `save` is not called, and `backward` is an error.
        mutates: names of the arguments that the function writes to.
        device: torch.library's name of the devices it runs on.
    """

    def __init__(
        self,
        name: str,
        impl: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        save: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        keep: str = "",
        mutates: tuple[str, ...] = (),
        device: str = "CPU",
    ) -> None:
        namespace, _, short = name.partition("::")
        library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
        library.define(short + torch.library.infer_schema(impl, mutates_args=mutates))
        library.impl(short, impl, device)
        torch.library.register_fake(name, fake, lib=library)

        at = list(inspect.signature(impl).parameters).index(keep) if keep else None

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.kept = at is None or inputs[at]
            if ctx.kept and save:
                save(ctx, inputs, output)

        def differentiate(ctx: Any, *gradients: Any) -> Any:
            if backward is None:
                raise KernelError(f"{name} cannot be differentiated", hint="use backend='reference', which can")
            if not ctx.kept:
                raise KernelError(f"{name} was told that no gradients are wanted", hint="export with gradients enabled")
            return backward(ctx, *gradients)

        if not mutates:
            torch.library.register_autograd(name, differentiate, setup_context=setup, lib=library)
        self.impl = impl
        self.op = getattr(getattr(torch.ops, namespace), short).default

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _watched(args):
            return self.op(*args)
        return self.impl(*args)


def _watched(args: tuple[Any, ...]) -> bool:
    """Whether somebody wants to know of the call: autograd, a functorch transform, a mode, a tensor subclass."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    grad = torch.is_grad_enabled()
    for arg in args:  # noqa: SIM110  # a generator costs a step of decoding too much
        # Subclasses may have no memory to point to.
        if isinstance(arg, Tensor) and (type(arg) not in PLAIN or (grad and arg.requires_grad)):
            return True
    return False
