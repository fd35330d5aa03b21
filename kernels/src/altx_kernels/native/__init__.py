"""Kernels in plain C: built once per machine, loaded through ctypes.

    LIBRARY = Library(Path(__file__).with_name("native.c"), {"scan": "pppiii"})
    LIBRARY.problem()                       # None, or in words why it cannot be used here
    LIBRARY.call("scan", x.dtype, x, y, None, 3, 4, torch.get_num_threads())

A C file includes "altx.h" and defines its functions once, as EXPORT void FN(scan)(...); they are compiled for float
and for double.
"""

from altx_kernels.native.library import Library

__all__ = ["Library"]
