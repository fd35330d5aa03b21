"""altx's pytest plugin: isolation from other plugins, strict waivers, and a guard of the conformance tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from altx import registry
from altx.testing import CHECKS

pytest_plugins = ["pytester"]

PARTS = """
from pydantic import Field
from altx import MixerSpec, hookimpl
from altx.capabilities import Capabilities
from altx.config import Config

class ToyConfig(Config):
    deaf: bool = Field(False, description="break the law of gradients")

def capabilities(config):
    return Capabilities(growth="constant", rollback="snapshot")

def build(config, ctx):
    import torch
    from altx.testing.partners import MovingAverage
    mixer = MovingAverage(ctx.dim)
    if config.deaf:
        mixer.unused = torch.nn.Parameter(torch.zeros(1))
    return mixer

@hookimpl
def altx_token_mixers():
    return [MixerSpec("toy", summary="A moving average", build=f"{__name__}:build", config=f"{__name__}:ToyConfig",
                      capabilities=f"{__name__}:capabilities")]
"""
TEST = "from altx.testing import conformance\ntest_toy = conformance('toy')\n"
NOTHING_RUNS = "def pytest_runtest_protocol(item):\n    return True\n"

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The project of a plugin, `altx-toy`, beside an installed stranger that offers the same name."""
    for distribution, module in (("altx-toy", "toy_parts"), ("altx-stranger", "stranger_parts")):
        info = pytester.mkdir(f"{distribution.replace('-', '_')}-1.0.dist-info")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[altx.plugins]\n{distribution[5:]} = {module}\n")
        pytester.makepyfile(**{module: PARTS})
    pytester.makepyprojecttoml('[project]\nname = "altx.toy"\n')
    pytester.syspathinsert()
    registry.default.cache_clear()
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others take a second to import

    def run(*arguments: str, conftest: str = "", ini: str = "", **tests: str) -> pytest.RunResult:
        pytester.makeconftest(conftest)
        pytester.makeini(f"[pytest]\n{ini}\n")
        pytester.makepyfile(**tests)
        return pytester.runpytest_inprocess("-p", "altx.pytest_plugin", "-p", "no:cacheprovider", *arguments)

    yield run
    registry.default.cache_clear()


def test_conformance_sees_the_plugin_of_its_project_and_no_other(project: Run) -> None:
    result = project("-k", "shapes or rows", test_a=TEST)
    result.assert_outcomes(passed=2, deselected=len(CHECKS) - 2)
    result.stdout.fnmatch_lines(["*altx conformance*", f"test_a.py::test_toy: not chosen: {len(CHECKS) - 2} laws"])


def test_the_fixture_hides_the_plugins_of_others(project: Run) -> None:
    test = """
import pytest
from altx import registry

def test_alone(altx_alone):
    assert altx_alone is registry.default()
    assert [p.distribution for p in altx_alone.plugins if p.status != "disabled"] == ["altx", "altx-toy"]
    assert altx_alone.find("toy").plugin.distribution == "altx-toy"

def test_among_others():
    assert "altx-stranger" in [p.distribution for p in registry.default().plugins if p.status != "disabled"]
"""
    project(test_a=test).assert_outcomes(passed=2)


def test_the_fixture_says_which_project_it_misses(project: Run, pytester: pytest.Pytester) -> None:
    (pytester.path / "pyproject.toml").write_text("[project]\nname = 'altx-elsewhere'\n")
    result = project(test_a="def test_alone(altx_alone): pass\n")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no pyproject.toml above*pip install -e .*"])


@pytest.mark.parametrize(
    ("waivers", "words"),
    [
        ("{'steps': ' '}", "*waiver for 'steps': give the reason*"),
        ("{'steps': None}", "*waiver for 'steps': give the reason*"),
        ("{'stepps': 'why'}", "*waiver for 'stepps': there is no such check*"),
    ],
)
def test_a_waiver_without_a_reason_or_of_no_check_is_an_error(project: Run, waivers: str, words: str) -> None:
    result = project(test_a=TEST.replace("'toy'", f"'toy', waivers={waivers}"))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([words])


def test_a_waiver_is_shown_with_its_reason_and_cannot_outlive_it(project: Run) -> None:
    waived = "'toy', config={'deaf': %s}, waivers={'gradients': 'one parameter is for later', 'graph': 'no graph'}"
    result = project("-k", "gradients or graph", test_a=TEST.replace("'toy'", waived % "True"))
    result.assert_outcomes(xfailed=1, failed=1, skipped=1, deselected=len(CHECKS) - 3)
    result.stdout.fnmatch_lines(
        ["*waived (no graph), but the law does not apply (declares that it reads no graph): remove the waiver*"]
    )
    result.stdout.fnmatch_lines(["test_a.py::test_toy: gradients is waived: one parameter is for later"])
    result = project("-k", "gradients", test_a=TEST.replace("'toy'", waived % "False"))
    result.assert_outcomes(failed=1, deselected=len(CHECKS) - 1)
    result.stdout.fnmatch_lines(["*waived (one parameter is for later), but the law holds: remove the waiver*"])


