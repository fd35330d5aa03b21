"""The command `altx train`. Importing this is cheap: torch comes when the command runs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer


def complete_text(incomplete: str) -> list[str]:
    """Names of the texts that plugins offer; a shell completes files by itself."""
    from altx.registry import default

    with suppress(Exception):
        return [each.name for each in default().components("text") if each.name.startswith(incomplete)]
    return []


def train(
    target: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model.yaml; with --resume, the run to go on with.")
    ],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            autocompletion=complete_text,
            help="A file, or a text that `altx list --kind text` names.",
            show_default="python-docs",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory.", show_default="runs/MODEL")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in all.", show_default="2000")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per step.", show_default="8")] = None,
    length: Annotated[int | None, typer.Option(help="Bytes per window.", show_default="128")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.", show_default="0.004")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's, on matrices.", show_default="0.1")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps over which the rate rises.", show_default="40")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and batches.", show_default="0")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.", show_default="200")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.", show_default="100")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run, exactly as if it had not stopped.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is there already.")] = False,
) -> None:
    """Train a byte-level language model and say how well it predicts.

    \b
    altx train model.yaml                  # into runs/model
    altx train --resume runs/model         # after Ctrl-C, a crash or a power cut

    The rate warms up linearly and falls along a cosine to a tenth. The last tenth of the text is held out:
    how well it is predicted is what counts.
    """
    from altx.errors import AltxError
    from altx_lab import session

    given = {
        "steps": steps, "batch": batch, "length": length, "lr": lr, "weight_decay": weight_decay, "warmup": warmup,
        "seed": seed, "eval_every": eval_every, "save_every": save_every, "device": device,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    if not resume:
        if target.is_dir():
            raise AltxError(
                f"{target}: a directory, not a model.yaml", hint=f"to go on with a run: altx train --resume {target}"
            )
        session.start(target, out or default_run(target), options, text=text, force=force)
        return
    if force:
        raise AltxError("--force starts a run again and --resume goes on with it; use one of them")
    if target.is_file():
        session.resume(out or default_run(target), options, model_file=target, text=text)
    elif out:
        raise AltxError(
            "--out: a run that is resumed stays where it is", hint=f"leave it out: altx train --resume {target}"
        )
    else:
        session.resume(target, options, text=text)


def default_run(model: Path) -> Path:
    """Where a model's run goes unless --out says otherwise."""
    return Path("runs") / model.stem
