"""From a blueprint to a model: plugins build their parts, altx connects them and touches no weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from altx import recipe, registry
from altx.adapters import Bidirectional, PadToMultiple, PrefixReplay, Unpack
from altx.attach import ContextAttach, ControllerAttach, GateAttach, KVAttach, MemoryLayer, ResidualAttach
from altx.block import Residual, Stack
from altx.errors import BrokenPlugin, CompositionError
from altx.layer import Component, Layer
from altx.memory import Memory
from altx.model import Model
from altx.recursion import Recursion
from altx.resolve import Blueprint, Branch, Part, resolve
from altx.routed import Routed, TargetBank
from altx.router import Router
from altx.segment_loop import SegmentLoop
from altx.spec import BuildContext

AnyComponent = TypeVar("AnyComponent", bound=Component)


def compose(
    model: Mapping[str, Any] | str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    plugins: registry.Registry | None = None,
) -> Model:
    """Build a model from a recipe.

    Args:
        model: a recipe as plain data, e.g. `{"mixer": "3*mamba,attention", "dim": 256}`, or the path of a YAML file.
        settings: values by path, applied last; see `altx.recipe.load`.
        seed: makes the initial weights reproducible and leaves the global generator as it was.
        plugins: the registry to use; default: everything installed.

    Raises:
        AltxError: saying what is wrong, where, and what would be accepted.
    """
    data = recipe.read(Path(model)) if isinstance(model, (str, Path)) else model
    return build(resolve(recipe.load(data, settings), plugins or registry.default()), seed=seed)


def build(blueprint: Blueprint, *, seed: int | None = None, device: str | None = None) -> Model:
    """Build the model of a blueprint.

    Args:
        seed: as for `compose`.
        device: where to build it; "meta" gives shapes without memory.
    """
    with (
        torch.random.fork_rng(devices=[], enabled=seed is not None),
        torch.device(device or torch.get_default_device()),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        config = blueprint.config
        blocks = []
        ctx = BuildContext(dim=config.dim, num_layers=len(blueprint.blocks))
        for index, branches in enumerate(blueprint.blocks):
            sublayers = []
            for branch in branches:
                layer = build_branch(branch, replace(ctx, layer=index))
                sublayers.append(Residual(layer, config.dim, branch.norm, config.norm_eps))
                ctx = replace(ctx, exported=ctx.exported | branch.capabilities.provides)
            blocks.append(Stack(sublayers))
        body: Layer = Stack(blocks)
        if blueprint.memory:
            body = SegmentLoop(body, build_part(blueprint.memory, ctx, Memory))
        if not body.capabilities.packing and body.capabilities.masked:
            body = Unpack(body)
        try:
            return Model(config, body)
        except RuntimeError as error:
            raise CompositionError(
                f"the model's input and head cannot be built: {registry.describe(error)}", hint="make them smaller"
            ) from error


def build_branch(branch: Branch, ctx: BuildContext) -> Layer:
    """Build one sublayer's body, or one target of a router."""
    if branch.turned:
        return Bidirectional(_one_way(branch, ctx), _one_way(branch, ctx))
    return _one_way(branch, ctx)


def _one_way(branch: Branch, ctx: BuildContext) -> Layer:
    spec = branch.part.component.spec
    if spec.kind == "router":
        return _routed(branch, ctx)
    layer = (
        MemoryLayer(build_part(branch.part, ctx, Memory))
        if spec.kind == "memory"
        else build_part(branch.part, ctx, Layer)
    )
    for adapter in branch.adapters:
        layer = PadToMultiple(layer) if adapter == "pad" else PrefixReplay(layer, ctx.dim)
    if not branch.memory:
        return layer
    if branch.attach == "kv":
        if layer.hands is None:
            raise BrokenPlugin(
                f"{branch.part}: accepts_kv, and its layer does not say in `hands` what it hands over",
                hint=branch.part.component.remedy,
            )
        ctx = replace(ctx, heads=layer.hands)
    return attach(branch.attach, layer, build_part(branch.memory, ctx, Memory), ctx.dim)


def attach(mode: str, mixer: Layer, memory: Memory, dim: int) -> Layer:
    """A mixer with a memory attached."""
    if mode in ("residual", "kv", "context"):
        kinds: dict[str, Callable[[Layer, Memory], Layer]] = {
            "residual": ResidualAttach, "kv": KVAttach, "context": ContextAttach,
        }  # fmt: skip
        return kinds[mode](mixer, memory)
    return (GateAttach if mode == "gate" else ControllerAttach)(mixer, memory, dim)


def _routed(branch: Branch, ctx: BuildContext) -> Layer:
    n = branch.depths or len(branch.targets)
    many = replace(ctx, num_targets=n)
    router = build_part(branch.part, many, Router)
    if branch.depths:
        stack = [Residual(build_branch(each, ctx), ctx.dim, each.norm, branch.norm_eps) for each in branch.targets]
        return Recursion(router, Stack(stack), n, branch.kv_sharing)
    if branch.grouped:
        return Routed(router, build_part(branch.targets[0].part, many, TargetBank, role="grouped"))
    kinds = {target.part.component.spec.kind for target in branch.targets}
    kind = {"mixer": "mixers", "memory": "memories"}.get(kinds.pop(), "experts") if len(kinds) == 1 else "blocks"
    return Routed(router, [build_branch(target, ctx) for target in branch.targets], kind)


def build_part(part: Part, ctx: BuildContext, expected: type[AnyComponent], role: str = "build") -> AnyComponent:
    """Have the plugin build one component.

    Raises:
        CompositionError: if the plugin's code raises.
        BrokenPlugin: if it builds something else.
    """
    builder = part.component.load(role)
    with part.component.guard(f"{part.path}: building {part} failed", error=CompositionError):
        module = builder(part.config, ctx)
        if not isinstance(module, expected):
            raise BrokenPlugin(
                f"{part}: its {role} returned a {type(module).__name__}, not a {expected.__name__}",
                hint=part.component.remedy,
            )
        module.capabilities = part.capabilities
        module.built_as = str(part)
    return module
