"""The NTM's time loop: `reference` to read beside the paper, `torch_scan` to train with."""

from altx_kernels import Backend, Op
from altx_ntm.kernels import reference, torch_scan

SCAN = Op("ntm", reference.scan, [Backend("torch", torch_scan.scan, torch_scan.unavailable)])
"""Reads and writes of T tokens, in the order asked for."""
