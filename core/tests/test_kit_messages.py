"""What a broken law tells its author: the smallest input, where the difference begins, lines that show it."""

from __future__ import annotations

import contextlib
import io
import re
import textwrap

import pytest
import specimens
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError

from altx.capabilities import Capabilities
from altx.errors import ConfigError
from altx.layer import Layer, Output
from altx.testing import Result, run
from altx.testing.case import Subject, difference
from altx.testing.check import REGISTERED
from altx.testing.partners import MovingAverage
from altx.testing.trial import Trial

SMALLEST = {
    "kv-sharing": [". x"],
    "recall": [". x"],
    "causality": ["x | x"],
    "halves": ["x | x"],
    "padding": [". x"],
    "steps": ["x | x"],
    "splits": ["x | x"],
    "select": ["x | x"],
    "reset": ["x R"],
    "reset (padding)": ["x r x"],
    "rollback": ["x | x | x"],
    "seen": ["."],
    "growth": ["x | x | x"],
    "growth (linear)": ["64 x | 64 x | 64 x"],
}
"""The tokens of the smallest input that breaks a specimen's law, where they are shown."""


def subject(layer: type[Layer], dim: int = specimens.DIM) -> Subject:
    return Subject(layer.__name__, lambda: layer(dim), dim, resized=lambda dim: subject(layer, dim), origin="subject")


def failure(name: str) -> Result:
    results = run(subject(specimens.SPECIMENS[name]), [name.partition(" ")[0]])
    return next(result for result in results if result.status == "failed")


def test_the_message_that_a_person_reads() -> None:
    assert failure("padding").report() == textwrap.dedent(
        """\
        padded tokens differ from the real ones alone
        input     x (1, 2, 2) in float64, random with seed 20250: the smallest found
                  row 0   . x
                          x a token, . masked
        found     state.h at [0, 0] is 1.676, expected 1.644 (apart by 0.033); 2 of 2 numbers differ
        try it    import torch

                  from altx.context import Context
                  from altx.testing import example

                  layer, x = example(subject, dim=2, batch=1, length=2)
                  mask = torch.tensor([[0, 1]]).bool()
                  ctx = Context(mask=mask)
                  start = layer.init_state(len(x), dtype=torch.float64)
                  alone = x[mask].unflatten(0, (len(x), -1))  # the real tokens
                  out = layer(x, ctx, start)
                  ref = layer(alone, ctx.replace(mask=None), start)
                  found = out.state.flat()["h"]
                  wanted = ref.state.flat()["h"]
                  print(found, wanted)
        altx guide padding"""
    )


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_input_is_shown_as_tokens(name: str) -> None:
    assert re.findall(r"^ +row \d+   (.*)$", failure(name).example, re.MULTILINE) == SMALLEST[name]


@pytest.mark.parametrize("name", specimens.SPECIMENS)
def test_the_lines_show_the_failure(name: str) -> None:
    result = failure(name)
    code = textwrap.dedent(" " * len("try it") + result.example.partition("try it")[2])
    if not code.startswith("import"):
        assert not REGISTERED[result.check].trials  # there is no input to show
        return
    layer, sizes = specimens.SPECIMENS[name], re.search(r"dim=(\d+)", result.example)
    space = {"subject": subject(layer, int(sizes[1]) if sizes else specimens.DIM)}
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
            exec(code, space)
    except GradcheckError:
        assert result.check == "gradcheck"
        return
    except (RuntimeError, IndexError) as error:
        assert str(error).splitlines()[0] in result.example  # the failure is an error
        return
    assert result.check != "gradcheck"
    if "found" in space and result.check != "dtypes":
        assert difference(space["found"], space["wanted"]) > (result.tolerance or 0)


def test_the_same_failure_gives_the_same_message() -> None:
    assert failure("splits").report() == failure("splits").report()


def test_a_law_that_holds_shows_nothing() -> None:
    assert {result.example for result in run(subject(MovingAverage), ["steps"])} == {""}


