"""`altx check`: the laws of the contract, from the command line."""

from __future__ import annotations

import json


def test_laws_that_hold(altx):
    result = altx("check", "average", "--only", "steps", "--only", "gradients")
    assert result.exit_code == 0, result.stdout
    assert any("parallel = one token at a time" in line and line.endswith("ok") for line in result.stdout.splitlines())
    assert " passed" in result.stdout.splitlines()[-1]


def test_a_broken_law_exits_with_1_and_says_why(altx):
    result = altx("check", "average", "--only", "gradients", "--set", "deaf=true")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "unused" in result.stdout
    assert "row 0   x | x" in result.stdout
    assert "example(\"average\", config={'deaf': True}, dim=8, batch=1, length=2)" in result.stdout
    assert "      altx guide gradients" in result.stdout.splitlines()
    assert "1 failed" in result.stdout.splitlines()[-1]


def test_json(altx):
    report = json.loads(altx("check", "average", "--only", "steps", "--json").stdout)
    assert report["passed"] is True
    steps = next(result for result in report["results"] if result["check"] == "steps")
    assert (steps["subject"], steps["status"]) == ("average", "passed")
    assert steps["value"] <= steps["tolerance"]


def test_an_unknown_check_lists_the_checks(altx):
    result = altx("check", "average", "--only", "nonsense")
    assert result.exit_code == 2
    assert "there is no check 'nonsense'" in result.stderr
    assert "parallel = one token at a time" in result.stderr


def test_what_builds_on_a_broken_law_is_one_line(altx):
    result = altx("check", "average", "--set", "silent=true")
    assert result.exit_code == 1
    assert "y has not the width of x" in result.stdout
    assert result.stdout.count("skipped, as a law that they build on is broken:") == 1
    assert len(result.stdout.splitlines()) < 40


def test_an_unknown_component_or_setting_exits_with_2(altx):
    assert altx("check", "nonsense").exit_code == 2
    assert altx("check", "average", "--set", "nonsense=1").exit_code == 2
