"""Other libraries' names and layouts of the weights of one layer, into those of the mixers here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

RENAMED = {
    "in_proj_z": "g_proj",
    "in_proj_b": "b_proj",
    "in_proj_a": "a_proj",
    "norm": "o_norm",
    "out_proj": "o_proj",
    "f_proj.0": "f_a_proj",
    "f_proj.1": "f_b_proj",
    "g_proj.0": "g_a_proj",
    "g_proj.1": "g_b_proj",
}


def gated_deltanet(weights: Mapping[str, Tensor], *, heads: int) -> dict[str, Tensor]:
    """Weights of `gated-deltanet` from those of a layer of flash-linear-attention, Qwen3-Next, Qwen3.5, Olmo-Hybrid.

    Args:
        weights: by the names that they have within the layer, e.g. "in_proj_qkvz.weight".
        heads: H, key heads, whose blocks of rows Qwen3-Next's `in_proj_qkvz` and `in_proj_ba` consist of.
    """
    found = dict(weights)
    if "in_proj_qkvz.weight" in found:
        # Rows: of each key head its q, k, the values of its value heads and their gates; and beta before alpha.
        mixed, betas = (found.pop(f"in_proj_{name}.weight").unflatten(0, (heads, -1)) for name in ("qkvz", "ba"))
        value_width = found["norm.weight"].shape[0] * (betas.shape[1] // 2)
        key_width = mixed.shape[1] // 2 - value_width
        parts = mixed.split([key_width, key_width, value_width, value_width], 1) + betas.chunk(2, 1)
        for name, part in zip("qkvgba", parts, strict=True):
            found[f"{name}_proj.weight"] = part.flatten(0, 1)
    if "in_proj_qkv.weight" in found:
        values = found["out_proj.weight"].shape[1]
        found.update(_split(found.pop("in_proj_qkv.weight"), values, "proj"))
    return _common(found)


def kda(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `kda` from those of one layer of Kimi-Linear, as published or in transformers, or of
    flash-linear-attention.

    Args:
        weights: by the names that they have within the layer, e.g. "f_a_proj.weight".
    """
    found = {name.removeprefix("forget_gate."): weight for name, weight in weights.items()}
    found["A_log"] = found["A_log"].flatten()
    return _common(found)


def _common(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut one convolution of q, k and v into three, and rename."""
    if "conv1d.weight" in weights:
        values = weights.get("o_proj.weight", weights.get("out_proj.weight"))
        assert values is not None
        weights.update(_split(weights.pop("conv1d.weight"), values.shape[1], "conv1d"))
    return {_renamed(name): weight for name, weight in weights.items()}


def _split(rows: Tensor, values: int, kind: str) -> dict[str, Tensor]:
    """Rows of q, of as many of k, and `values` of v."""
    keys = (len(rows) - values) // 2
    parts = rows.split([keys, keys, values])
    return {f"{name}_{kind}.weight": part for name, part in zip("qkv", parts, strict=True)}


def _renamed(name: str) -> str:
    module, dot, kind = name.rpartition(".")
    return RENAMED.get(module, module) + dot + kind
