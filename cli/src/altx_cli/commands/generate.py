"""`altx generate`: continue a text with a trained model."""

from __future__ import annotations

import codecs
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from altx_cli.output import plural, size

BYTES = 256


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A checkpoint, or the directory of a training run.")],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the text to continue from a file; - is stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=0, help="How many bytes to generate.")] = 200,
    temperature: Annotated[
        float, typer.Option(metavar="X", min=0, help="Below 1 is more certain; 0 takes the likeliest byte.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(metavar="N", min=0, help="Consider only the N likeliest bytes; 0 considers all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="X", min=0, max=1, help="Consider the likeliest bytes that reach this probability.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=-(1 << 63), max=(1 << 63) - 1, help="Makes the result reproducible.")
    ] = None,
) -> None:
    """Continue a text with a trained model, byte by byte.

    The continuation goes to stdout as it is generated, a line of statistics to stderr.
    """
    if top_p == 0:
        raise typer.BadParameter("--top-p 0 leaves no byte to choose; for the likeliest byte use --temperature 0")
    text = read_prompt(prompt, prompt_file)
    path = find_checkpoint(run)

    import torch

    from altx import checkpoint
    from altx.config import LanguageModelHead, TokensInput
    from altx.errors import AltxError
    from altx.generation import stream

    model = checkpoint.load(path).eval()
    config = model.config
    if not (isinstance(config.input, TokensInput) and isinstance(config.head, LanguageModelHead) and config.causal):
        raise AltxError(f"{path} is not a causal language model, so it cannot continue a text")
    if config.input.vocab != BYTES:
        raise AltxError(
            f"{path} has {config.input.vocab} tokens, and altx generate knows only bytes (vocab 256)",
            hint="use altx.generation.stream in Python, with the tokenizer that the model was trained with",
        )
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    tokens = torch.tensor([list(text)])
    state = model.init_state(1, capacity=len(text) + max_new_tokens).bytes()
    write = TextWriter()
    start, generated = time.perf_counter(), 0
    try:
        for token in stream(
            model, tokens, max_new_tokens=max_new_tokens,
            temperature=temperature, top_k=top_k, top_p=top_p, generator=generator,
        ):  # fmt: skip
            write(bytes([int(token)]))
            generated += 1
    finally:
        write(b"", last=True)
        seconds = time.perf_counter() - start
        speed = f"{plural(generated, 'token')} in {seconds:.2f} s: {generated / seconds:,.0f} tokens/s"
        print(f"{speed}, state {size(state)}", file=sys.stderr)


def read_prompt(text: str | None, file: Path | None) -> bytes:
    """The bytes to continue.

    Raises:
        AltxError: unless there is exactly one prompt, of at least one byte.
    """
    from altx.errors import AltxError

    if (text is None) == (file is None):
        raise AltxError(
            "there is no prompt" if text is None else "there are two prompts",
            hint="give one of --prompt TEXT and --prompt-file FILE",
        )
    if text is not None:
        # Bytes of the command line that are not UTF-8 arrive as surrogates.
        prompt = text.encode("utf-8", errors="surrogateescape")
    else:
        try:
            prompt = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()  # type: ignore[union-attr]
        except OSError as error:
            raise AltxError(f"{file}: cannot be read: {error.strerror}") from None
    if not prompt:
        raise AltxError("the prompt is empty", hint="a model needs at least one byte to continue from")
    return prompt


def find_checkpoint(run: Path) -> Path:
    """The checkpoint that a path means: itself, or the last one of a training run.

    Raises:
        CheckpointError: if it is neither.
    """
    from altx.errors import CheckpointError

    if not run.is_dir():
        raise CheckpointError(f"{run} {'is not a directory' if run.exists() else 'does not exist'}")
    if (run / "model.safetensors").exists():
        return run
    steps = {
        int(match[1]): path for path in run.glob("checkpoints/*") if (match := re.fullmatch(r"step-(\d+)", path.name))
    }
    if not steps:
        raise CheckpointError(
            f"{run} is neither a checkpoint nor a training run",
            hint="a checkpoint holds model.safetensors, a training run checkpoints/step-00000000/",
        )
    return steps[max(steps)]


class TextWriter:
    """Writes bytes to stdout as text, as soon as they make up characters."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.terminal = sys.stdout.isatty()

    def __call__(self, data: bytes, last: bool = False) -> None:
        text = self.decoder.decode(data, final=last)
        if self.terminal:
            # A model may produce any byte; a terminal would obey some of them.
            text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        sys.stdout.write(text + "\n" * last)
        sys.stdout.flush()
