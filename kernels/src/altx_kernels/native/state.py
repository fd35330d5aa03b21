"""What the toolchain makes of this machine, for `altx doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from altx_kernels.native import cache, compiler
from altx_kernels.native.library import Library
from altx_kernels.native.variants import choose
from altx_kernels.op import KernelError


def describe() -> dict[str, Any]:
    """Try it with the least of kernels: the variant, the threads that it gets, the compiler, the cache, or why not."""
    probe = Library(Path(__file__).with_name("probe.c"), {"threads": "ip"})
    found = compiler.find()
    state: dict[str, Any] = {
        "problem": probe.problem(),
        "compiler": found and {"command": found.name, "version": found.version.splitlines()[0]},
        "cache": _cache(),
        **dict.fromkeys(("variant", "threads", "library")),
    }
    if state["problem"] is None:
        threads = torch.zeros(1, dtype=torch.int64)
        probe.call("threads", torch.float32, torch.get_num_threads(), threads)
        state |= {"variant": choose().name, "threads": int(threads), "library": str(probe.path or "")}
    return state


def _cache() -> dict[str, Any]:
    try:
        folder = cache.folder()
        sizes = [path.stat().st_size for path in folder.glob("*.so")] if folder else []
    except KernelError as error:
        return {"path": str(cache.root()), "problem": error.what, "remedy": error.hint}
    return {"path": str(folder or ""), "libraries": len(sizes), "bytes": sum(sizes)}
