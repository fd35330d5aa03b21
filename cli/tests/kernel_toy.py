"""A plugin for the tests of `altx kernels`: one op that is right, one that is wrong, one without examples."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from altx import MixerSpec, hookimpl
from altx_kernels import Backend, Op
from altx_kernels.examples import Example, Workload, randn


def reference(x: Tensor) -> Tensor:
    return 2 * x


def wrong(x: Tensor) -> Tensor:
    return 2 * x + 0.01 * (x - x.detach())


def no_gradients(x: Tensor) -> str | None:
    return "gradients are wanted, and it has none" if x.requires_grad and torch.is_grad_enabled() else None


def missing() -> str:
    return "there is no such machine"


def examples() -> list[Example]:
    return [Example("n=3", {"x": randn(3, 2)}), Example("n=0", {"x": randn(0, 2)})]


def workloads() -> list[Workload]:
    return [
        Workload(
            "n=4",
            lambda device, dtype: {"x": torch.ones(4, device=device, dtype=dtype, requires_grad=True)},
            bytes=lambda dtype: 8.0 * dtype.itemsize,
            flops=4.0,
        )
    ]


right = Op(
    "toy-double",
    reference,
    [
        Backend("mars", reference, absent=missing),
        Backend("native", reference, no_gradients),
        Backend("torch", reference),
    ],
    summary="twice as much",
    examples=examples,
    workloads=workloads,
)
bad = Op("toy-wrong", reference, [Backend("torch", wrong)], examples=examples)
bare = Op("toy-bare", reference, [Backend("torch", reference)])


def build() -> None: ...


@hookimpl
def altx_token_mixers() -> Iterable[MixerSpec]:
    def spec(name: str, build: str) -> MixerSpec:
        light = {"config": "cli_toy:AverageConfig", "capabilities": "cli_toy:capabilities"}
        return MixerSpec(name, summary="A mixer with kernels", build=build, **light)

    return [spec("doubling", "kernel_toy:build"), spec("brittle", "nowhere_to_be_found:build")]
