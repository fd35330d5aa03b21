"""Numerical primitives with interchangeable backends."""

from altx_kernels.op import Backend, Choice, KernelError, Op, ops, record

__all__ = ["Backend", "Choice", "KernelError", "Op", "ops", "record"]
