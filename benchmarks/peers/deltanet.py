"""altx-linear-attention's delta rules beside transformers' layers of Qwen3-Next and Kimi Linear, in plain PyTorch as
they run on a CPU, and beside fla's chunks in plain PyTorch. Heads are 128 wide, as many as fill the model width; of
Gated DeltaNet there is also one with twice as many value heads, as Qwen3-Next has."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peers import Case, layer


def cases(dim: int, length: int) -> list[Case]:
    try:
        from altx_linear_attention import convert
    except ImportError:
        return []
    found = []
    width = min(128, dim)
    for ratio in (1, 2):
        heads = dim // width
        ours = layer(
            "gated-deltanet", dim, heads=heads, value_heads=ratio * heads, head_dim=width, expand_v=1.0, norm_eps=1e-6
        )
        sizes = {"num_key_heads": heads, "num_value_heads": ratio * heads, "key_head_dim": width}
        theirs = of_transformers("qwen3_next", "Qwen3NextGatedDeltaNet", dim, value_head_dim=width, **sizes)
        if theirs is not None:
            ours.load_state_dict(convert.gated_deltanet(theirs.state_dict(), heads=heads))
        name = "gated-deltanet" if ratio == 1 else f"gated-deltanet {heads}:{2 * heads}"
        found.append(Case(name, lambda x, of=ours: of(x).y, ours, called("transformers Qwen3-Next", theirs)))
    kda = layer("kda", dim, heads=dim // width, head_dim=width)
    kimi = of_transformers("kimi_linear", "KimiLinearDeltaAttention", dim, num_heads=dim // width, head_dim=width)
    if kimi is not None:
        weights = kda.state_dict()
        for name in ("A_log", "dt_bias"):
            getattr(kimi.forget_gate, name).data.copy_(weights[name].reshape(getattr(kimi.forget_gate, name).shape))
        kda.load_state_dict(convert.kda(kimi.state_dict()))
    found.append(Case("kda", lambda x: kda(x).y, kda, called("transformers Kimi Linear", kimi)))
    plain = layer("deltanet", dim)
    peers = {} if importlib.util.find_spec("fla") is None else {"fla, chunks in torch": by_fla(plain)}
    return [*found, Case("deltanet", lambda x: plain(x).y, plain, peers)]


def called(name: str, theirs: nn.Module | None) -> dict[str, Callable[[Tensor], Tensor]]:
    return {} if theirs is None else {name: theirs}


def of_transformers(model: str, name: str, dim: int, **sizes: int) -> Any:
    """A layer of a model of transformers, without the kernels for GPUs that it prefers where they are installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    hidden = {name: sys.modules.pop(name, None) for name in ("fla", "causal_conv1d")}
    sys.modules.update(dict.fromkeys(hidden))  # None is what cannot be imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    for other, package in hidden.items():
        if package is None:
            del sys.modules[other]
        else:
            sys.modules[other] = package
    config = getattr(module, name.split("Gated")[0].split("Delta")[0] + "Config")
    settings = {f"linear_{key}": value for key, value in sizes.items()}
    return getattr(module, name)(config(hidden_size=dim, num_hidden_layers=2, **settings), 0)


def by_fla(module: Any) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        naive = importlib.import_module("fla.ops.delta_rule.naive")

    def run(x: Tensor) -> Tensor:
        def heads(name: str, width: int) -> Tensor:
            z, taps = getattr(module, f"{name}_proj")(x).mT, getattr(module, f"{name}_conv1d").weight
            z = F.silu(F.conv1d(F.pad(z, (taps.shape[2] - 1, 0)), taps, groups=len(taps)))
            return z.mT.unflatten(-1, (-1, width)).transpose(1, 2)

        q, k = (
            z * torch.rsqrt((z * z).sum(-1, keepdim=True) + 1e-6) for z in (heads(n, module.head_dim) for n in "qk")
        )
        beta = module.b_proj(x).sigmoid().transpose(1, 2)
        o, _ = naive.delta_rule_chunkwise(q, k, heads("v", module.value_dim), beta, chunk_size=32)
        norm = module.o_norm
        o = F.rms_norm(o.transpose(1, 2), (module.value_dim,), norm.weight, norm.eps)
        y: Tensor = module.o_proj(o.flatten(2))
        return y

    return run
