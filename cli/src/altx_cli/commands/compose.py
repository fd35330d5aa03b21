"""`altx compose`: assemble a model, prove it, and say what it costs."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from altx_cli import external
from altx_cli.description import LARGE, describe, summary
from altx_cli.options import Json, Settings, complete, complete_attach, parse_count, parse_settings
from altx_cli.output import count, emit, findings, table

if TYPE_CHECKING:
    from altx.config import ModelConfig
    from altx.model import Model
    from altx.resolve import Blueprint

DEFAULT_OUTPUT = Path("model.yaml")


def compose(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A recipe or a model.yaml to start from. Options override its keys."),
    ] = None,
    mixer: Annotated[
        str | None,
        typer.Option(metavar="NAMES", autocompletion=complete("mixer"), help='Token mixers, e.g. "3*mamba,attention".'),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="NAMES", autocompletion=complete("memory"), help="Memory beside the mixers, e.g. ntm."),
    ] = None,
    attach: Annotated[
        str | None,
        typer.Option(
            metavar="MODE", autocompletion=complete_attach, help="How the memory is attached; each has a default."
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", autocompletion=complete("router"), help="Router over feed-forwards or depths, e.g. topk."
        ),
    ] = None,
    ffn: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", autocompletion=complete("feed-forward"), help='Feed-forward, or experts: "8*swiglu".'
        ),
    ] = None,
    depths: Annotated[
        int | None,
        typer.Option(metavar="N", help="The router chooses how often, up to N, the blocks are applied to a token."),
    ] = None,
    dim: Annotated[int | None, typer.Option(metavar="N", help="Model width.")] = None,
    layers: Annotated[int | None, typer.Option(metavar="N", help="Number of blocks.")] = None,
    params: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Find the width that gives this many parameters, e.g. 130M.")
    ] = None,
    settings: Settings = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="Where to write the model.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    prove: Annotated[
        bool | None,
        typer.Option("--prove/--no-prove", help="Check laws on the built model; the default up to 500M parameters."),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=-(1 << 63), max=(1 << 63) - 1, help="Seed of the weights that are proved.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Assemble a model, prove it, and say what it costs.

    The model is written to model.yaml (or -o) with every setting spelled out.
    """
    budget = parse_count(params) if params else None
    flags = {
        "mixer": mixer, "memory": memory, "attach": attach, "router": router, "feed_forward": ffn,
        "depths": depths, "dim": dim, "layers": layers,
    }  # fmt: skip
    _check_output(output, force)
    blueprint = _blueprint(file, {k: v for k, v in flags.items() if v is not None}, parse_settings(settings), budget)

    report = describe(blueprint)
    if not as_json:
        print("\n".join(summary(report)))
    report |= _prove(blueprint, seed, prove, report["parameters"])
    if not as_json:
        print("\n".join(_evidence(report)))
    failed = any(proof["status"] == "failed" for proof in report["proofs"])
    if not (as_json and output is None):
        report |= _write(blueprint.config, output, force, failed)
    if as_json:
        emit(report)
    else:
        print("\n".join(["", *_ending(report)]))
    if failed:
        raise typer.Exit(1)


def _check_output(output: Path | None, force: bool) -> None:
    """Refuse before the work what could not be written after it."""
    from altx.errors import AltxError

    if output is None:
        return
    if output.is_dir():
        raise AltxError(f"{output} is a directory", hint=f"name a file, e.g. -o {output / DEFAULT_OUTPUT}")
    if output.exists() and not force:
        raise AltxError(f"{output} exists already", hint="choose another path, or overwrite it with --force")
    if not output.parent.is_dir():
        raise AltxError(f"{output} cannot be written: there is no directory {output.parent}")


def _blueprint(file: Path | None, flags: dict[str, Any], settings: dict[str, Any], budget: int | None) -> Blueprint:
    """The model that file, flags and settings ask for. Imports torch only to solve for a width."""
    from altx import recipe, registry
    from altx.errors import ConfigError
    from altx.resolve import resolve

    if budget and ("dim" in flags or "dim" in settings):
        raise ConfigError("params: the width is what it solves for, so dim cannot be given too", hint="leave one out")
    config = recipe.load({**(recipe.read(file) if file else {}), **flags}, settings)
    plugins = registry.default()
    if budget is None:
        return resolve(config, plugins)
    # A part that does not exist is refused before torch is imported. Settings may only need another width.
    with contextlib.suppress(ConfigError):
        resolve(config, plugins)
    from altx.compose import build
    from altx.measure import solve_width

    return resolve(solve_width(config, budget, lambda c: build(resolve(c, plugins), device="meta")), plugins)