def test_smaller_trials_have_less_in_them() -> None:
    trial = Trial(("xx.x", "Rxxr"), (1, 3))
    assert Trial(("xx.x",), (1, 3)) in list(trial.smaller(1, "keep"))
    assert Trial(("x.x", "xxr"), (3,)) not in list(trial.smaller(1, "keep"))
    assert Trial(("xxx", "Rxr"), (1, 2)) in list(trial.smaller(1, "keep"))
    assert Trial((".x", "xr"), (2,)) in list(trial.smaller(1, "drop"))
    assert Trial(trial.rows, (4,)) in list(trial.smaller(1, "join"))
    assert Trial(("xxxx", "Rxxr"), (1, 3)) in list(trial.smaller(1, "keep"))
    assert all(len(smaller.rows[0]) % 2 == 0 for smaller in trial.smaller(2, "keep"))


def test_the_picture_of_a_trial() -> None:
    trial = Trial(("xx.x", "Rxxr"), (1, 3))
    assert trial.picture() == ["x | x . x", "R | x x r"]
    assert trial.mask is not None and trial.mask.tolist() == [[True, True, False, True], [True, True, True, False]]
    assert trial.reset is not None and trial.reset.tolist() == [[False] * 4, [True, False, False, True]]


class Unbuilt(Layer):
    capabilities = Capabilities(streaming="none")

    def __init__(self) -> None:
        raise NotImplementedError("to be written")

    def forward(self, x, ctx=None, state=None):
        raise AssertionError


class ReturnsATensor(Layer):
    capabilities = Capabilities(streaming="none")

    def forward(self, x, ctx=None, state=None):
        return x


class PromisesNothing(Layer):
    def forward(self, x, ctx=None, state=None):
        return Output(x)


class WrongShapes(Layer):
    capabilities = Capabilities(streaming="none")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 16))

    def forward(self, x, ctx=None, state=None):
        return Output(x @ self.weight)


class ForgetsTheState(MovingAverage):
    def forward(self, x, ctx=specimens.FRESH, state=None):
        return Output(super().forward(x, ctx, state).y)


@pytest.mark.parametrize(
    ("layer", "check", "words"),
    [
        (Unbuilt, "shapes", ["NotImplementedError: to be written", "in __init__", "raise NotImplementedError"]),
        (ReturnsATensor, "shapes", ["forward returned a Tensor, not an altx.layer.Output"]),
        (PromisesNothing, "shapes", ["PromisesNothing has no `capabilities`"]),
        (WrongShapes, "shapes", ["mat1 and mat2", "x (1, 1, 16)", "return Output(x @ self.weight)"]),
        (lambda: ForgetsTheState(16), "unmutated", ["given a state, forward returned none"]),
    ],
)
def test_a_component_that_is_half_done_fails_once_and_is_told_where(layer, check: str, words: list[str]) -> None:
    failed = [result for result in run(Subject("half", layer)) if result.status == "failed"]
    assert [result.check for result in failed] == [check]
    assert [word for word in words if word not in failed[0].report()] == []
    assert failed[0].report().endswith(f"altx guide {check}")


def test_what_is_not_there_to_check_is_an_error() -> None:
    from altx.errors import AltxError
    from altx.testing import example

    layer, x = example("swiglu", dim=8, batch=2, length=3)
    assert x.shape == (2, 3, 8)
    assert layer(x).y.dtype == torch.float64
    with pytest.raises(AltxError, match=r"no 'swiglu\[kv\]' to check"):
        example("swiglu[kv]")
    with pytest.raises(ConfigError, match="no check 'halfs'"):
        run(subject(MovingAverage), ["halfs"])


def test_a_component_that_leaves_the_process_fails_like_any_other() -> None:
    class Leaves(MovingAverage):
        def forward(self, x, ctx=specimens.FRESH, state=None):
            raise SystemExit(3)

    failed = [result for result in run(Subject("leaves", lambda: Leaves(16))) if result.status == "failed"]
    assert [result.message.partition(" (")[0] for result in failed] == ["raised SystemExit: 3"]
