"""The Triton kernel of the positive features without a GPU: `python features_triton.py interpret` or `compile`.

Run by test_performer_triton.py, each in a process of its own, for Triton decides when it is imported.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "kernels/tests"))


def interpret() -> int:
    """Compare with the reference in Triton's interpreter."""
    import interpret
    from altx_performer.kernels.positive_features.cases import call

    def calls():
        return [
            call(2, 9, 2, 5), call(1, 11, 2, 21, "state", "reset", "masked"), call(3, 1, 1, 7, "state"),
            call(2, 0, 2, 4, "state"), call(1, 6, 2, 18, "state", scale=15.0),
        ]  # fmt: skip

    interpret.OPS["positive-features"] = ("altx_performer.kernels.positive_features", "OP", calls)
    return interpret.main("positive-features")


def compile() -> int:
    """Compile for capabilities 8.0 and 9.0: within shared memory, and with next to nothing spilled from registers."""
    import compile_kernels  # sets up Triton's environment
    import torch
    from altx_performer.kernels.positive_features.triton import FORWARD

    from altx_kernels.gpu import compiling

    wrong = count = 0
    for dtype in (torch.bfloat16, torch.float32):
        for features in (266, 1024):
            x = torch.zeros(1, 64, 2, features, dtype=dtype)
            bare = dtype == torch.float32
            M, reset = (None, None) if bare else (torch.zeros(1, 2, features), torch.zeros(1, 64, dtype=torch.bool))
            for launch in compiling.launches(lambda: FORWARD.impl(x, x, x[..., 0], M, reset)):  # noqa: B023
                for capability in compiling.SHARED:
                    found = compiling.compiled(launch, capability)
                    bad = found.shared > compiling.SHARED[capability] or found.spilled > compile_kernels.PARKED
                    print("WRONG" if bad else "right", capability, launch, found)
                    wrong, count = wrong + bad, count + 1
    return int(wrong or not count)


if __name__ == "__main__":
    sys.exit({"interpret": interpret, "compile": compile}[sys.argv[1]]())
