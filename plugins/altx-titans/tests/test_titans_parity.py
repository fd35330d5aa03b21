"""Beside the code of others: what it gave, in float64, for its weights.

titans_reference: titans-pytorch 0.5.5, NeuralMemory(chunk_size=1, batch_size=C, activation=SiLU(), pre_rmsnorm=False),
every parameter moved by 0.2 randn after manual_seed(0). ttt_reference: test-time-training/ttt-lm-pytorch cd831db,
TTTLinear and TTTMLP of ttt.py in float64 with the angles of its rotary embedding in float64, every parameter moved by
0.3 randn. Keys are the settings, a slash, and the parameter's name, x or y.
"""

from pathlib import Path

import pytest
import torch
from altx_titans.config import TitansConfig, TTTConfig
from altx_titans.titans import Titans
from altx_titans.ttt import TTT
from safetensors.torch import load_file

HERE = Path(__file__).parent
TITANS, TTTS = (load_file(HERE / f"{name}_reference.safetensors") for name in ("titans", "ttt"))


def settings(values):
    return sorted({key.split("/")[0] for key in values})


def compare(memory, values, label, dtype, tolerance):
    own = {key.split("/")[1]: value for key, value in values.items() if key.startswith(f"{label}/")}
    x, y = own.pop("x"), own.pop("y")
    memory.load_state_dict(own)
    memory = memory.to(dtype)
    with torch.no_grad():
        found = memory.scan(x.to(dtype), memory.init_state(len(x), dtype=dtype)).read.value
    torch.testing.assert_close(found.double(), y, rtol=tolerance, atol=tolerance)


# Its steps, four at the same weights and 1 / (1 - eta) of each, are larger than its curvature allows, and amplify
# rounding from chunk to chunk: titans-pytorch in float32 is 3.3e-5 from itself in float64 there, and this 1.7e-5. With
# the bounds of altx's defaults it is like the others; see below.
AMPLIFIES = "16-1-16-2-4.0-1-1-4"
PRECISIONS = [(torch.float64, 1e-8), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("label", settings(TITANS))
def test_titans_is_titans_pytorch(label, dtype, tolerance):
    if dtype == torch.float32 and label == AMPLIFIES:
        tolerance = 4e-5
    compare(titans(label), TITANS, label, dtype, tolerance)


def titans(label, **bounds):
    """With titans-pytorch's settings, but for `bounds`."""
    dim, heads, width, depth, expansion, norm, momentum, chunk = label.split("-")
    unbounded = {"max_lr": 1.0, "max_grad_norm": None, "norm_eps": 1e-5, "dampening": False}
    config = TitansConfig(
        heads=int(heads), head_dim=int(width), depth=int(depth), expansion=float(expansion),
        residual_norm=norm == "1", momentum=momentum == "1", chunk=int(chunk), order="write-read", qk_norm="none",
        **unbounded | bounds,
    )  # fmt: skip
    return Titans(config, int(dim)).double()


def test_bounded_steps_do_not_amplify_rounding():
    memory = titans(AMPLIFIES, max_lr="auto", norm_eps=0.01, dampening=True)
    x, given = TITANS[f"{AMPLIFIES}/x"], f"{AMPLIFIES}/"
    values = {key.removeprefix(given): value for key, value in TITANS.items() if key.startswith(given)}
    memory.load_state_dict({name: value for name, value in values.items() if name not in "xy"})
    with torch.no_grad():
        exact = memory.scan(x, memory.init_state(len(x), dtype=torch.float64)).read.value
        memory = memory.float()
        found = memory.scan(x.float(), memory.init_state(len(x), dtype=torch.float32)).read.value
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("label", settings(TTTS))
def test_ttt_is_the_official_layer(label, dtype, tolerance):
    layers, dim, heads, chunk, gate = map(int, label.split("-"))
    config = TTTConfig(layers=layers, heads=heads, chunk=chunk, gate=bool(gate))
    compare(TTT(config, dim).double(), TTTS, label, dtype, tolerance)
