"""The Triton kernels of the time loops without a GPU: `python loops_triton.py interpret|compile OP`.

Run by test_ntm_triton.py, each in a process of its own, for Triton decides when it is imported. interpret: compares
them with the reference in Triton's interpreter, which takes milliseconds for a kernel's line, so the calls are few and
small. compile: compiles them for capabilities 8.0 and 9.0, and fails where one needs more shared memory than there is,
or keeps more of its registers in memory than is known.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import SimpleNamespace
from typing import Any

# Before Triton is imported. Fusion is what Triton 3.9 does by default, and warns about.
os.environ["TRITON_INTERPRET"] = "1" if sys.argv[1] == "interpret" else "0"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import torch

from altx_kernels.examples import Example
from altx_kernels.trees import leaves, map_leaves
from altx_kernels.verify import verify

OP = sys.argv[2]
PACKAGE = f"altx_ntm.kernels.{OP}"
SCAN = import_module(PACKAGE).SCAN
call = import_module(f"{PACKAGE}.cases").call
module: Any = import_module(f"{PACKAGE}.triton")

PARKED = {False: 32, True: 640}
"""Bytes a thread may keep in memory: a few words that are parked cost nothing; more of large memories with several
heads, masks and resets, whose rows are no multiple of 16."""


def flags(T: int) -> dict[str, torch.Tensor]:
    """A mask and resets, both in each row, a masked reset among them."""
    mask = torch.tensor([[t != 1 for t in range(T)], [t not in (0, 3) for t in range(T)]])
    reset = torch.tensor([[t in (1, 2) for t in range(T)], [t in (3, 4) for t in range(T)]])
    return {"mask": mask, "reset": reset}


def calls() -> list[dict[str, Any]]:
    if OP == "dnc":
        # Slots that are all alike: no product of usages may be divided by one of them.
        blank = call(1, 4, 5, 3, readers=2)
        blank["slots"] = map_leaves(lambda _, t: torch.zeros_like(t).requires_grad_(), blank["slots"])
        return [
            blank,
            call(2, 5, 6, 3, readers=2, **flags(5)), call(1, 5, 5, 4), call(2, 4, 5, 3, writing=False, **flags(4)),
            call(2, 3, 5, 3, reading=False, **flags(3)), call(1, 0, 4, 3), call(0, 2, 4, 3),
        ]  # fmt: skip
    return [
        call(2, 5, 6, 3, readers=2, writers=2, **flags(5)), call(1, 5, 7, 4, shift=3),
        call(2, 5, 6, 3, readers=2, writers=3, write_first=True, **flags(5)), call(1, 2, 5, 4, write_first=True),
        call(2, 4, 5, 3, writing=False, **flags(4)), call(2, 4, 5, 3, reading=False, **flags(4)),
        call(1, 0, 4, 3), call(0, 2, 4, 3),
    ]  # fmt: skip


def interpret() -> int:
    # Several chunks in a few tokens, and several blocks of a link's rows.
    module.CHUNK, module.TILE = 2, 64
    made = [Example(f"call {index}", arguments) for index, arguments in enumerate(calls())]
    some: Any = SimpleNamespace(name=OP, reference=SCAN.reference, backends=SCAN.backends, examples=lambda: made)
    wrong = 0
    for finding in verify(some, ["triton"], dtypes=[torch.float32], layouts=["sliced"], devices=["cpu"]):
        print(finding, finding.calls, f"error {finding.error:.2g} in {finding.worst}, {finding.seconds:.1f} s")
        wrong += finding.status != "passed" or finding.calls < 2 * len(made)
    return wrong


class Tape:
    """What autograd would keep, without autograd, which would not run a GPU's kernels on a CPU's tensors."""

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors


@torch.no_grad()
def passes(arguments: dict[str, Any]) -> None:
    """Forward and backward pass of a call."""

    def forward(*inputs: Any) -> Any:
        inputs, tape = (*inputs[:-1], True), Tape()
        outputs = module.FORWARD.impl(*inputs)
        module.flat.save(tape, inputs, outputs)
        module.flat.differentiate(module.BACKWARD)(tape, *outputs)
        return outputs

    defaults = {"mask": None, "reset": None} | ({"write_first": False} if OP == "ntm" else {})
    module.flat.scan(forward, **(defaults | arguments))


def compile_() -> int:
    from altx_kernels.gpu import compiling

    sizes = [(32, 16), (128, 32)] if OP == "dnc" else [(64, 16), (128, 20)]
    jobs: list[tuple[Any, int, int]] = []
    for count, width in sizes:
        several = (count, width) != sizes[0]
        rest: dict[str, Any] = flags(16) | {"readers": 2} if several else {}
        if OP == "ntm" and several:
            rest |= {"writers": 2, "write_first": True}

        arguments = call(2, 16, count, width, **rest)
        for tensor in leaves(arguments).values():
            tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
        found = compiling.launches(lambda arguments=arguments: passes(arguments))
        # The plain call on one of them: that takes seconds a kernel.
        capabilities = list(compiling.SHARED) if several else [max(compiling.SHARED)]
        jobs += [(launch, capability, PARKED[several]) for launch in found for capability in capabilities]

    def wrong(job: tuple[Any, int, int]) -> bool:
        launch, capability, parked = job
        result = compiling.compiled(launch, capability)
        bad = result.shared > compiling.SHARED[capability] or result.spilled > parked
        print("WRONG" if bad else "right", capability, launch, result, flush=True)
        return bad

    with ThreadPoolExecutor(2) as pool:
        bad = list(pool.map(wrong, jobs))
    return int(any(bad) or len(bad) < 6)


if __name__ == "__main__":
    sys.exit(interpret() if sys.argv[1] == "interpret" else compile_())
