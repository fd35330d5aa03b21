"""The Triton kernels of this plugin without a GPU: `python rwkv_triton.py interpret|compile OP`.

Run by test_rwkv_triton.py, each in a process of its own, for Triton decides when it is imported.
"""

import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3] / "kernels/tests"))


def interpret(op: str) -> int:
    """Compare with the reference in Triton's interpreter."""
    import interpret

    package = f"altx_rwkv.kernels.{op.replace('-', '_')}"
    example = import_module(f"{package}.cases").example

    def calls() -> list[dict[str, Any]]:
        if op == "wkv4":
            made = [
                example(2, 9, 5), example(2, 11, 37, "state", "reset", "lengths"), example(2, 1, 7, "state"),
                example(2, 0, 5, "state"), example(1, 18, 7, "state", "reset", cuts=[0, 7, 7, 8, 18]),
            ]  # fmt: skip
        else:
            made = [
                example(2, 9, 5, 3), example(2, 19, 140, 2, "state", "reset"), example(2, 1, 7, 6, "state"),
                example(2, 0, 5, 3, "state"),
            ]  # fmt: skip
        return [dict(one.arguments) for one in made]

    interpret.OPS[op] = (package, "OP", calls)
    return interpret.main(op)


def passes(op: str, dtype: Any) -> None:
    """Forward and backward pass: bfloat16 stands for calls with every option, float32 for those with none."""
    import torch

    module = import_module(f"altx_rwkv.kernels.{op.replace('-', '_')}.triton")
    B, T, D = 2, 64, 256
    x, w, bare = torch.zeros(B, T, D, dtype=dtype), torch.zeros(D), dtype == torch.float32
    reset = None if bare else torch.zeros(B, T, dtype=torch.bool)
    if op == "token-shift":
        inputs = (x, torch.zeros(6, D, dtype=dtype), None if bare else x[:, 0], reset)
        module.BACKWARD.impl(module.FORWARD.impl(*inputs), *inputs)
        return
    options = (None, None, None) if bare else (torch.zeros(B, 2, D), reset, torch.full((B,), T))
    for given in ((w, w, x, x, *options, None), (w, w, x[:1], x[:1], None, None, None, torch.tensor([0, 9, T]))):
        y, end, kept = module.FORWARD.impl(*given, True)
        module.BACKWARD.impl(y, end, *given[:4], *given[5:], kept)


def compile(op: str) -> int:
    """Compile for capabilities 8.0 and 9.0: within shared memory, and with next to nothing spilled from registers."""
    import compile_kernels  # sets up Triton's environment
    import torch

    from altx_kernels.gpu import compiling

    wrong = count = 0
    for dtype in (torch.bfloat16, torch.float32):
        for launch in dict.fromkeys(compiling.launches(partial(passes, op, dtype))):
            for capability in compiling.SHARED:
                found = compiling.compiled(launch, capability)
                bad = found.shared > compiling.SHARED[capability] or found.spilled > compile_kernels.PARKED
                print("WRONG" if bad else "right", capability, launch, found)
                wrong, count = wrong + bad, count + 1
    return int(bool(wrong) or not count)


if __name__ == "__main__":
    sys.exit({"interpret": interpret, "compile": compile}[sys.argv[1]](sys.argv[2]))