def _prove(blueprint: Blueprint, seed: int, wanted: bool | None, parameters: int) -> dict[str, Any]:
    """Build the model with weights, see which kernels serve it, and check laws on it."""
    if wanted is False:
        return {"proofs": [], "kernels": [], "not_proved": "--no-prove"}
    if wanted is None and parameters > LARGE:
        reason = f"more than {count(LARGE)} parameters; --prove does it all the same"
        return {"proofs": [], "kernels": [], "not_proved": reason}
    from altx.compose import build
    from altx.testing import prove

    model = build(blueprint, seed=seed)
    # The kernels first: one that was pinned and cannot run is an error, not a law that fails.
    kernels = _kernels(model)
    return {"proofs": [asdict(result) for result in prove(model)], "kernels": kernels, "not_proved": None}


def _kernels(model: Model) -> list[dict[str, Any]]:
    """The backends chosen for a forward pass of the model as it was built."""
    import torch

    from altx.measure import example_inputs
    from altx_cli.ops import load_ops

    if os.environ.get("ALTX_KERNEL"):
        # A pin may be for an op that this model has not; that there is no such op shows when all are known.
        load_ops()
    # Only a plugin brings kernels; without one there are none to choose among.
    if not (kernels := sys.modules.get("altx_kernels")):
        return []
    with torch.no_grad(), kernels.record() as choices:
        model(example_inputs(model, 1, 64))
    weight = next(model.parameters())
    setting = {"device": weight.device.type, "dtype": str(weight.dtype).removeprefix("torch.")}
    return [{"op": c.op, "backend": c.backend, "refused": dict(c.refused), "pin": c.pin, **setting} for c in choices]


def _write(config: ModelConfig, output: Path | None, force: bool, failed: bool) -> dict[str, Any]:
    """Write the config, unless that would destroy something or the model is not what it claims to be."""
    from altx.checkpoint import to_yaml
    from altx.errors import AltxError

    path, text = output or DEFAULT_OUTPUT, to_yaml(config)
    if failed:
        return {"path": str(path), "written": False, "why": "a proof failed; --no-prove writes it all the same"}
    try:
        if output is None and not force and path.exists():
            if path.is_file() and path.read_text("utf-8", errors="replace") == text:
                return {"path": str(path), "written": False, "why": "unchanged"}
            return {"path": str(path), "written": False, "why": f"{path} exists and differs; use -o or --force"}
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise AltxError(f"{path} cannot be written: {error.strerror}") from None
    return {"path": str(path), "written": True, "why": ""}


def _evidence(report: dict[str, Any]) -> list[str]:
    """Which kernels served, and what was proved."""
    if report["not_proved"]:
        return ["", f"not proved: {report['not_proved']}"]
    lines = []
    if kernels := report["kernels"]:
        lines += ["", f"kernels, {kernels[0]['dtype']} on {kernels[0]['device']}"]
        lines += [f"  {line}" for line in table([_kernel(kernel) for kernel in kernels])]
    lines += ["", "proofs, in float64 with perturbed weights"]
    return lines + [f"  {line}".rstrip() for line in findings(report["proofs"])]


def _kernel(kernel: dict[str, Any]) -> list[str]:
    reasons = [f"{name}: {reason}" for name, reason in kernel["refused"].items()]
    notes = [f"pinned by {kernel['pin']}"] * bool(kernel["pin"]) + reasons
    return [kernel["op"], kernel["backend"], f"({'; '.join(notes)})" if notes else ""]


def _ending(report: dict[str, Any]) -> list[str]:
    """Where the model is now, and what to do with it."""
    path = report["path"]
    if not report["written"] and report["why"] != "unchanged":
        return [f"not written: {report['why']}"]
    lines = [f"wrote {path}" if report["written"] else f"{path} is unchanged"]
    if not (report["causal"] and report["config"]["head"]["kind"] == "language-model"):
        return lines
    first = "" if "train" in external.offers() else "pip install altx-lab, then "
    return [*lines, f"next: {first}altx train {path}"]
