"""Laws of training: gradients, initialisation, optimizer options."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from altx.layer import Component, Output
from altx.measure import example_inputs
from altx.optim import optimizer_groups
from altx.registry import Component as Registered
from altx.resolve import Branch, Part
from altx.testing.case import Case, Failure, agitate, difference
from altx.testing.check import Finding, law, tokens
from altx.testing.trial import Trial, plain

SLOPE = 1e-5
"""Allowed difference of a gradient and the slope that is measured, relative where the slope exceeds 1."""


def _long(case: Case) -> list[Trial]:
    # A memory may answer with what it made of the chunk before, and that of what was written of the one before.
    half = max(8 * case.unit, 3 * case.chunk)
    return [plain(4, half, half)]


@law(
    "the task's gradient reaches every parameter",
    needs=("shapes",),
    trials=_long,
    code="""
layer.train()
state = start
for a, b in {calls}:
    out = layer(x[:, a:b], ctx, state)
    (out.y * torch.randn_like(out.y)).sum().backward()
    state = out.state.detach() if out.state else state
print({name: p.grad for name, p in layer.named_parameters()})
""",
)
def gradients(case: Case, trial: Trial) -> Finding | None:
    half = trial.parts[0]
    layer = copy.deepcopy(case.layer).train()
    unreached = {name for name, p in layer.named_parameters() if p.requires_grad}
    # Several inputs, because a router may leave a target out by chance.
    for seed in range(4):
        if not unreached:
            break
        layer.zero_grad()
        x = case.inputs(trial.batch, trial.length, seed=seed)
        state = case.state(trial.batch, layer=layer) if case.streams else None
        pieces = [(x[:, :half], case.ctx), (x[:, half:], case.ctx)] if case.streams else [(x, case.ctx)]
        for piece, ctx in pieces:
            out: Output = layer(piece, ctx, state)
            generator = torch.Generator().manual_seed(seed)
            (out.y * torch.randn(out.y.shape, generator=generator, dtype=out.y.dtype)).sum().backward()
            # Truncated backpropagation through time: the caller detaches.
            state = out.state.detach() if out.state is not None else state
        for name, parameter in layer.named_parameters():
            if (
                parameter.grad is not None
                and bool(parameter.grad.isfinite().all())
                and float(parameter.grad.abs().max()) > 0
            ):
                unreached.discard(name)
    if unreached:
        raise Failure(f"no gradient, or one that is not finite: {', '.join(sorted(unreached))}")
    return None


@law(
    "the gradient is the derivative (float64, along random directions)",
    needs=("determinism",),
    trials=tokens(2, 6),
    code="""
layer.train()
def outputs(*varied):
    out = layer(x, ctx, {fresh})
    return out.y, *out.losses.values()
