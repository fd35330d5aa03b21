"""What the authors' code computes, in float64, from the same weights.

values/s4.safetensors was made by state-spaces/s4 at commit e757cef57d89e448c413de7325ed5601aceaac13, on a CPU, with
torch.manual_seed(0), every parameter moved by 0.1 times a normal number and inputs normal: `models/s4/s4d.py` (S4D)
for "s4d" and "s4d-long", `models/s4/s4.py` (S4Block with transposed=False and the mode "dplr" or "s4d") for the rest,
with the options of FORMS. "init" holds what `ssm(init, 16, 1, 1)` of `s4.py` returns. Their one-token steps, after
`setup_step`, differed from these by 5e-15 at most.

values/s5.safetensors was made by lindermanlab/S5 at commit 3c18fdb6b06414da35e77b94b9cd855f6a95ef17 with jax 0.10.2 in
float64, on a CPU: `SequenceLayer` (s5/layers.py) over `init_S5SSM` (s5/ssm.py) with PRNGKey(0), initialised as
s5/train.py does, every parameter moved by 0.05 times a normal number (numpy's default_rng(0)), with the options of
S5_FORMS; less its residual, and behind its norm, whose output is `x`. "init" holds the eigenvalues that it starts with
for 64 states in 4 blocks at width 48, and the standard deviations of what is drawn.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from altx_s4.config import S4Config, S4DConfig, S5Config
from altx_s4.hippo import clipped, legs
from altx_s4.s4 import build as build_s4
from altx_s4.s4d import build as build_s4d
from altx_s4.s4d import initial_A
from altx_s4.s5 import build as build_s5
from safetensors.torch import load_file

from altx.context import Context
from altx.layer import Layer
from altx.spec import BuildContext

FOLDER = Path(__file__).with_name("values")
VALUES = load_file(FOLDER / "s4.safetensors")
S5_VALUES = load_file(FOLDER / "s5.safetensors")

FORMS = {
    "s4d": {},
    "s4d-long": {},
    "s4d-bilinear": {"discretization": "bilinear"},
    "s4d-bidirectional": {"bidirectional": True},
    "s4d-legs": {},
    "s4d-real": {},
    "s4": {},
    "s4-shared": {"n_ssm": 2},
    "s4-bidirectional": {"bidirectional": True},
    "s4-long": {},
}
S5_FORMS = {
    "s5": {"state_size": 16, "blocks": 2},
    "s5-bilinear": {
        "state_size": 8, "blocks": 1, "discretization": "bilinear", "clip_eigs": True, "activation": "full_glu"
    },
    "s5-bidirectional": {"state_size": 8, "blocks": 2, "bidirectional": True, "activation": "half_glu2"},
    "s5-complex": {"state_size": 12, "blocks": 1, "C_init": "complex_normal", "activation": "gelu"},
}  # fmt: skip


def values(case: str, among: dict[str, torch.Tensor] = VALUES) -> dict[str, torch.Tensor]:
    return {name.removeprefix(case + "/"): value for name, value in among.items() if name.startswith(case + "/")}


def translated(case: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their weights as ours."""
    if case.startswith("s4d") and "layer.D" in weights:
        # S4Block has a B, which here is part of C, and the other sign of A's imaginary part.
        C = torch.view_as_complex(weights["layer.kernel.C"]) * torch.view_as_complex(weights["layer.kernel.B"])
        C = torch.view_as_real(C)
        return {
            "D": weights["layer.D"][0], "kernel.C": C if len(C) > 1 else C[0],
            "kernel.log_dt": weights["layer.kernel.inv_dt"][:, 0], "kernel.log_A_real": weights["layer.kernel.A_real"],
            "kernel.A_imag": -weights["layer.kernel.A_imag"],
            "output_linear.0.weight": weights["output_linear.0.weight"],
            "output_linear.0.bias": weights["output_linear.0.bias"],
        }  # fmt: skip
    # The minimal S4D has a Conv1d of width 1 where here is a Linear.
    return {name: w[..., 0] if name == "output_linear.0.weight" and w.dim() == 3 else w for name, w in weights.items()}


def ours(case: str, weights: dict[str, torch.Tensor]) -> Layer:
    states = weights["kernel.A_imag" if "D" in weights and "kernel.A_imag" in weights else "layer.kernel.A_imag"]
    config, build = (S4DConfig, build_s4d) if case.startswith("s4d") else (S4Config, build_s4)
    settings = config(state_size=2 * states.shape[-1], **FORMS[case])
    dim = weights["output_linear.0.weight"].shape[1]
    layer = build(settings, BuildContext(dim=dim)).double()
    layer.load_state_dict(translated(case, weights))
    return layer


