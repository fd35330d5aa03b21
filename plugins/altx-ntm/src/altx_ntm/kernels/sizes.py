"""What fits a GPU's program, said without Triton."""

from __future__ import annotations


def fits(slots: int, width: int, largest: int) -> bool:
    """Whether a memory (N, W) has at most so many numbers, both sides rounded up to powers of two."""
    return _power_of_2(slots) * _power_of_2(width) <= largest


def _power_of_2(n: int) -> int:
    """As `altx_kernels.gpu.launching.power_of_2`."""
    return max(16, 1 << max(n - 1, 0).bit_length())
