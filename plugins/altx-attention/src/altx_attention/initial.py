"""How weights start."""

from __future__ import annotations

from torch import nn


def as_in_gpt2(layer: nn.Module, num_layers: int) -> None:
    """Radford et al. 2019, section 2.3: normal with std 0.02, that of the output divided by the square root of the
    number of residual branches, here two per block; biases at 0."""
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5 if name == "o_proj.weight" else 0.02)