@pytest.mark.parametrize("case", FORMS)
def test_it_computes_what_the_authors_code_does(case):
    found = values(case)
    weights = {name.removeprefix("weights/"): w for name, w in found.items() if name.startswith("weights/")}
    layer = ours(case, weights)
    assert_computes(layer, found, FORMS[case])


def assert_computes(layer, found, settings):
    ctx = Context(causal=not settings.get("bidirectional", False))
    assert found["y"].std() > 0.02
    torch.testing.assert_close(layer(found["x"], ctx).y, found["y"], atol=1e-12, rtol=0)
    layer = layer.float()
    torch.testing.assert_close(layer(found["x"].float(), ctx).y.double(), found["y"], atol=3e-6, rtol=0)


@pytest.mark.parametrize("case", S5_FORMS)
def test_s5_computes_what_the_authors_code_does(case):
    found = values(case, S5_VALUES)
    weights = {name.removeprefix("weights/"): w for name, w in found.items() if name.startswith("weights/")}
    layer = build_s5(S5Config(**S5_FORMS[case]), BuildContext(dim=len(weights["D"]))).double()
    layer.load_state_dict(weights)
    assert_computes(layer, found, S5_FORMS[case])


def test_s5_starts_as_in_the_authors_code():
    theirs = values("init", S5_VALUES)
    torch.manual_seed(0)
    config = {"state_size": 64, "blocks": 4}
    layer = build_s5(S5Config(**config), BuildContext(dim=48))
    for name in ("Lambda_re", "Lambda_im"):
        torch.testing.assert_close(getattr(layer, name).detach().double(), theirs[name], atol=1e-4, rtol=1e-4)
    lecun = build_s5(S5Config(C_init="lecun_normal", **config), BuildContext(dim=48))
    drawn = {"B": layer.B, "C": layer.C, "out2": layer.out2.weight, "C-lecun": lecun.C}
    for name, parameter in drawn.items():
        assert parameter.std().item() == pytest.approx(theirs[f"{name}.std"].item(), rel=0.05), name


@pytest.mark.parametrize("case", ["s4", "s4-long"])
def test_a_checkpoint_whose_C_is_made_for_one_length_gets_its_C_back(case):
    found = values(case)
    weights = {name.removeprefix("weights/"): w for name, w in found.items() if name.startswith("weights/")}
    C = weights["layer.kernel.C"]
    weights |= {f"layer.kernel.{name}": found[f"truncated/{name}"] for name in ("C", "l_kernel")}
    assert (weights["layer.kernel.C"] - C).abs().max() > 0.1 or case == "s4-long"
    layer = ours(case, weights)
    torch.testing.assert_close(layer.layer.kernel.C.detach(), C, atol=1e-11, rtol=0)
    torch.testing.assert_close(layer(found["x"]).y, found["y"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("init", ["lin", "inv", "real", "legs"])
def test_s4d_starts_as_in_the_authors_code(init):
    theirs = values(f"init/diag-{init}")
    A, B = initial_A(init, 8)
    # The conjugate, which stands for the same pair.
    sign = torch.tensor([1.0, -1.0])
    torch.testing.assert_close(A.mT * sign, theirs["A"].float(), atol=1e-5, rtol=1e-5)
    assert_same_up_to_sign(B.mT * sign, theirs["B"].float())


def test_s4_starts_as_in_the_authors_code():
    theirs, found = values("init/legs"), legs(16)
    torch.testing.assert_close(found.a.mT, theirs["A"], atol=1e-5, rtol=1e-5)
    assert_same_up_to_sign(found.p.mT.float(), theirs["P"].float())
    assert_same_up_to_sign(clipped(found.b).mT.float(), theirs["B"].float())


def assert_same_up_to_sign(found, expected):
    """The sign of an eigenvector is LAPACK's whim there."""
    sign = torch.sign((found * expected).sum(-1, keepdim=True))
    torch.testing.assert_close(found * sign, expected, atol=1e-4, rtol=1e-4)


def test_legs_is_diagonalised():
    n = 16
    found = legs(n)
    a, p, b = (torch.complex(*z) for z in (found.a, found.p, found.b))
    k = torch.arange(n, dtype=torch.float64)
    root = (2 * k + 1).sqrt()
    A = -(torch.outer(root, root).tril() - torch.diag(k))
    both = lambda z: torch.cat([z, z.conj()], -1)  # noqa: E731
    V = both(found.V)
    torch.testing.assert_close((V @ (torch.diag(both(a)) - torch.outer(both(p), both(p).conj())) @ V.conj().T).real, A)
    torch.testing.assert_close((V @ both(b)).real, root)
