"""The Triton kernels of the loop over chunks without a GPU: `python titans_triton.py interpret|compile`.

Run by test_titans_triton.py, each in a process of its own, for Triton decides when it is imported. interpret: compares
them with the reference in Triton's interpreter, which takes milliseconds for a kernel's line, so the calls are few and
small. compile: compiles them for capabilities 8.0 and 9.0, and fails where one needs more shared memory than there is,
or keeps more of its registers in memory than is known.
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
from altx_titans.kernels.learn import LEARN, cases, flat
from altx_titans.kernels.learn import triton as module

from altx_kernels.examples import Example
from altx_kernels.trees import map_leaves
from altx_kernels.verify import verify

PARKED = {16: 64, 32: 512}
"""Bytes a thread may keep in memory, by the tokens of a chunk: a few words that are parked cost nothing."""

TITANS = {"scaled": True, "bound": 1.0, "learned": True, "anew": True}
TTT = {"biased": True, "learned": True, "momentum": False}


def calls() -> list[dict[str, Any]]:
    """With and without each part; one head that takes several blocks of rows and of columns."""
    return [
        cases.call(1, 2, 3, 4, 6, **TTT), cases.call(1, 1, 2, 5, 39, scaled=True, bound=0.3),
        cases.call(2, 1, 4, 3, 8, norm=False, anew=True, bound=0.1), cases.call(1, 1, 2, 17, 5, scaled=True),
        cases.call(2, 1, 3, 2, 5, biased=True, scaled=True, learned=True, anew=True),
        cases.call(1, 2, 2, 3, 18, norm=False, biased=True), cases.call(2, 1, 1, 1, 4, reads=False, scaled=True),
        cases.call(0, 2, 2, 3, 4),
    ]  # fmt: skip


def interpret() -> int:
    torch.set_num_threads(1)
    made = [Example(f"call {index}", arguments) for index, arguments in enumerate(calls())]
    wrong = 0
    for dtype, some in ((torch.float32, made), (torch.bfloat16, made[4:5])):
        op: Any = SimpleNamespace(
            name=LEARN.name, reference=LEARN.reference, backends=LEARN.backends, examples=lambda some=some: some
        )
        for finding in verify(op, ["triton"], dtypes=[dtype], layouts=["sliced"], devices=["cpu"]):
            print(finding, finding.calls, f"error {finding.error:.2g} in {finding.worst}, {finding.seconds:.1f} s")
            wrong += finding.status != "passed" or finding.calls < 2 * len(some)
    return wrong


class Tape:
    """What autograd would keep, without autograd, which would not run a GPU's kernels on a CPU's tensors."""

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors


@torch.no_grad()
def passes(arguments: dict[str, Any]) -> None:
    """Forward and backward pass of a call."""

    def forward(*inputs: Any) -> Any:
        inputs, tape = (*inputs[:-1], True), Tape()
        outputs = module.FORWARD.impl(*inputs)
        flat.save(tape, inputs, outputs)
        flat.differentiate(module.BACKWARD.impl)(tape, *outputs)
        return outputs

    flat.learn(forward, **arguments)


def compile_() -> int:
    from altx_kernels.gpu import compiling

    jobs: list[tuple[Any, int, int]] = []
    # One capability for each: that takes seconds a kernel.
    for tokens, width, form, capability in (
        (16, 64, TTT, 90), (16, 64, TITANS, 80), (32, 128, TITANS, 90),
    ):  # fmt: skip
        arguments = map_leaves(
            lambda _, x: x.detach().float() if x.is_floating_point() else x, cases.call(1, 2, 2, tokens, width, **form)
        )
        found = compiling.launches(lambda arguments=arguments: passes(arguments))
        jobs += [(launch, capability, PARKED[tokens]) for launch in found]

    def wrong(job: tuple[Any, int, int]) -> bool:
        launch, capability, parked = job
        result = compiling.compiled(launch, capability)
        bad = result.shared > compiling.SHARED[capability] or result.spilled > parked
        print("WRONG" if bad else "right", capability, launch, result, flush=True)
        return bad

    with ThreadPoolExecutor(2) as pool:
        bad = list(pool.map(wrong, jobs))
    return int(any(bad) or len(bad) != 9)


if __name__ == "__main__":
    sys.exit(interpret() if sys.argv[1] == "interpret" else compile_())
