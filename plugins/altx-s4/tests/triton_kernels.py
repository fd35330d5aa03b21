"""The op's Triton kernels without a GPU: `python triton_kernels.py interpret` or `compile`. Run by test_s4_triton.py.

interpret: compares them with the reference in Triton's interpreter, which takes milliseconds for a kernel's line, so
the calls are few and small. compile: compiles them for capabilities 8.0 and 9.0, in bfloat16 and float32, and fails
where one needs more shared memory than there is, or keeps registers in memory.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

# Before Triton is imported. Fusion is what Triton 3.9 does by default, and warns about.
os.environ["TRITON_INTERPRET"] = "1" if sys.argv[1:] == ["interpret"] else "0"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import torch
from altx_s4.kernels.diagonal_ssm import OP
from altx_s4.kernels.diagonal_ssm.cases import FORMS, example

from altx_kernels.verify import verify

PARKED = 32
"""Bytes a thread may keep in memory: a few words that are parked cost nothing."""


def interpret() -> int:
    made = [
        example("real", 2, 19, 5, 3, "D", "state", "reset", "lengths"),
        example("low-rank", 2, 19, 5, 3, "D", "state", "reset", "lengths"),
        example("complex", 2, 19, 5, 1, "state", "reset", "lengths"),
        example("real", 1, 9, 5, 3),
        example("low-rank", 2, 1, 3, 5),
        example("complex", 2, 0, 5, 1, "state"),
    ]
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        some: Any = SimpleNamespace(name=OP.name, reference=OP.reference, backends=OP.backends, examples=lambda: made)
        for finding in verify(some, ["triton"], dtypes=[dtype], layouts=["sliced"], devices=["cpu"]):
            print(finding, finding.calls, f"error {finding.error:.2g}, {finding.seconds:.1f} s")
            wrong += finding.status != "passed" or finding.calls < 2 * len(made)
    return wrong


def compile_() -> int:
    from altx_s4.kernels.diagonal_ssm import triton as module

    from altx_kernels.gpu import compiling

    jobs: list[tuple[Any, int]] = []
    for dtype in (torch.bfloat16, torch.float32):
        # bfloat16 stands for batches with everything, float32 for plain ones.
        options = ("state", "reset", "lengths") if dtype == torch.bfloat16 else ()
        for form in FORMS:
            sizes = (128, 1) if form == "complex" else (768, 32)
            skip = ("D",) if form != "complex" and options else ()
            arguments = example(form, 2, 64, *sizes, *options, *skip).arguments
            call = [
                value.detach().to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                for value in arguments.values()
            ]

            def run(call: list[Any] = call) -> None:
                y, last = module.FORWARD.impl(*call)
                module.BACKWARD.impl(y, last, *call)

            jobs += [(launch, capability) for launch in compiling.launches(run) for capability in compiling.SHARED]

    def wrong(job: tuple[Any, int]) -> bool:
        launch, capability = job
        result = compiling.compiled(launch, capability)
        bad = result.shared > compiling.SHARED[capability] or result.spilled > PARKED
        print("WRONG" if bad else "right", capability, launch, result, flush=True)
        return bad

    with ThreadPoolExecutor(2) as pool:
        bad = list(pool.map(wrong, jobs))
    return int(any(bad) or not bad)


if __name__ == "__main__":
    sys.exit(interpret() if sys.argv[1:] == ["interpret"] else compile_())
