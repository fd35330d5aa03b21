"""Running the checks: on a component by name, on any subject, and on a model that was just composed."""

from __future__ import annotations

import copy
import functools
import json
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from altx import registry
from altx.adapters import Bidirectional
from altx.block import Residual, Stack
from altx.capabilities import Capabilities, MemoryCapabilities, RouterCapabilities
from altx.compose import attach, build_branch, build_part
from altx.config import ComponentRef, ModelConfig, validate
from altx.errors import AltxError, ConfigError
from altx.joints import IN_A_LAYER, WITH_A_VALUE
from altx.layer import Layer
from altx.memory import Memory
from altx.model import Model
from altx.recursion import Recursion
from altx.resolve import Blueprint, Part, resolve, resolve_part
from altx.routed import Routed
from altx.router import Router
from altx.segment_loop import SegmentLoop
from altx.spec import BuildContext, Heads, MemorySpec
from altx.testing import basics, batching, graphs, learning, memories, streaming
from altx.testing.case import Case, Failure, Subject
from altx.testing.check import REGISTERED, Check, ordered
from altx.testing.examples import describe
from altx.testing.partners import Across, MovingAverage, Numbered, SelfAttention
from altx.testing.result import Result, Status
from altx.testing.shrink import Breach, Held, attempt, raised, smallest
from altx.testing.trial import Trial

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
    dim: int | None = None,
) -> list[Subject]:
    """Everything about a component that is checked: each direction, each attach mode.

    Args:
        name: short or qualified.
        kind: needed where several kinds have a component of that name.
        config: its settings.
        plugins: the registry to use.
        dim: width; default the first of `DIMS` that suits it.

    Raises:
        AltxError: if the component is unknown, broken, or refuses the config.
    """
    plugins = plugins or registry.default()
    component = plugins.find(name, kind)
    if "capabilities" not in component.spec.roles:
        raise AltxError(f"{component} promises nothing that the contract has laws for")
    ref = ComponentRef.model_validate({**(config or {}), "name": component.qualified})
    part, width = _fitting(plugins, component.spec.kind, ref, (dim,) if dim else DIMS)
    make = {"memory": _memory_subjects, "router": _router_subjects}.get(component.spec.kind, _layer_subjects)

    def complete(made: Subject) -> Subject:
        settings = [f"kind={kind!r}"] if kind else []
        settings += [f"config={dict(config)!r}"] if config else []
        # Values of --set are YAML, of which JSON is a part.
        values = [f"--set {shlex.quote(f'{path}={json.dumps(value)}')}" for path, value in (config or {}).items()]
        return replace(
            made,
            resized=lambda dim: subject(made.name, kind, config, plugins, dim, of=name),
            origin=", ".join([f'"{made.name}"', *settings]),
            command=" ".join(["altx check", name, *([f"--kind {kind}"] if kind else []), *values]),
        )

    return [complete(made) for made in make(component.name, part, width, ref, plugins)]


def subject(
    label: str,
    kind: str | None = None,
    config: Mapping[str, Any] | None = None,
    plugins: registry.Registry | None = None,
    dim: int | None = None,
    of: str | None = None,
) -> Subject:
    """One of `subjects`, by its name; `of` is the component's, where that is ambiguous."""
    known = {made.name: made for made in subjects(of or label.partition("[")[0], kind, config, plugins, dim)}
    if label not in known:
        raise AltxError(f"there is no {label!r} to check", hint=f"there is {', '.join(known)}")
    return known[label]