varied = [x.requires_grad_(x.is_floating_point()), *layer.parameters()]
torch.autograd.gradcheck(outputs, varied, rtol=1e-5)
""",
)
def gradcheck(case: Case, trial: Trial) -> Finding | None:
    layer = copy.deepcopy(case.layer).train()
    x = case.x(trial)
    named: dict[str, Tensor] = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    if x.is_floating_point():
        named["x"] = x.requires_grad_(True)
    varied = list(named.values())
    generator = torch.Generator().manual_seed(7)
    weights: list[Tensor] = []

    def loss() -> Tensor:
        out: Output = layer(x, case.ctx, case.state(trial.batch, layer=layer) if case.streams else None)
        if not weights:
            weights.append(torch.randn(out.y.shape, generator=generator, dtype=out.y.dtype))
        return (out.y * weights[0]).sum() + sum(out.losses.values(), torch.zeros(()))

    def gap(slope: float, measured: float) -> float:
        return abs(measured - slope) / max(1.0, abs(slope))

    def measured(varied: list[Tensor], directions: list[Tensor], step: float) -> float:
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                for t, d in zip(varied, directions, strict=True):
                    t.add_(d, alpha=sign * step)
                values.append(float(loss()))
                for t, d in zip(varied, directions, strict=True):
                    t.sub_(d, alpha=sign * step)
        return (values[0] - values[1]) / (2 * step)

    def slopes(varied: list[Tensor]) -> tuple[float, float]:
        """Along one random direction: what autograd says, and what is measured."""
        directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in varied]
        slope = sum(float((t.grad * d).sum()) for t, d in zip(varied, directions, strict=True) if t.grad is not None)
        # A choice of the largest, or a ReLU, may turn within the first step; a wrong gradient is wrong at any.
        found = measured(varied, directions, 1e-6)
        return slope, found if gap(slope, found) <= SLOPE else measured(varied, directions, 1e-8)

    loss().backward()
    worst = max(gap(*slopes(varied)) for _ in range(3))
    if worst <= SLOPE:
        return worst, SLOPE, ""
    alone = {name: slopes([tensor]) for name, tensor in named.items()}
    wrong = [
        f"{name}: autograd says {slope:.5g}, measured {measured:.5g}"
        for name, (slope, measured) in alone.items()
        if not gap(slope, measured) <= SLOPE
    ]
    raise Failure(
        "the gradient differs from the measured slope", "\n".join(wrong or ["only where all change together"])
    )


@law("no two parameters share memory: one would be trained twice, and a checkpoint hold only one", needs=("shapes",))
def separate_parameters(case: Case, trial: Trial) -> Finding | None:
    owner: dict[int, str] = {}
    for name, parameter in case.fresh().named_parameters():
        if (other := owner.setdefault(parameter.untyped_storage().data_ptr(), name)) != name:
            raise Failure(f"{other} and {name} share memory")
    return None


def _if_composed(case: Case) -> str | None:
    return None if case.subject.blueprint else "is not composed in a model here"


@law("composition leaves a component's initial weights as they were built", needs=("shapes",), applies=_if_composed)
def initialisation(case: Case, trial: Trial) -> Finding | None:
    assert case.subject.blueprint
    built: list[tuple[nn.Module, dict[str, Tensor]]] = []

    @dataclass(frozen=True)
    class Watched(Registered):
        """A component whose build function is watched."""

        def load(self, role: str) -> Any:
            loaded = super().load(role)
            if role not in ("build", "grouped"):
                return loaded

            def build(*args: Any) -> nn.Module:
                module: nn.Module = loaded(*args)
                built.append((module, {name: p.detach().clone() for name, p in module.named_parameters()}))
                return module

            return build

    def watch(part: Part) -> Part:
        return replace(part, component=Watched(part.component.spec, part.component.plugin))

    def watch_branch(branch: Branch) -> Branch:
        memory = watch(branch.memory) if branch.memory else None
        return replace(branch, part=watch(branch.part), memory=memory, targets=tuple(map(watch_branch, branch.targets)))

    blueprint = case.subject.blueprint
    watched = replace(blueprint, blocks=tuple(tuple(map(watch_branch, block)) for block in blueprint.blocks))
    with torch.random.fork_rng(devices=[]):
        model = case.subject.compose(watched)
    inside = {id(module) for module in model.modules()}
    for module, values in built:
        if id(module) not in inside:
            raise Failure(f"the {type(module).__name__} that was built is not the one in the model")
        for name, parameter in module.named_parameters():
            if name not in values or not torch.equal(parameter, values[name]):
                raise Failure(f"{type(module).__name__}.{name} was changed after it was built")
    return None


@law("optimizer options of a component survive composition", needs=("shapes",), applies=_if_composed)
def optimizer_options(case: Case, trial: Trial) -> Finding | None:
    assert case.subject.blueprint
    with torch.random.fork_rng(devices=[]):
        model = case.subject.compose(case.subject.blueprint)
    try:
        groups = optimizer_groups(model, lr=0.5, weight_decay=0.25)
    except KeyError as error:
        raise Failure(str(error.args[0])) from None
    found = {id(p): group for group in groups for p in group["params"]}
    if len(found) != len(list(model.parameters())):
        raise Failure("some parameters are in no group")
    for component in model.modules():
        if isinstance(component, Component):
            own = dict(component.named_parameters())
            for name, options in component.param_groups().items():
                wanted = {"lr": 0.5, **options}
                wanted["lr"] *= wanted.pop("lr_scale", 1.0)
                for key, value in wanted.items():
                    if found[id(own[name])][key] != value:
                        raise Failure(f"{name} asked for {key}={value} and got {found[id(own[name])][key]}")
    return None


@law(
    "weights load into a model built without memory, and give the same outputs",
    needs=("shapes",),
    applies=_if_composed,
)
def meta_build(case: Case, trial: Trial) -> Finding | None:
    from altx.compose import build

    assert case.subject.blueprint
    blueprint = case.subject.blueprint
    model = build(blueprint, seed=1).eval()
    agitate(model)
    empty = build(blueprint, device="meta").eval()
    wrong = empty.load_state_dict(model.state_dict(), assign=True, strict=False)
    if wrong.missing_keys or wrong.unexpected_keys:
        raise Failure(f"missing {wrong.missing_keys}, left over {wrong.unexpected_keys}")
    left = [name for name, t in [*empty.named_parameters(), *empty.named_buffers()] if t.is_meta]
    if left:
        raise Failure(
            f"{', '.join(left)} stays empty: a buffer with computed values must be saved, or computed when used"
        )
    x = example_inputs(model, 2, 8 * case.unit, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (
            difference(empty(x).y, model(x).y, "y of the model"),
            0.0,
            "a model built on the meta device and loaded differs",
        )


@law(
    "bfloat16 and float32 run, and float32 agrees with float64",
    needs=("determinism",),
    trials=tokens(2, 12),
    code="""
