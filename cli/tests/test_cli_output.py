"""Tables and sizes for people."""

from __future__ import annotations

import pytest
import typer

from altx_cli.options import parse_count, parse_settings
from altx_cli.output import count, findings, plural, size, table


def test_columns_are_aligned_and_numbers_to_the_right():
    lines = table([["a", "1", "x"], ["bcd", "200", "y"]], ("name", "n", ""), right=(1,))
    assert lines == ["NAME    N", "a       1  x", "bcd   200  y"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_text_goes_on_below_itself_on_a_terminal_and_stays_one_line_in_a_pipe(terminal, monkeypatch):
    text = "one two three four five six seven eight nine ten"
    monkeypatch.setenv("COLUMNS", "36")
    monkeypatch.setattr("sys.stdout", Stream(terminal))
    lines = table([["a", text], ["b", ""]], ("n", "what"), fold=2)
    if terminal:
        assert lines == ["N  WHAT", "a  one two three four five six", "   seven eight nine ten", "b"]
    else:
        assert lines == ["N  WHAT", f"a  {text}", "b"]


class Stream:
    def __init__(self, terminal):
        self.isatty = lambda: terminal


@pytest.mark.parametrize(
    "n, text",
    [
        (0, "0"),
        (12, "12"),
        (float("nan"), "-"),
        (999, "999"),
        (1234, "1.23k"),
        (129_900_000, "130M"),
        (999_900, "1000k"),
        (1.5e9, "1.5B"),
    ],
)
def test_count(n, text):
    assert count(n) == text


@pytest.mark.parametrize(
    "n, text", [(0, "0 B"), (512, "512 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (3 << 30, "3 GiB")]
)
def test_size(n, text):
    assert size(n) == text


def test_plural():
    assert (plural(1, "layer"), plural(2000, "layer")) == ("1 layer", "2,000 layers")


@pytest.mark.parametrize(
    "text, n", [("130M", 130_000_000), ("1.5B", 1_500_000_000), ("250k", 250_000), ("1000", 1000), ("1_000", 1000)]
)
def test_numbers_of_parameters(text, n):
    assert parse_count(text) == n


@pytest.mark.parametrize("text", ["", "0", "-5", "many", "1e6x", "M"])
def test_what_is_not_a_number_of_parameters_is_refused(text):
    with pytest.raises(typer.BadParameter, match="write 130M"):
        parse_count(text)


def test_settings_are_read_as_yaml():
    settings = parse_settings(["a.b=8", "c=[1, x]", "d=", "e=1e-3", "f=true", "g=x=y"])
    assert settings == {"a.b": 8, "c": [1, "x"], "d": None, "e": 0.001, "f": True, "g": "x=y"}


@pytest.mark.parametrize("pair", ["novalue", "=1", "a=[", "a={b"])
def test_malformed_settings_are_refused(pair):
    with pytest.raises(typer.BadParameter):
        parse_settings([pair])


def test_findings_show_the_number_and_why_a_law_is_broken():
    results = [
        {
            "check": "steps",
            "law": "parallel = stream",
            "status": "passed",
            "value": 3.1e-15,
            "tolerance": 1e-10,
            "message": "",
        },
        {
            "check": "rows",
            "law": "rows differ",
            "status": "failed",
            "value": 0.5,
            "tolerance": 0.0,
            "message": "row 1 hears row 0\nof course",
            "example": "input     x (1, 1, 2)",
        },
        {
            "check": "packing",
            "law": "packing",
            "status": "skipped",
            "value": None,
            "tolerance": None,
            "message": "does not apply",
        },
    ]
    assert findings(results) == [
        "steps  parallel = stream  3.1e-15 <= 1e-10  ok",
        "rows   rows differ                 0.5 > 0  FAILED",
        "    row 1 hears row 0",
        "    of course",
        "    input     x (1, 1, 2)",
        "    altx guide rows",
        "skipped, does not apply: packing",
    ]
