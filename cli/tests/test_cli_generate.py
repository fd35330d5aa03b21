"""`altx generate`: bytes in, text out, from a checkpoint or a training run."""

from __future__ import annotations

from pathlib import Path

import pytest

from altx import checkpoint
from altx.compose import compose
from altx_cli.commands.generate import TextWriter, find_checkpoint


@pytest.fixture
def save(altx):
    def save(path: str, **changes):
        checkpoint.save(compose({"mixer": "average", "dim": 16, **changes}, seed=0), path)

    return save


def test_the_same_seed_gives_the_same_text(altx, save):
    save("ckpt")
    args = ("generate", "ckpt", "--prompt", "hello", "--max-new-tokens", "20", "--seed")
    first, again, other = altx(*args, 1), altx(*args, 1), altx(*args, 2)
    assert first.exit_code == 0, first.stderr
    assert first.stdout == again.stdout != other.stdout
    assert "20 tokens in " in first.stderr
    assert first.stderr.rstrip().endswith("tokens/s, state 128 B")


def test_a_run_means_its_last_checkpoint(altx, save):
    for step in (2, 10, 9):
        save(f"run/checkpoints/step-{step:08d}")
    assert find_checkpoint(Path("run")) == Path("run/checkpoints/step-00000010")
    assert altx("generate", "run", "--prompt", "a", "--max-new-tokens", "1").exit_code == 0


def test_a_prompt_may_come_from_a_file(altx, save):
    save("ckpt")
    Path("prompt.txt").write_bytes(b"\xff\x00")
    assert altx("generate", "ckpt", "--prompt-file", "prompt.txt", "--max-new-tokens", "1").exit_code == 0


@pytest.mark.parametrize(
    "args, reason",
    [
        (["ckpt"], "there is no prompt"),
        (["ckpt", "--prompt", ""], "the prompt is empty"),
        (["ckpt", "--prompt", "a", "--prompt-file", "b"], "there are two prompts"),
        (["ckpt", "--prompt-file", "missing"], "missing: cannot be read"),
        (["missing", "--prompt", "a"], "missing does not exist"),
        ([".", "--prompt", "a"], "neither a checkpoint nor a training run"),
        (["ckpt", "--prompt", "a", "--top-p", "0"], "leaves no byte"),
        (["words", "--prompt", "a"], "words has 50 tokens"),
        (["classes", "--prompt", "a"], "not a causal language model"),
    ],
)
def test_what_cannot_be_continued_is_refused(altx, save, args, reason):
    save("ckpt")
    save("words", input={"kind": "tokens", "vocab": 50})
    save("classes", head={"kind": "classifier", "classes": 2})
    result = altx("generate", *args)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_characters_appear_when_their_last_byte_does(capsys):
    write, seen = TextWriter(), []
    for byte in "hé".encode():
        write(bytes([byte]))
        seen.append(capsys.readouterr().out)
    assert seen == ["h", "", "é"]
    write(b"\xc3", last=True)
    assert capsys.readouterr().out == "\ufffd\n"


def test_a_terminal_is_shown_nothing_that_it_would_obey(capsys):
    write = TextWriter()
    write.terminal = True
    write(b"a\x1b[2J\n")
    assert capsys.readouterr().out == "a\ufffd[2J\n"
