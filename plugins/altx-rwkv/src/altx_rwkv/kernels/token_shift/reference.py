"""The token shift as the papers write it: the oracle, and what runs anywhere.

Paper: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048, equation 11, with 1 - mu as
`mix`, as in RWKV-6 and RWKV-7.

B rows, T tokens, D channels, N mixtures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.arguments import precise


def token_shift(x: Tensor, mix: Tensor, *, initial_state: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """As `token_shift.token_shift`."""
    dtype, out = precise(x, mix, initial_state), x.dtype
    x, mix = x.to(dtype), mix.to(dtype)
    first = x.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state.to(dtype)
    before = torch.cat([first[:, None], x[:, :-1]], 1)[:, : x.shape[1]]
    if reset is not None:
        before = before.masked_fill(reset[..., None], 0)
    return torch.stack([torch.lerp(x, before, one) for one in mix]).to(out)
