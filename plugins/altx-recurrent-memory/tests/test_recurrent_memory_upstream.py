"""With the same weights, it is the authors' code, and the package recurrent-memory-transformer-pytorch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from altx_recurrent_memory.config import RecurrentMemoryConfig
from altx_recurrent_memory.memory import RecurrentMemory
from safetensors.torch import load_file
from torch import Tensor, nn

from altx.capabilities import Capabilities
from altx.compose import compose
from altx.context import Context
from altx.layer import FRESH, Layer, Output
from altx.segment_loop import SegmentLoop
from altx.state import State
from altx.testing.case import difference

OFFICIAL = load_file(Path(__file__).with_name("recurrent_memory_upstream_values.safetensors"))
"""MemoryCell of github.com/booydar/recurrent-memory-transformer, modeling_rmt/language_modeling.py at commit
9d0ebe1778687995697fe68e886bc1dcf0e45e1c, in float64: around transformers' LlamaForCausalLM (16 wide, 2 layers, 2 heads
over 1, its rotary angles and norms computed in float64), with 3 memory tokens, over 17 tokens in RecurrentWrapper's
segments of 5. Weights, named as ours, are drawn with seed 0 and std 0.2. "gradient" is that of the sum of logits
weighted by linspace(-1, 1), by the initial memory."""


def official() -> Any:
    """Our model with their weights."""
    model = compose(
        {
            "dim": 16,
            "input": {"kind": "tokens", "vocab": 20},
            "head": {"kind": "language-model", "tie": False},
            "mixer": [{"name": "attention", "heads": 2, "kv_heads": 1}],
            "feed_forward": [{"name": "swiglu", "hidden": 24}],
            "memory": [{"name": "recurrent-memory", "tokens": 3, "segment": 5}],
            "layers": 2,
        }
    ).double()
    model.load_state_dict({n.removeprefix("weight."): w for n, w in OFFICIAL.items() if n.startswith("weight.")})
    return model


def test_it_is_the_authors_code() -> None:
    model, wanted = official(), OFFICIAL["logits"]
    logits = model(OFFICIAL["tokens"]).y
    assert difference(logits, wanted) < 1e-8
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).reshape(logits.shape)).sum().backward()
    assert difference(model.body.inner.memory.memory.grad, OFFICIAL["gradient"]) < 1e-8
    assert difference(official().float()(OFFICIAL["tokens"]).y.double(), wanted) < 1e-5


@torch.no_grad()
def test_a_stream_is_the_authors_code_too() -> None:
    model, tokens = official(), OFFICIAL["tokens"]
    state, logits = model.init_state(2), []
    for piece in tokens.split([1, 1, 6, 2, 7], 1):
        out = model(piece, Context(), state)
        state = out.state
        logits.append(out.y)
    assert difference(torch.cat(logits, 1), OFFICIAL["logits"]) < 1e-8
    # Theirs is that after the last segment, which is not full; ours is that after the last full one.
    out = model(torch.zeros(2, 3, dtype=torch.int64), Context(), state)
    assert not torch.equal(out.state.flat()["memory.memory"], state.flat()["memory.memory"])


@torch.no_grad()
def test_it_is_the_papers_recurrence() -> None:
    """Equations 1 to 3, segment by segment, over a stack of our own."""
    memory = RecurrentMemory(RecurrentMemoryConfig(tokens=2, segment=4, norm="none"), 8).double()
    stack = nn.Linear(8, 8).double()

    def mixed(x: Tensor) -> Tensor:
        """Each token with all before it."""
        total: Tensor = stack(x).cumsum(1)
        return torch.tanh(total)

    x = torch.randn(3, 14, 8, dtype=torch.float64)
    held, ys = memory.memory.expand(3, -1, -1), []
    for segment in x.split(4, 1):
        whole = mixed(torch.cat([held, segment, held], 1))
        ys.append(whole[:, 2:-2])
        held = whole[:, -2:]
    loop = SegmentLoop(_Whole(mixed), memory)
    assert difference(loop(x).y, torch.cat(ys, 1)) < 1e-12


class _Whole(Layer):
    """A function of the whole sequence."""

    capabilities = Capabilities(masked=False, reset=False, bidirectional=True)

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        return Output(self.function(x))


@torch.no_grad()
@pytest.mark.parametrize("length", [15, 17])
def test_it_is_the_package(length: int) -> None:
    """Learned tokens after a segment, and learned positions of those before it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("recurrent_memory_transformer_pytorch")
    torch.manual_seed(0)
    theirs = package.RecurrentMemoryTransformer(
        dim=16, num_tokens=20, depth=2, num_memory_tokens=3, seq_len=5, dim_head=8, heads=2, use_xl_memories=False,
        num_residual_streams=1,
    ).double().eval()  # fmt: skip
    tokens, read, logits = torch.randint(0, 20, (2, length)), torch.zeros(2, 3, 16, dtype=torch.float64), []
    for segment in tokens.split(5, 1):
        found, read, _ = theirs(segment, read)
        logits.append(found)

    def layers(x: Tensor) -> Tensor:
        # Their memory tokens see each other both ways; a segment that is not full has none of ours after it.
        n, after = x.shape[1], 3 if x.shape[1] == 11 else 0
        sees = torch.ones(n, n, dtype=torch.bool).tril()
        sees[:3, :3] = True
        sees[n - after :] = True
        values = None
        for attention, feed_forward in theirs.layers:
            x, _, new = attention(x, mask=sees[None, None], value_residual=values)
            values = new if values is None else values
            x = feed_forward(x)
        return x

    config = RecurrentMemoryConfig(tokens=3, segment=5, write="learned", position=True, norm_eps=torch.finfo().eps)
    memory = RecurrentMemory(config, 16).double()
    memory.load_state_dict(
        {
            "memory": torch.zeros(3, 16), "position": theirs.read_memory_emb, "write_tokens": theirs.memory_tokens,
            "norm.weight": theirs.norm.weight,
        }
    )  # fmt: skip
    assert isinstance(memory.norm, nn.RMSNorm)
    memory.norm.eps = None
    place = torch.arange(length) % 5
    y = SegmentLoop(_Whole(layers), memory)(theirs.token_emb(tokens) + theirs.pos_emb(place)).y
    assert difference(theirs.to_logits(theirs.norm(y)), torch.cat(logits, 1)) < 1e-8
