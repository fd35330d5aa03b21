"""Compile an op's Triton kernels for GPUs that are not there: `python compile_kernels.py OP`.

Run by test_triton_compiled.py. Fails on kernels that do not compile, need more shared memory than there is, or keep
registers in memory. Every kernel of forward and backward pass is compiled, for capabilities 8.0 and 9.0, in bfloat16
and float32, with the blocks that the op chooses there.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
# What Triton 3.9 does by default, and warns about.
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import torch
import triton

from altx_kernels.gpu import compiling, launching

MODULES = {
    "causal-conv1d": "altx_kernels.causal_conv1d.triton",
    "gated-rms-norm": "altx_kernels.gated_rms_norm.triton",
    "linear-recurrence": "altx_kernels.linear_recurrence.triton",
    "delta-rule": "altx_kernels.delta_rule.triton",
    "selective-scan": "altx_mamba.kernels.selective_scan.triton",
    "rotary": "altx_attention.kernels.rotary.triton",
}
# Bytes a thread may keep in memory: a few words that are parked cost nothing. The scan's gradient unrolls tokens; three
# TF32 parts of q, k and the state do not fit into 255 registers. Triton 3.7, which torch 2.13 for CUDA brings, keeps
# more there than 3.9.
NEW = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
PARKED = 32
SPILLED = {("linear-recurrence", torch.float32): 640, ("linear-recurrence", torch.bfloat16): PARKED if NEW else 64}
SPILLED |= {("selective-scan", dtype): 80 if NEW else 184 for dtype in (torch.bfloat16, torch.float32)}


def calls(op: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Arguments of forward functions."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    B, T, H, K, D, N = 1, 256, 2, 128, 256, 16
    # bfloat16 stands for packed batches with resets, float32 for plain ones.
    packed = dtype == torch.bfloat16
    place = (torch.zeros(B, T, dtype=torch.bool), torch.tensor([0, T])) if packed else (None, None)
    heads, state = zeros(B, T, H, K), torch.zeros(B, H, K, K)
    if op == "causal-conv1d":
        return [(zeros(B, T, D), zeros(D, 4), zeros(D), zeros(B, 3, D), *place, None, True)]
    if op == "gated-rms-norm":
        y = zeros(B, T, 1536)
        gates = [(y, True), (y, False), (None, True)]
        return [(y, z, zeros(1536), 1e-5, size, first) for size in (1536, 64) for z, first in gates]
    if op == "linear-recurrence":
        group = zeros(B, T, 1, K)
        return [(group, group, heads, torch.zeros(g), state, *place) for g in ((B, T, H), (B, T, H, K))]
    if op == "rotary":
        angle = torch.zeros(B, T, K // 4)
        return [(heads, angle, angle, first, first > 0, False) for first in (0, K // 2)]
    if op == "delta-rule":
        return [(heads, heads, heads, heads, heads, torch.zeros(B, T, H, K), state, *place)]
    x, b, A, d = zeros(B, T, D), zeros(B, T, N), torch.zeros(D, N), torch.zeros(D)
    return [(x, x, A, b, b, d, x, d, True, torch.zeros(B, D, N), *place)]


def backward(op: str, call: tuple[Any, ...], outputs: Any) -> tuple[Any, ...]:
    """Arguments of the backward function of a call."""
    if op == "gated-rms-norm":
        return (outputs, *call)
    if op == "rotary":
        return (outputs, *call[1:-1], True)
    if op == "linear-recurrence":
        return (*outputs, *call, outputs[1])
    if op == "selective-scan":
        return (*outputs, *call[:8], *call[9:], call[8])
    return (*outputs, *call)


def main(op: str) -> int:
    module = import_module(MODULES[op])
    jobs = []
    for dtype in (torch.bfloat16, torch.float32):
        for capability in compiling.SHARED:
            launching.capability = module.capability = lambda device, number=capability: number
            # The scan alone has kernels of its own for sequences that are split.
            launching.processors = lambda device: 132 * (op == "selective-scan")
            for call in calls(op, dtype):

                def run(call: tuple[Any, ...] = call) -> None:
                    module.BACKWARD.impl(*backward(op, call, module.FORWARD.impl(*call)))

                jobs += [(launch, capability, dtype) for launch in compiling.launches(run)]
    jobs = list(dict.fromkeys(jobs))

    def wrong(job: tuple[Any, int, torch.dtype]) -> bool:
        launch, capability, dtype = job
        found = compiling.compiled(launch, capability)
        bad = found.shared > compiling.SHARED[capability] or found.spilled > SPILLED.get((op, dtype), PARKED)
        print("WRONG" if bad else "right", capability, launch, found, flush=True)
        return bad

    with ThreadPoolExecutor(2) as pool:
        bad = list(pool.map(wrong, jobs))
    print(f"{len(bad)} kernels, {sum(bad)} wrong")
    return int(any(bad) or not bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