def test_a_failure_is_told_in_full(project: Run) -> None:
    result = project("-k", "gradients", test_a=TEST.replace("'toy'", "'toy', config={'deaf': True}"))
    result.stdout.fnmatch_lines(
        [
            "toy breaks gradients: the task's gradient reaches every parameter",
            "no gradient, or one that is not finite: unused",
            "*x (1, 2, 2) in float64*",
            "*example(\"toy\", config={'deaf': True}, dim=2, batch=1, length=2)*",
            "altx guide gradients",
        ]
    )


DROPS = """
def pytest_collection_modifyitems(items, config):
    gone = [item for item in items if "steps" in item.name]
    items[:] = [item for item in items if item not in gone]
"""
MARKS = """
import pytest
def pytest_collection_modifyitems(items):
    for item in items:
        if "steps" in item.name:
            item.add_marker(pytest.mark.skip)
"""
UNCOLLECTED = "conformance('toy'): made and not collected*"
LEFT_OUT = {
    "a hook that drops items": ({"conftest": DROPS}, TEST, "test_a.py::test_toy: deselected by the project: steps"),
    "-k in the project's settings": (
        {"ini": "addopts = -k 'not padding'"},
        TEST,
        "test_a.py::test_toy: deselected by the project: padding, padding-across-calls",
    ),
    "a mark": ({"conftest": MARKS}, TEST, "test_a.py::test_toy: marked to be skipped or to fail*: steps"),
    "a mark on the test": (
        {},
        TEST + "import pytest\ntest_toy = pytest.mark.xfail(test_toy)\n",
        f"test_a.py::test_toy: marked to be skipped or to fail*: {len(CHECKS)} laws",
    ),
    "other parameters": (
        {},
        TEST + "import pytest\ntest_toy.pytestmark = [pytest.mark.parametrize('law', ['shapes'])]\n",
        f"test_a.py::test_toy: not among its parameters: {len(CHECKS) - 1} laws",
    ),
    "a name that is not collected": (
        {},
        TEST.replace("test_toy", "toy"),
        "conformance('toy'): made and not collected*",
    ),
    "a name used twice": ({}, TEST + "test_toy = conformance('toy')\n", "conformance('toy'): made and not collected*"),
}


@pytest.mark.parametrize("way", LEFT_OUT)
def test_a_law_that_the_project_leaves_out_fails_the_run(project: Run, way: str) -> None:
    settings, test, words = LEFT_OUT[way]
    result = project(test_a=test, **{**settings, "conftest": settings.get("conftest", "") + "\n" + NOTHING_RUNS})
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"ERROR {words}"])


def test_all_the_laws_and_nothing_amiss_says_nothing(project: Run) -> None:
    result = project(test_a=TEST, conftest=NOTHING_RUNS)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("*altx conformance*")


@pytest.mark.parametrize(
    "choice", [["-k", "padding"], ["test_a.py::test_toy[padding]"], ["--deselect=test_a.py::test_toy[steps]"]]
)
def test_what_is_chosen_on_the_command_line_is_a_note(project: Run, choice: list[str]) -> None:
    result = project(*choice, test_a=TEST, conftest=NOTHING_RUNS)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("ERROR*")


def test_a_fixture_that_skips_fails_the_run(project: Run) -> None:
    skips = "import pytest\n@pytest.fixture(autouse=True)\ndef lazy():\n    pytest.skip('later')\n"
    result = project(test_a=TEST, conftest=skips)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["ERROR test_a.py::test_toy: skipped before it began, by a fixture*"])


@pytest.mark.parametrize(
    ("target", "value"),
    [
        ("altx.testing.batching.EXACT", "1.0"),
        ("altx.testing.runner._run_one", "None"),
        ("altx.testing.check._registered", "{}"),
        ("altx.testing.basics.rows.__code__", "(lambda case, trial: None).__code__"),
    ],
)
def test_a_check_that_was_replaced_fails_the_tests(project: Run, target: str, value: str) -> None:
    module, _, attribute = target.rpartition(".")
    owner = f"__import__('sys').modules['{module}']" if attribute != "__code__" else "rows"
    patch = f"""
import pytest
from altx.testing.basics import rows
@pytest.fixture(autouse=True)
def easier(monkeypatch):
    monkeypatch.setattr({owner}, "{attribute}", {value})
"""
    result = project("-k", "shapes", test_a=TEST, conftest=patch)
    result.assert_outcomes(failed=1, deselected=len(CHECKS) - 1)
    result.stdout.fnmatch_lines([f"{target.removesuffix('.__code__')} is not what was installed"])


def test_the_registered_checks_cannot_be_taken_away() -> None:
    from altx.testing.check import REGISTERED

    with pytest.raises(TypeError):
        del REGISTERED["steps"]  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        CHECKS["steps"] = "anything"  # type: ignore[index]


def test_a_process_of_xdist_tells_what_it_saw(
    project: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    pytester.makeconftest(DROPS + NOTHING_RUNS)
    pytester.makepyfile(test_a=TEST)
    result = pytester.runpytest_subprocess("-n", "1", "-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["ERROR test_a.py::test_toy: deselected by the project: steps"])


def test_a_project_that_has_nothing_to_do_with_altx_does_not_import_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_nothing_heavy(pytestconfig):
            assert pytestconfig.pluginmanager.hasplugin("altx-guard")
            assert {"torch", "numpy", "pydantic", "altx.registry", "altx.testing"} & set(sys.modules) == set()
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
    assert "torch" in sys.modules
