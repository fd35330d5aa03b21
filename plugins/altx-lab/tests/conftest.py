"""A recurrent mixer with everything that training must look after, offered by a plugin of the tests' own."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from altx_lab.hookspecs import TextSpec
from pydantic import Field

from altx import MixerSpec, hookimpl
from altx.capabilities import Capabilities
from altx.config import Config
from altx.layer import FRESH, Layer, Output, advanced
from altx.registry import Registry
from altx.state import Leaf, State

ME = "altx_lab_toys"
sys.modules[ME] = sys.modules[__name__]


class ToyConfig(Config):
    noise: float = 0.0
    nan_after: int = -1
    max_len: int | None = Field(None)
    growth: Literal["constant", "linear"] = "constant"


class Toy(Layer):
    """s_t = a s_{t-1} + x_t with a rate of its own, a loss, a metric, a buffer that counts steps, and noise."""

    def __init__(self, dim: int, config: ToyConfig) -> None:
        super().__init__()
        self.decay = torch.nn.Parameter(torch.linspace(-2, 2, dim))
        self.register_buffer("steps", torch.zeros(()))
        self.config = config

    def param_groups(self):
        return {"decay": {"lr": 0.5, "weight_decay": 0.0}}

    def on_step(self, info):
        assert info.metrics["load"].shape == (2,)
        self.steps += 1

    def init_state(self, batch, *, capacity=None, device=None, dtype=None):
        s = torch.zeros(batch, len(self.decay), device=device, dtype=dtype)
        return State({"s": s}, {"s": Leaf()}, seen=torch.zeros(batch, dtype=torch.int64, device=device))

    def forward(self, x, ctx=FRESH, state=None):
        start = state or self.init_state(len(x), dtype=x.dtype)
        s, a, ys = start["s"], self.decay.sigmoid(), []
        if self.training and self.config.noise:
            x = x + self.config.noise * torch.randn(x.shape, generator=ctx.generator, dtype=x.dtype)
        for t in range(x.shape[1]):
            s = a * s + x[:, t]
            ys.append(s)
        y = torch.stack(ys, 1) if ys else x
        if 0 <= self.config.nan_after <= self.steps:
            y = y * float("nan")
        new = start.replace(s=s, seen=advanced(start.seen, x, ctx)) if state else None
        return Output(y, new, {"size": y.square().mean()}, {"load": torch.tensor([3.0, 1.0])})


def build(config, ctx):
    return Toy(ctx.dim, config)


def capabilities(config):
    promises = {"masked": False, "reset": False, "losses": {"size": 0.01}, "rollback": "snapshot"}
    return Capabilities(growth=config.growth, max_len=config.max_len, **promises)


@hookimpl
def altx_token_mixers():
    names = {"build": f"{ME}:build", "config": f"{ME}:ToyConfig", "capabilities": f"{ME}:capabilities"}
    return [MixerSpec("toy", summary="for tests", **names)]


def words() -> bytes:
    return b"the quick brown fox jumps over the lazy dog. " * 40


empty = bytes
numbers = list


@hookimpl
def altx_texts():
    def text(name: str, build: str) -> TextSpec:
        return TextSpec(name, summary="for tests", build=f"{ME}:{build}")

    return [text("fox", "words"), text("empty", "empty"), text("broken", "missing"), text("no-bytes", "numbers")]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products gain nothing from a second thread, and on a busy machine lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toys() -> Registry:
    return Registry([EntryPoint("toys", ME, "altx.plugins"), EntryPoint("lab", "altx_lab.plugin", "altx.plugins")])


@pytest.fixture
def write_model(tmp_path: Path):
    """Writes a small model's file: a feed-forward alone, or with a `toy` of these settings before it."""

    def write(name: str = "model.yaml", toy: dict | None = None, **top) -> Path:
        mixer = [] if toy is None else [{"mixer": {"name": "toy", **toy}}]
        blocks = [{"sublayers": [*mixer, {"feed_forward": {"name": "mlp", "hidden": 16}}]}]
        (tmp_path / name).write_text(yaml.safe_dump({"dim": 16, "blocks": blocks, **top}))
        return tmp_path / name

    return write


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """A text file of 2,000 bytes."""
    (tmp_path / "prose.txt").write_bytes(b"The quick brown fox jumps over the lazy dog, again. " * 38 + b"!" * 24)
    return tmp_path / "prose.txt"
