"""With the weights of a composed model, the authors' package `rwkv` gives the same logits, whole and token by token.

It runs in a process of its own, since what it does depends on the environment, and it changes torch's settings. Their
first norm, `ln0`, sees nothing but the embedding of a token: it is given to them, and applied to our table.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from altx.compose import compose

pytest.importorskip("rwkv")

VOCAB, LAYERS, LENGTH = 29, 3, 40
SETTINGS = {4: {}, 5: {"head_dim": 8}, 6: {"head_dim": 16}, 7: {"head_dim": 64}}
THEIRS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from rwkv.model import RWKV
from safetensors.torch import save_file
path, tokens = sys.argv[1], list(map(int, sys.argv[2].split(",")))
model = RWKV(path, "cpu fp32")
whole, _ = model.forward(list(tokens), None, full_output=True)
state, steps = None, []
for token in tokens:
    logits, state = model.forward([token], state)
    steps.append(logits.clone())
save_file({"whole": whole.contiguous(), "steps": torch.stack(steps)}, path + ".safetensors")
"""


def exported(model: torch.nn.Module, ln0: torch.nn.LayerNorm, table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Our weights under the names of the authors' files."""
    theirs = {"emb.weight": table, "blocks.0.ln0.weight": ln0.weight.data, "blocks.0.ln0.bias": ln0.bias.data}
    for name, weight in model.state_dict().items():
        for old, new in (
            ("body.inner.layers.", "blocks."), (".layers.0.norm.", ".ln1."), (".layers.1.norm.", ".ln2."),
            (".layers.0.body.", ".att."), (".layers.1.body.", ".ffn."),
        ):  # fmt: skip
            name = name.replace(old, new)
        theirs["ln_out" + name[4:] if name.startswith("norm.") else name] = weight.clone()
    theirs.pop("input.weight")
    return theirs


@pytest.mark.parametrize("version", SETTINGS)
def test_logits_equal_those_of_the_authors_package(version: int, tmp_path: Path) -> None:
    torch.manual_seed(version)
    dim = 128 if version == 7 else 48
    model = compose(
        {
            "dim": dim, "layers": LAYERS, "mixer": {"name": f"rwkv{version}", **SETTINGS[version]}, "norm": "layer",
            "final_norm": "layer", "feed_forward": f"rwkv{version}-channel", "norm_eps": 1e-5,
            "input": {"kind": "tokens", "vocab": VOCAB}, "head": {"kind": "language-model", "tie": False},
        }
    ).eval()  # fmt: skip
    ln0, table = torch.nn.LayerNorm(dim), torch.randn(VOCAB, dim)
    with torch.no_grad():
        for parameter in [*model.parameters(), *ln0.parameters()]:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.input.weight.copy_(ln0(table))
    torch.save(exported(model, ln0, table), tmp_path / "weights.pth")
    tokens = torch.randint(VOCAB, (1, LENGTH))
    path = tmp_path / ("weights" if version == 7 else "weights.pth")
    env = os.environ | {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int(version == 7))}
    command = [sys.executable, "-c", THEIRS, str(path), ",".join(map(str, tokens[0].tolist()))]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    theirs = load_file(f"{path}.safetensors")
    with torch.no_grad():
        whole, state, steps = model(tokens).y[0], model.init_state(1), []
        for token in tokens.split(1, 1):
            out = model(token, state=state)
            steps.append(out.y[0])
            state = out.state
    assert whole.std() > 0.3
    torch.testing.assert_close(whole, theirs["whole"], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(steps), theirs["steps"], atol=1e-5, rtol=0)
