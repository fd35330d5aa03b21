"""Running the checks: on a component by name, on any subject, and on a model that was just composed."""

from __future__ import annotations

import copy
import functools
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from altx import registry
from altx.adapters import Bidirectional
from altx.block import Stack
from altx.capabilities import Capabilities, MemoryCapabilities
from altx.compose import attach, build_branch, build_part
from altx.config import ComponentRef, ModelConfig, validate
from altx.errors import AltxError, ConfigError
from altx.joints import IN_A_LAYER, WITH_A_VALUE
from altx.layer import Layer
from altx.memory import Memory
from altx.model import Model
from altx.resolve import Blueprint, Part, resolve, resolve_part
from altx.routed import Routed
from altx.router import Router
from altx.segment_loop import SegmentLoop
from altx.spec import BuildContext, Heads, MemorySpec
from altx.testing import basics, batching, graphs, learning, memories, streaming
from altx.testing.case import Case, Subject
from altx.testing.check import REGISTERED, Check, Failure, ordered
from altx.testing.partners import Across, MovingAverage, Numbered, SelfAttention
from altx.testing.result import Result

assert basics and streaming and batching and graphs and memories and learning, "importing a module registers its checks"

AnyModule = TypeVar("AnyModule", bound=nn.Module)

DIMS = (16, 24, 32, 48, 64, 96, 128, 256)
"""Widths to try; the first that the component accepts is used."""

PROOFS = ("steps", "splits", "causality", "padding", "gradients")
"""What `altx compose` proves."""


def subjects(
    name: str,
    kind: str | None = None,
    config: Mapping[str, Any] | None = None,
    plugins: registry.Registry | None = None,
) -> list[Subject]:
    """Everything about a component that is checked: each direction, each attach mode.

    Raises:
        AltxError: if the component is unknown, broken, or refuses the config.
    """
    plugins = plugins or registry.default()
    component = plugins.find(name, kind)
    if "capabilities" not in component.spec.roles:
        raise AltxError(f"{component} promises nothing that the contract has laws for")
    ref = ComponentRef.model_validate({**(config or {}), "name": component.qualified})
    part = _fitting(plugins, component.spec.kind, ref)
    dim = part[1]
    make = {"memory": _memory_subjects, "router": _router_subjects}.get(component.spec.kind, _layer_subjects)
    return make(component.name, part[0], dim, ref, plugins)


def _fitting(plugins: registry.Registry, kind: str, ref: ComponentRef) -> tuple[Part, int]:
    """The component's settings, and the smallest width that suits them."""
    problem: AltxError | None = None
    for dim in DIMS:
        try:
            return resolve_part(plugins, kind, ref, ref.name, dim), dim
        except ConfigError as error:
            problem = problem or error
    assert problem
    raise problem


def _blueprint(body: dict[str, Any], dim: int, causal: bool, plugins: registry.Registry) -> Blueprint:
    head = {} if causal else {"head": {"kind": "vectors", "size": 3}}
    data = {
        "dim": dim,
        "causal": causal,
        "input": {"kind": "tokens", "vocab": 11},
        "blocks": [{"sublayers": [body]}] * 2,
    }
    return resolve(validate(ModelConfig, {**data, **head}), plugins)


def _layer_subjects(name: str, part: Part, dim: int, ref: ComponentRef, plugins: registry.Registry) -> list[Subject]:
    body = {part.component.spec.kind.replace("-", "_"): ref.model_dump()}
    found = []
    for causal in (True, False):
        if not (part.capabilities.causal if causal else part.capabilities.bidirectional):
            continue
        label = name if causal else f"{name}[encoder]"
        if part.capabilities.graph == "required":
            found.append(_graph_subject(label, part, dim, causal))
            continue
        blueprint = _blueprint(body, dim, causal, plugins)
        found.append(Subject(label, _builder(blueprint), dim, causal, blueprint))
    return found


def _graph_subject(label: str, part: Part, dim: int, causal: bool) -> Subject:
    """A layer that needs a graph by itself: a model of it would need one in every call."""
    ctx = BuildContext(dim=dim, num_layers=2)
    return Subject(label, lambda: graphs.Chained(build_part(part, ctx, Layer)), dim, causal)


def _builder(blueprint: Blueprint) -> Callable[[], Layer]:
    return lambda: build_branch(blueprint.blocks[0][0], BuildContext(dim=blueprint.config.dim, num_layers=2))


def _memory_subjects(name: str, part: Part, dim: int, ref: ComponentRef, plugins: registry.Registry) -> list[Subject]:
    spec = part.component.spec
    assert isinstance(spec, MemorySpec)
    ctx = BuildContext(dim=dim, num_layers=2)

    def memory(heads: Heads | None = None) -> Memory:
        return build_part(part, replace(ctx, heads=heads), Memory)

    feedback = isinstance(part.capabilities, MemoryCapabilities) and part.capabilities.feedback
    found = []
    if not feedback and set(spec.attach) & set(WITH_A_VALUE):
        for causal in (True, False):
            if not (part.capabilities.causal if causal else part.capabilities.bidirectional):
                continue
            blueprint = _blueprint({"memory": ref.model_dump()}, dim, causal, plugins)
            label = name if causal else f"{name}[encoder]"
            found.append(Subject(label, _builder(blueprint), dim, causal, blueprint, memory=memory))
    for mode in spec.attach:
        if mode == "tokens":
            found += _segmented_subjects(f"{name}[tokens]", dim, part.capabilities, memory)
        elif mode == "kv":
            found.append(_kv_subject(f"{name}[kv]", dim, memory))
        elif mode in IN_A_LAYER:
            mixer = Across if mode == "context" else MovingAverage
            attached = functools.partial(lambda mode, mixer: attach(mode, mixer(dim), memory(), dim), mode, mixer)
            found.append(Subject(f"{name}[{mode}]", attached, dim))
    return found


