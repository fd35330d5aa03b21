"""Compare an op's backend "triton" with its reference in Triton's interpreter: `python interpret.py OP`.

Run by test_triton_interpreted.py, and by those of plugins. The interpreter takes milliseconds for a kernel's line, so
the calls are few and small: every option, both with whole sequences a program and with sequences split.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

# Before Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

import torch

from altx_kernels.examples import Example, randn
from altx_kernels.gpu import launching
from altx_kernels.trees import leaves
from altx_kernels.verify import verify

CUTS = [0, 17, 17, 18, 35]


def conv(T: int, *, width: int = 4, bare: bool = False, **options: Any) -> dict[str, Any]:
    B = 1 if "cu_seqlens" in options else 2
    made = {"x": randn(B, T, 5), "weight": randn(5, width, seed=1), "bias": None if bare else randn(5, seed=2)}
    return made | {"activation": not bare} | options


def convs() -> list[dict[str, Any]]:
    reset = torch.arange(35)[None] % 11 == 3
    cuts = torch.tensor(CUTS)
    return [
        conv(35, bare=True, width=3),
        conv(35, reset=reset.expand(2, -1), lengths=torch.tensor([2, 33]), initial_state=randn(2, 3, 5, seed=3)),
        conv(35, cu_seqlens=cuts, reset=reset, initial_state=randn(4, 3, 5, seed=3)),
        conv(1, initial_state=randn(2, 3, 5, seed=3)),
        conv(0, initial_state=randn(2, 3, 5, seed=3)),
        conv(4, width=1, bare=True),
    ]


def norms() -> list[dict[str, Any]]:
    def norm(*shape: int, groups: int = 1, gate: bool = True, gate_first: bool = True) -> dict[str, Any]:
        made = {"y": randn(*shape), "z": randn(*shape, seed=1) if gate else None, "weight": randn(shape[-1], seed=2)}
        return made | {"eps": 1e-5, "group_size": shape[-1] // groups, "gate_first": gate_first}

    return [
        norm(2, 35, 15, groups=3), norm(2, 300, 40, gate_first=False), norm(1, 9, 2, 6, groups=2, gate=False),
        norm(3, 2100), norm(1, 1, 12, groups=4, gate_first=False), norm(2, 0, 8),
    ]  # fmt: skip


def states(B: int, T: int, *options: str, K: int = 5, V: int = 18) -> dict[str, Any]:
    """What recurrences with a state of matrices may be given."""
    cuts = CUTS if "packed" in options else None
    rows = B if cuts is None else len(cuts) - 1
    return {
        "initial_state": randn(rows, 2, K, V, seed=5) if "state" in options else None,
        "reset": randn(B, T, seed=6, grad=False) > 1 if "reset" in options else None,
        "cu_seqlens": None if cuts is None else torch.tensor(cuts),
    }


def decays(B: int, T: int, kind: str, K: int = 5) -> torch.Tensor | None:
    if kind == "none":
        return None
    g = torch.nn.functional.logsigmoid(2 * randn(B, T, 2, *(K,) * (kind == "channel"), seed=1, grad=False))
    g[:, 3::9] = -torch.inf
    return g.requires_grad_()


def recurrences() -> list[dict[str, Any]]:
    calls = [(2, 35, "state"), (1, 35, "reset", "packed"), (1, 1, "state", "reset"), (2, 0, "state")]
    made = [
        {"q": randn(B, T, 1, 5, seed=2), "k": randn(B, T, 1, 5, seed=3), "v": randn(B, T, 2, 18, seed=4)}
        | {"g": decays(B, T, kind)} | states(B, T, *options)
        for kind in ("none", "head", "channel") for B, T, *options in calls
    ]  # fmt: skip
    # More key channels than a program holds.
    wide = {"q": randn(1, 6, 1, 270, seed=2), "k": randn(1, 6, 1, 270, seed=3) / 16, "v": randn(1, 6, 2, 18, seed=4)}
    wide |= {"g": decays(1, 6, "channel", K=270)} | states(1, 6, "state", "reset", K=270)
    return [*made, wide]


def deltas() -> list[dict[str, Any]]:
    calls = [(2, 35, "channel", "state"), (1, 35, "head", "reset", "state", "packed"), (1, 1, "none"), (1, 0, "head")]
    return [
        {name: randn(B, T, 2, 5, seed=index) / 3 for index, name in enumerate("qkab")}
        | {"v": randn(B, T, 2, 18, seed=7), "g": decays(B, T, kind)} | states(B, T, *options)
        for B, T, kind, *options in calls
    ]  # fmt: skip


def scan(B: int, T: int, N: int, *options: str, cuts: list[int] | None = None) -> dict[str, Any]:
    D = 5
    dt = randn(B, T, D, seed=1, grad=False)
    dt[:, 2::7] = -torch.inf
    rows = B if cuts is None else len(cuts) - 1
    full = "full" in options
    return {
        "x": randn(B, T, D, seed=3), "dt": (dt if full else dt.exp()).requires_grad_(),
        "A": (-randn(D, N, seed=4, grad=False).exp()).requires_grad_(),
        "B": randn(B, T, N, seed=5), "C": randn(B, T, N, seed=6), "softplus": full,
        "D": randn(D, seed=7) if full else None, "z": randn(B, T, D, seed=8) if full else None,
        "dt_bias": randn(D, seed=9) if full else None,
        "initial_state": randn(rows, D, N, seed=10) if "state" in options else None,
        "reset": randn(B, T, seed=11, grad=False) > 1 if "reset" in options else None,
        "cu_seqlens": None if cuts is None else torch.tensor(cuts),
    }  # fmt: skip


def scans() -> list[dict[str, Any]]:
    return [
        scan(1, 100, 3), scan(1, 35, 3, "full", "reset", "state"), scan(1, 35, 2, "full", "state", cuts=CUTS),
        scan(2, 1, 16, "full", "state", "reset"), scan(2, 0, 3, "state"),
    ]  # fmt: skip


def rotations() -> list[dict[str, Any]]:
    def rotation(T: int, E: int, rows: int = 1, **options: Any) -> dict[str, Any]:
        angle = randn(rows, T, E, seed=1, grad=False)
        return {"x": randn(2, T, 3, 19), "cos": angle.cos(), "sin": angle.sin()} | options

    return [rotation(5, 9), rotation(5, 3, rows=2, first=4, interleave=True), rotation(1, 8), rotation(0, 2)]


OPS: dict[str, tuple[str, str, Callable[[], list[dict[str, Any]]]]] = {
    "causal-conv1d": ("altx_kernels.causal_conv1d", "CAUSAL_CONV1D", convs),
    "gated-rms-norm": ("altx_kernels.gated_rms_norm", "GATED_RMS_NORM", norms),
    "linear-recurrence": ("altx_kernels.linear_recurrence", "OP", recurrences),
    "delta-rule": ("altx_kernels.delta_rule", "DELTA_RULE", deltas),
    "rotary": ("altx_attention.kernels.rotary", "OP", rotations),
    "selective-scan": ("altx_mamba.kernels.selective_scan", "OP", scans),
}


def main(name: str) -> int:
    module, attribute, calls = OPS[name]
    op = getattr(import_module(module), attribute)
    wrong = 0
    # No processor is occupied by anything, a great many by nothing: sequences whole, and split.
    for processors, dtype in [(0, torch.float32), (132, torch.float32), (132, torch.bfloat16)]:
        launching.processors = lambda device, number=processors: number
        made = [Example(f"call {index}", call) for index, call in enumerate(calls())]
        if dtype == torch.bfloat16:
            made = made[:2]
        some: Any = SimpleNamespace(
            name=op.name, reference=op.reference, backends=op.backends, examples=lambda m=made: m
        )
        for finding in verify(some, ["triton"], dtypes=[dtype], layouts=["sliced"], devices=["cpu"]):
            print(finding, finding.calls, f"error {finding.error:.2g}, {finding.seconds:.1f} s")
            wrong += finding.status != "passed" or finding.calls < 2 * len(made)
    if name != "selective-scan":
        wrong += not compiles(op, calls()[1])
    return wrong


def compiles(op: Any, call: dict[str, Any]) -> bool:
    """Whether a compiled function gives what an eager one does, as one graph, gradients included."""
    arguments = {
        n: v.detach().float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in call.items()
    }
    x = next(iter(arguments.values())).requires_grad_()

    def run(**kwargs: Any) -> torch.Tensor:
        y, *state = leaves(op(**kwargs, backend="triton"), "output").values()
        return y.square().sum() + sum(s.sum() for s in state)

    gradients = [
        torch.autograd.grad(fn(**arguments), x)[0]
        for fn in (run, torch.compile(run, backend="aot_eager", fullgraph=True))
    ]
    return torch.equal(*gradients)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