found = layer(x, ctx).y
for dtype in (torch.bfloat16, torch.float32):
    wanted = layer.to(dtype)(x.to(dtype), ctx).y
    print(wanted)
""",
)
def dtypes(case: Case, trial: Trial) -> Finding | None:
    x = case.x(trial)
    y = case.run(x).y
    for dtype in (torch.bfloat16, torch.float32):
        layer = copy.deepcopy(case.layer).to(dtype)
        with torch.no_grad():
            out: Output = layer(x.to(dtype) if x.is_floating_point() else x, case.ctx)
        if out.y.dtype != dtype or not bool(out.y.isfinite().all()):
            raise Failure(f"in {dtype}, y is {out.y.dtype} and {'finite' if out.y.isfinite().all() else 'not finite'}")
        gap = difference(out.y.double(), y)
    # A discrete choice (top-k) may fall differently in lower precision; bfloat16 is only asked to run.
    return gap, 1e-3, "float32 and float64 differ"


def _if_compiles(case: Case) -> str | None:
    return None if case.capabilities.compiles else "declares that torch.compile cannot take it"


@law(
    "torch.compile takes it whole and gives the same outputs",
    needs=("determinism", "donation"),
    applies=_if_compiles,
    trials=tokens(2, 4),
    code="""
compiled = torch.compile(layer, backend="eager", fullgraph=True)
found = compiled(x, ctx).y
wanted = layer(x, ctx).y
if start:
    compiled(x[:, :-1], ctx, start)
""",
)
def compiled(case: Case, trial: Trial) -> Finding | None:
    x = case.x(trial)
    if not trial.length:
        return None
    streamed = case.run(x).y
    torch._dynamo.reset()
    try:
        # The graph is captured and run as it is: this needs no compiler on the machine.
        layer: Any = torch.compile(case.layer, backend="eager", fullgraph=True)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about itself while tracing
            y = layer(x, case.ctx).y
            if case.streams and case.capabilities.steps:
                ctx = case.ctx.replace(donate_state=True)
                state = case.state(trial.batch, capacity=x.shape[1])
                first = layer(x[:, :-1], ctx, state)
                second = layer(x[:, -1:], ctx, case.carried(first, state))
                streamed = torch.cat([first.y, second.y], 1)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Failure("torch.compile(fullgraph=True) gave up", reason) from error
    finally:
        torch._dynamo.reset()
    worst = max(difference(found, case.run(x).y) for found in (y, streamed))
    return worst, 1e-9, "compiled outputs differ"
