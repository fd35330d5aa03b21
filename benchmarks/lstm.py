"""A token mixer for benchmarks: an LSTM (Hochreiter & Schmidhuber 1997), as PyTorch has it, as a plugin of one file."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from altx import MixerSpec, hookimpl
from altx.capabilities import Capabilities
from altx.config import Config
from altx.context import Context
from altx.layer import FRESH, Layer, Output, advanced
from altx.spec import BuildContext
from altx.state import Leaf, State


class LSTMConfig(Config):
    """Nothing to set: as many units as the model is wide."""


def capabilities(config: LSTMConfig) -> Capabilities:
    """No masks and no resets, which these benchmarks do not need."""
    return Capabilities(growth="constant", rollback="snapshot", masked=False, reset=False)


class LSTM(Layer):
    """One layer of `torch.nn.LSTM`. State: hidden and cell (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        self.capabilities = capabilities(LSTMConfig())

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        zeros = torch.zeros(batch, self.lstm.hidden_size, device=device, dtype=dtype)
        seen = torch.zeros(batch, dtype=torch.int64, device=device)
        return State({"hidden": zeros, "cell": zeros.clone()}, {"hidden": Leaf(), "cell": Leaf()}, seen=seen)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if not x.shape[1]:
            return Output(x, state)
        if state is None:
            return Output(self.lstm(x)[0])
        hidden, cell = state["hidden"], state["cell"]
        if x.shape[1] == 1:  # at half the cost of a sequence of one
            hidden, cell = torch.lstm_cell(x[:, 0], (hidden, cell), *self.lstm.parameters())
            y = hidden[:, None]
        else:
            y, (last_hidden, last_cell) = self.lstm(x, (hidden[None], cell[None]))
            hidden, cell = last_hidden[0], last_cell[0]
        return Output(y, state.replace(hidden=hidden, cell=cell, seen=advanced(state.seen, x, ctx)))


def build(config: LSTMConfig, ctx: BuildContext) -> Layer:
    return LSTM(ctx.dim)


@hookimpl
def altx_token_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            "lstm",
            summary="Long short-term memory",
            build="lstm:build",
            config="lstm:LSTMConfig",
            capabilities="lstm:capabilities",
        )
    ]
