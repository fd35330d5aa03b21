"""The op of this plugin: `ntm`, the time loop of reads and writes."""

from altx_ntm.kernels.ntm import SCAN

__all__ = ["SCAN"]