def _segmented_subjects(
    label: str, dim: int, capabilities: Capabilities, memory: Callable[[], Memory]
) -> list[Subject]:
    def looped(inner: Callable[[], Layer]) -> Layer:
        return _in_short_segments(SegmentLoop(inner(), memory()))

    def both_ways() -> Layer:
        return Bidirectional(MovingAverage(dim), MovingAverage(dim))

    def blocks(layer: Callable[[], Layer]) -> Layer:
        """As many as the memory was told of."""
        return Stack([layer(), layer()])

    found = [Subject(label, lambda: looped(lambda: blocks(lambda: MovingAverage(dim))), dim)]
    if capabilities.bidirectional:
        found.append(Subject(f"{label}[encoder]", lambda: looped(lambda: blocks(both_ways)), dim, causal=False))
    return found


def _in_short_segments(layer: AnyModule) -> AnyModule:
    """The layer with segments so short that checks, which are of a dozen tokens, are of several of them."""
    for loop in layer.modules():
        if isinstance(loop, SegmentLoop):
            loop.memory.capabilities = replace(loop.memory.capabilities, chunk=min(loop.size, 5))
    return layer


def _kv_subject(label: str, dim: int, memory: Callable[[Heads | None], Memory]) -> Subject:
    def attached() -> Layer:
        mixer = SelfAttention(dim)
        return attach("kv", mixer, memory(mixer.hands), dim)

    heads = SelfAttention(dim).hands
    assert heads
    return Subject(label, attached, dim, memory=lambda: memory(heads), width=heads.width)


def _router_subjects(name: str, part: Part, dim: int, ref: ComponentRef, plugins: registry.Registry) -> list[Subject]:
    body = {
        "router": ref.model_dump(),
        "targets": [{"feed_forward": {"name": "altx:swiglu", "hidden": 8}, "repeat": 4}],
    }

    def numbered(make: Callable[[], Layer]) -> Callable[[], Layer]:
        """With the tokens' numbers, if it wants them: a layer by itself has none."""
        return (lambda: Numbered(make())) if "token_ids" in part.capabilities.requires else make

    found = []
    for causal in (True, False):
        if not (part.capabilities.causal if causal else part.capabilities.bidirectional):
            continue
        blueprint = _blueprint(body, dim, causal, plugins)
        label = name if causal else f"{name}[encoder]"
        found.append(Subject(label, numbered(_builder(blueprint)), dim, causal, blueprint))
    if part.capabilities.causal:
        many = BuildContext(dim=dim, num_layers=2, num_targets=3)
        mixers = Subject(
            f"{name}[mixers]",
            numbered(lambda: Routed(build_part(part, many, Router), [MovingAverage(dim) for _ in range(3)], "mixers")),
            dim,
        )
        found.append(mixers)
    return found


def run(subject: Subject, only: Sequence[str] = ()) -> list[Result]:
    """Check one subject. With `only`, just those checks and the ones they build on.

    Raises:
        ConfigError: if `only` names a check that does not exist.
    """
    wanted = _closure(only) if only else set(REGISTERED)
    case, results = Case(subject), []
    failed: set[str] = set()
    for check in ordered():
        if check.name not in wanted:
            continue
        result = _run_one(check, case, failed)
        if result.status == "failed" or (result.status == "skipped" and result.message.startswith("needs ")):
            failed.add(check.name)
        results.append(result)
    return results


def _run_one(check: Check, case: Case, failed: set[str]) -> Result:
    start = time.perf_counter()

    def result(status: Any, message: str = "", value: float | None = None, tolerance: float | None = None) -> Result:
        seconds = time.perf_counter() - start
        return Result(check.name, check.law, case.subject.name, status, value, tolerance, message, seconds)

    if missing := [name for name in check.needs if name in failed]:
        return result("skipped", f"needs {', '.join(missing)}")
    try:
        if reason := check.applies(case):
            return result("skipped", reason)
        finding = check.run(case)
    except Failure as error:
        return result("failed", str(error))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return result("failed", f"raised {registry.describe(error)} ({Path(frame.filename).name}:{frame.lineno})")
    if finding is None:
        return result("passed")
    value, tolerance, message = finding
    # Not `value > tolerance`, which NaN would pass.
    return result("passed", "", value, tolerance) if value <= tolerance else result("failed", message, value, tolerance)


def _closure(names: Iterable[str]) -> set[str]:
    """These checks and everything they build on."""
    wanted: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if name not in REGISTERED:
            raise ConfigError(f"there is no check {name!r}", hint=f"checks: {', '.join(REGISTERED)}")
        if name not in wanted:
            wanted.add(name)
            queue += REGISTERED[name].needs
    return wanted


def check_component(
    name: str,
    kind: str | None = None,
    config: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    plugins: registry.Registry | None = None,
) -> list[Result]:
    """Check a component under every law that its capabilities make apply.

    Args:
        name: short or qualified.
        kind: needed where several kinds have a component of that name.
        config: its settings.
        only: names of checks; default all.
        plugins: the registry to use.

    Raises:
        AltxError: if it cannot be found or built at all.
    """
    return [result for subject in subjects(name, kind, config, plugins) for result in run(subject, only)]


def prove(model: Model) -> list[Result]:
    """Prove the main laws on a composed model: on a copy in float64, with agitated parameters."""
    if any(isinstance(module, SegmentLoop) for module in model.modules()):
        model = _in_short_segments(copy.deepcopy(model))
    subject = Subject("model", lambda: model, model.config.dim, model.config.causal)
    wanted = set(PROOFS)
    return [result for result in run(subject, PROOFS) if result.check in wanted or result.status == "failed"]