def _fitting(plugins: registry.Registry, kind: str, ref: ComponentRef, dims: Sequence[int]) -> tuple[Part, int]:
    """The component's settings, and the first width that suits them."""
    problem: AltxError | None = None
    for dim in dims:
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
    expert = {"feed_forward": {"name": "altx:swiglu", "hidden": 8}}
    stepwise = isinstance(part.capabilities, RouterCapabilities) and part.capabilities.stepwise
    targets = {"depths": 3, "sublayers": [expert]} if stepwise else {**expert, "repeat": 4}
    body = {"router": ref.model_dump(), "targets": [targets]}

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

        def over_mixers() -> Layer:
            router = build_part(part, many, Router)
            if stepwise:
                return Recursion(router, Residual(MovingAverage(dim), dim), many.num_targets)
            return Routed(router, [MovingAverage(dim) for _ in range(many.num_targets)], "mixers")

        found.append(Subject(f"{name}[mixers]", numbered(over_mixers), dim))
    return found


class Trying:
    """One subject under the checks, each of which runs once, when it is asked for, after those that it builds on."""

    def __init__(self, subject: Subject) -> None:
        self.case = Case(subject)
        self._results: dict[str, Result] = {}

    def result(self, name: str) -> Result:
        """What became of a check."""
        if name not in self._results:
            check = REGISTERED[name]
            broken = [need for need in check.needs if _broken(self.result(need))]
            with _one_thread():
                self._results[name] = _run_one(check, self.case, broken)
        return self._results[name]


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors are tiny: threads that wait for each other only cost, on a busy machine five times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _broken(result: Result) -> bool:
    return result.status == "failed" or (result.status == "skipped" and result.message.startswith("needs "))


def run(subject: Subject, only: Sequence[str] = ()) -> list[Result]:
    """Check one subject. With `only`, just those checks and the ones they build on.

    Raises:
        ConfigError: if `only` names a check that does not exist.
    """
    wanted, trying = _closure(only) if only else set(REGISTERED), Trying(subject)
    return [trying.result(check.name) for check in ordered() if check.name in wanted]


def _unfit(case: Case) -> Breach | None:
    """Why no check can begin: what every check would stumble over is one failure, of the first."""
    try:
        layer = case.layer
        if not isinstance(layer, (Layer, Model)):
            raise Failure(f"build returned a {type(layer).__name__}, not an altx.layer.Layer")
        if not isinstance(getattr(layer, "capabilities", None), Capabilities):
            raise Failure(f"{type(layer).__name__} has no `capabilities`, an altx.capabilities.Capabilities")
    except Failure as error:
        return Breach((), str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return raised(error)
    return None


def _run_one(check: Check, case: Case, missing: Sequence[str]) -> Result:
    start = time.perf_counter()

    def result(status: Status, message: str = "", example: str = "", measured: Breach | Held | None = None) -> Result:
        seconds = time.perf_counter() - start
        value, tolerance = (measured.value, measured.tolerance) if measured else (None, None)
        return Result(check.name, check.law, case.subject.name, status, value, tolerance, message, example, seconds)

    if missing:
        return result("skipped", f"needs {', '.join(missing)}")
    if not check.needs and (breach := _unfit(case)):
        return result("failed", f"it cannot be checked: {breach.message}", breach.detail)
    worst = Held()
    try:
        if reason := check.applies(case):
            return result("skipped", reason)
        trials = check.trials(case) if check.trials else [Trial(("",))]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        breach = raised(error)
        return result("failed", breach.message, breach.detail)
    for trial in trials:
        found = attempt(check, case, trial)
        if isinstance(found, Breach):
            least = smallest(check, case, trial, found) if check.trials else (case, trial, found)
            return result("failed", found.message, describe(check, *least), found)
        if worst.value is None or (found.value or 0.0) > worst.value:
            worst = found
    return result("passed", measured=worst)


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


def of_model(model: Model) -> Subject:
    """A composed model as something to check."""
    if any(isinstance(module, SegmentLoop) for module in model.modules()):
        model = _in_short_segments(copy.deepcopy(model))
    return Subject("model", lambda: model, model.config.dim, model.config.causal, origin="model")


def prove(model: Model) -> list[Result]:
    """Prove the main laws on a composed model: on a copy in float64, with agitated parameters."""
    wanted = set(PROOFS)
    subject = of_model(model)
    return [result for result in run(subject, PROOFS) if result.check in wanted or result.status == "failed"]
