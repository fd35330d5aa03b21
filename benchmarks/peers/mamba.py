"""altx-mamba beside the layers of transformers and mambapy, with the same weights. Nobody offers Mamba-3 on a CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from peers import Case, layer


def cases(dim: int, length: int) -> list[Case]:
    return [case("mamba", dim), case("mamba2", dim), case("mamba3", dim)]


def case(name: str, dim: int) -> Case:
    ours = layer(name, dim)
    return Case(name, lambda x: ours(x).y, ours, PEERS[name](ours, dim) if name in PEERS else {})


def mamba(ours: nn.Module, dim: int) -> dict[str, Callable[[Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    try:
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        theirs = MambaMixer(MambaConfig(hidden_size=dim, num_hidden_layers=1), 0)
        theirs.load_state_dict(ours.state_dict())
        found["transformers"] = theirs
    except ImportError:
        pass
    try:
        from mambapy import mamba as mambapy

        other = mambapy.MambaBlock(mambapy.MambaConfig(d_model=dim, n_layers=1))
        other.load_state_dict(ours.state_dict())
        found["mambapy"] = other
    except ImportError:
        pass
    return found


def mamba2(ours: nn.Module, dim: int) -> dict[str, Callable[[Tensor], Tensor]]:
    try:
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    except ImportError:
        return {}
    theirs = Mamba2Mixer(Mamba2Config(hidden_size=dim, num_heads=2 * dim // 64, head_dim=64, n_groups=1), 0)
    theirs.load_state_dict(ours.state_dict())
    return {"transformers": theirs}


PEERS = {"mamba": mamba, "mamba2": mamba2}
