"""The ops of this plugin: `ntm` and `dnc`, time loops of reads and writes. `SCAN` is that of `ntm`."""

from altx_ntm.kernels.ntm import SCAN

__all__ = ["SCAN"]
