"""A session of `altx train`: starting a run or going on with one, up to its result."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from altx import __version__, recipe, registry
from altx.compose import compose
from altx.config import validate
from altx.errors import AltxError
from altx.measure import num_parameters
from altx.model import Model
from altx.resolve import resolve
from altx_lab import evaluation, report
from altx_lab import text as texts
from altx_lab.interrupts import Stop
from altx_lab.progress import Display
from altx_lab.run import Run, damaged, resume_command, step_of
from altx_lab.settings import FIXED, Settings
from altx_lab.trainer import Diverged, Trainer, require_byte_model


class TextRecord(BaseModel, strict=True):
    name: str
    path: str | None
    component: str | None = None
    sha256: str
    bytes: int


class Record(BaseModel, strict=True):
    """What going on with a run reads in its run.json."""

    settings: dict[str, Any]
    text: TextRecord
    parameters: int
    evaluation: str
    changes: list[Any] = []


def start(
    model_file: Path,
    out: Path,
    options: dict[str, Any],
    *,
    text: str | Path | None = None,
    force: bool = False,
    plugins: registry.Registry | None = None,
) -> None:
    """Train a model from its first step.

    Args:
        model_file: a model.yaml.
        out: the run's directory, which is made.
        options: values of `Settings`.
        text: a text's name or a file; default: Python's language reference.
        force: replace a run that is in `out` already.
        plugins: the registry to use; default: everything installed.

    Raises:
        AltxError: saying what is wrong; interruptions too.
    """
    settings = validate(Settings, options)
    device = pick_device(settings.device)
    source = texts.load(text, plugins)
    source.require(settings.length)
    require_byte_model(recipe.load(recipe.read(model_file)))
    model = compose(model_file, seed=settings.seed, plugins=plugins).to(device)
    record = {
        "model": str(model_file),
        "settings": settings.model_dump(),
        "text": {
            "name": source.name,
            "path": source.path,
            "component": source.component,
            "sha256": source.sha256,
            "bytes": len(source.data),
            "held_out": f"the last {len(source.held_out)} bytes, from byte {source.split} on",
        },
        "parameters": num_parameters(model),
        "evaluation": evaluation.how(model, settings.length),
        "versions": versions(plugins or registry.default()),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    with Run.create(out, record, force=force) as run:
        _finish(run, Trainer(model, source, settings))


def resume(
    path: Path,
    options: dict[str, Any],
    *,
    model_file: Path | None = None,
    text: str | Path | None = None,
    plugins: registry.Registry | None = None,
) -> None:
    """Go on with a run from its newest checkpoint, with the settings it was started with.

    Args:
        path: the run's directory.
        options: values of `Settings` that the user gave; those in FIXED must be the run's own, and `steps`
            may only be raised.
        model_file: if given, must be the run's model.
        text: where the run's text is now, if it has moved.

    Raises:
        AltxError: as `start`; also if the run or its text is not what it was.
    """
    with Run.open(path) as run:
        _require_whole(run)
        old = validate(Settings, run.record["settings"], path=f"{path}/run.json")
        settings = validate(Settings, {**old.model_dump(), **options})
        for name in FIXED:
            if getattr(settings, name) != getattr(old, name):
                raise AltxError(
                    f"--{name.replace('_', '-')}: this run uses {getattr(old, name)}, not {getattr(settings, name)}",
                    hint="a resumed run keeps its settings; start another one to change them",
                )
        if settings.steps < old.steps:
            raise AltxError(f"--steps: this run goes to step {old.steps}, and resuming can only raise that")
        device = pick_device(settings.device)
        source = _same_text(run, text, plugins)
        source.require(settings.length)
        newest, model, files = run.latest(plugins)
        if model_file and not _same_model(model_file, model, plugins or registry.default()):
            raise AltxError(f"{model_file}: not the model of {path}", hint=f"leave it out: {resume_command(path)}")
        trainer = Trainer(model.to(device), source, settings)
        try:
            trainer.restore(files)
            if trainer.step != step_of(newest):
                raise AltxError(f"holds the trainer's state of step {trainer.step}")
            run.log.cut(trainer.step)
        except AltxError as error:
            raise damaged(newest, error) from None
        if settings != old:
            change = {"step": trainer.step, "from": old.model_dump()}
            changes = [*run.record.get("changes", []), change]
            run.update({**run.record, "settings": settings.model_dump(), "changes": changes})
        _finish(run, trainer)


def _require_whole(run: Run) -> None:
    """Raise AltxError if run.json does not say what going on with the run needs to know."""
    try:
        Record.model_validate(run.record)
    except ValidationError as error:
        first = error.errors()[0]
        raise AltxError(
            f"{run.path}/run.json: {'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]}",
            hint="put back what altx train wrote there, or start the run again",
        ) from None


def _finish(run: Run, trainer: Trainer) -> None:
    """Train to the end, then report."""
    settings = trainer.settings
    display = Display(start=trainer.step, steps=settings.steps, tokens=settings.batch * settings.length)
    try:
        with Stop() as stop, display:
            display.say(report.opening(run.path, run.record, trainer))
            _train(run, trainer, display, stop)
            result = report.result(run.record, trainer, run.log.evaluations())
    except KeyboardInterrupt:
        raise AltxError(f"stopped at once after step {trainer.step}; {_way_back(run)}") from None
    except Diverged as error:
        raise AltxError(
            error.what, hint=f"the last checkpoint is {run.checkpoints()[-1]}\ntry a lower --lr, or a longer --warmup"
        ) from None
    run.write_result(result)
    print(report.closing(run.path, result))


def _train(run: Run, trainer: Trainer, display: Display, stop: Stop) -> None:
    """Take steps, evaluate and save as the settings say.

    Raises:
        AltxError: when interrupted, after saving a checkpoint.
    """
    settings = trainer.settings
    saved = step_of(run.checkpoints()[-1]) if run.checkpoints() else -1
    evaluations = run.log.evaluations()
    evaluated = evaluations[-1][0] if evaluations else -1
    while not stop():
        last = trainer.step == settings.steps
        if saved != trainer.step and (last or trainer.step % settings.save_every == 0):
            run.save(trainer.model, trainer.step, trainer.files())
            saved = trainer.step
        if evaluated != trainer.step and (last or (trainer.step and trainer.step % settings.eval_every == 0)):
            if (bits := trainer.evaluate(stop)) is None:
                break
            run.log.append({"step": trainer.step, "held_out": bits})
            evaluated = trainer.step
            display.say(f"step {trainer.step}/{settings.steps}  held-out text: {bits:.3f} bits/byte")
        if last:
            return
        before = trainer.seconds
        record = trainer.train_step()
        run.log.append(record)
        display.step(record, trainer.seconds - before)
    if saved != trainer.step:
        run.save(trainer.model, trainer.step, trainer.files())
    raise AltxError(f"interrupted at step {trainer.step}; {_way_back(run)}")


def _way_back(run: Run) -> str:
    if not run.checkpoints():
        return "there is no checkpoint yet"
    return f"resume with: {resume_command(run.path)}"


def _same_text(run: Run, given: str | Path | None, plugins: registry.Registry | None) -> texts.Text:
    """The run's text, and not another."""
    recorded = run.record["text"]
    own = Path(recorded["path"]) if recorded["path"] else recorded.get("component")
    source = texts.load(given or own, plugins)
    if source.sha256 != recorded["sha256"]:
        raise AltxError(
            f"{source.name}: not the text this run was started with ({recorded['name']}, "
            f"{recorded['bytes']:,} bytes, sha256 {recorded['sha256'][:12]}...)",
            hint="give that text with --text, or start another run",
        )
    return source


def _same_model(path: Path, model: Model, plugins: registry.Registry) -> bool:
    return resolve(recipe.load(recipe.read(path)), plugins).config == model.config


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" takes a GPU if there is one.

    Raises:
        AltxError: if it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise AltxError("--device cuda: PyTorch finds no GPU here", hint="use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def versions(plugins: registry.Registry) -> dict[str, str]:
    """Versions of everything installed that can matter."""
    found = {plugin.distribution: plugin.version for plugin in plugins.plugins}
    own = {"altx": __version__, "altx-lab": metadata.version("altx-lab")}
    return {**found, **own, "torch": torch.__version__, "python": platform.python_version()}
