"""The Triton kernels of grouped products without a GPU: `python grouped_mm_triton.py interpret|compile`.

Run by test_moe_grouped_mm.py, each in a process of its own, for Triton decides when it is imported. interpret: compares
them with the reference in Triton's interpreter, by themselves and as core's products. compile: compiles them for
capabilities 8.0 and 9.0, and fails where one needs more shared memory than there is, or keeps registers in memory.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

# Before Triton is imported. Fusion is what Triton 3.9 does by default, and warns about.
os.environ["TRITON_INTERPRET"] = "1" if sys.argv[1] == "interpret" else "0"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import torch
from altx_moe.kernels.grouped_mm import OP

from altx.grouped import grouped_mm
from altx_kernels.op import record
from altx_kernels.verify import verify


def interpret() -> int:
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        made = list(OP.examples())[:: 1 if dtype == torch.float32 else 4]
        some: Any = SimpleNamespace(
            name=OP.name, reference=OP.reference, backends=OP.backends, examples=lambda made=made: made
        )
        for finding in verify(some, ["triton"], dtypes=[dtype], layouts=["sliced"], devices=["cpu"]):
            print(finding, finding.calls, f"error {finding.error:.2g} in {finding.worst}, {finding.seconds:.1f} s")
            wrong += finding.status != "passed" or finding.calls < 2 * len(made)
    return wrong + core()


def core() -> int:
    """Whether core's product and its gradients, once and twice, are the kernels', and right."""
    offsets, results = torch.tensor([0, 3, 3, 40, 41]), []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
        os.environ["ALTX_KERNEL"] = f"grouped-mm={backend}"
        generator = torch.Generator().manual_seed(0)
        x, weight, dy = (
            torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
            for shape in ((43, 5), (4, 5, 18), (43, 18))
        )
        with record() as choices:
            y = grouped_mm(x, weight, offsets)
            first = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
            second = torch.autograd.grad(sum(each.square().sum() for each in first), (x, weight, dy))
        results.append([y, *first, *second])
        if [choice.backend for choice in choices] != [backend]:
            print("WRONG", choices)
            return 1
    errors = [
        float(((ours - exact).abs().max() / exact.abs().max()).detach()) for ours, exact in zip(*results, strict=True)
    ]
    print("core: errors", errors)
    return int(not max(errors) < 1e-5)


def launched(P: int, n: int, D: int, F: int, dtype: torch.dtype) -> Any:
    """Forward and backward pass of a call."""
    from altx_moe.kernels.grouped_mm import triton as module

    x, weight, y = (torch.zeros(shape, dtype=dtype) for shape in ((P, D), (n, D, F), (P, F)))
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    module.FORWARD.impl(x, weight, offsets)
    module.FORWARD.impl(y, weight.transpose(1, 2), offsets)
    module.FORWARD.impl(x, y, offsets)


def compile_() -> int:
    from altx_kernels.gpu import compiling

    jobs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # Of float16 those that take most registers.
        for sizes in ((2048, 8, 333, 41), (2048, 8, 768, 2048), (256, 8, 768, 2048))[
            : 1 if dtype == torch.float16 else 3
        ]:
            found = compiling.launches(lambda sizes=sizes, dtype=dtype: launched(*sizes, dtype))
            jobs += [(launch, capability) for launch in found for capability in compiling.SHARED]
    jobs = list(dict.fromkeys(jobs))

    def wrong(job: tuple[Any, int]) -> bool:
        launch, capability = job
        result = compiling.compiled(launch, capability)
        bad = result.shared > compiling.SHARED[capability] or result.spilled > 0
        print("WRONG" if bad else "right", capability, launch, result, flush=True)
        return bad

    with ThreadPoolExecutor(2) as pool:
        bad = list(pool.map(wrong, jobs))
    print(f"{len(bad)} kernels, {sum(bad)} wrong")
    return int(any(bad) or len(bad) < 2 * 15)


if __name__ == "__main__":
    sys.exit(interpret() if sys.argv[1] == "interpret" else compile_())
