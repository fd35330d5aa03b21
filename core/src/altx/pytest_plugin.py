"""altx's pytest plugin, for tests of plugins: a fixture that hides other plugins, and a guard of conformance tests.

pytest imports this module wherever altx is installed, so it imports nothing but pytest.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from altx.registry import Registry

_DOOR = "altx.testing.pytest_door"
_CHOSEN = ("-k", "-m", "--deselect", "--lf", "--last-failed", "--sw", "--stepwise")
"""What chooses among tests on the command line, beside the name of a test (`file.py::name`)."""


@pytest.fixture
def altx_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """Hide all plugins but the one of this test's project: whatever altx finds is its or built in.

    The project is that of the nearest pyproject.toml above the test. The value is the registry.
    """
    from altx import registry
    from altx.discovery import ALLOW
    from altx.isolation import distribution_of

    distribution = distribution_of(request.path)
    if not distribution:
        pytest.fail(
            f"no pyproject.toml above {request.path} names an installed distribution with an entry point of the group "
            "altx.plugins; run `pip install -e .` where it stands",
            pytrace=False,
        )
    monkeypatch.setenv(ALLOW, distribution)
    registry.default.cache_clear()
    yield registry.default()
    registry.default.cache_clear()


class _Guard:
    """Sees to it that no law is left out of a conformance test unless a waiver says why.

    What is chosen on the command line is a note in the summary. What the project leaves out for everybody (a hook that
    deselects, a mark or a fixture that skips, other parameters, `-k` in addopts, a test that is not collected) fails
    the run.
    """

    def __init__(self, config: pytest.Config) -> None:
        arguments = [str(argument) for argument in config.invocation_params.args]
        self.chosen = any(argument.startswith(_CHOSEN) or "::" in argument for argument in arguments)
        self.off = bool(config.option.collectonly)
        self.worker: dict[str, Any] | None = getattr(config, "workeroutput", None)
        self.collected: dict[str, tuple[Any, set[str]]] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        if tested := _tested_by(item):
            self.collected.setdefault(_test_of(item), (tested, set()))[1].add(_law_of(item))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if _DOOR not in sys.modules or self.off:
            return
        running: dict[str, set[str]] = {}
        marked: dict[str, list[str]] = {}
        for item in session.items:
            if _tested_by(item):
                running.setdefault(_test_of(item), set()).add(_law_of(item))
                if {mark.name for mark in item.iter_markers()} & {"skip", "skipif", "xfail"}:
                    marked.setdefault(_test_of(item), []).append(_law_of(item))
        for test, (tested, laws) in self.collected.items():
            self._compare(test, tested, laws, running.get(test, set()))
        for test, names in marked.items():
            self._problem(test, f"marked to be skipped or to fail, where a waiver gives the reason: {_listed(names)}")
        collected = [tested for tested, _ in self.collected.values()]
        for tested in [] if self.chosen else sys.modules[_DOOR].CREATED:
            if not any(tested is other for other in collected):
                name = f"conformance({tested.name!r})"
                self._problem(name, "made and not collected: bind it to a name of its own that begins with test_")
        sys.modules[_DOOR].CREATED.clear()

    def _compare(self, test: str, tested: Any, collected: set[str], running: set[str]) -> None:
        absent = [law for law in tested.laws if law not in collected]
        left = [law for law in tested.laws if law in collected - running]
        if self.chosen and absent + left:
            self.notes.append(f"{test}: not chosen: {_listed(absent + left)}")
        elif absent:
            self._problem(test, f"not among its parameters: {_listed(absent)}")
        elif left:
            self._problem(test, f"deselected by the project: {_listed(left)}")
        self.notes += [f"{test}: {law} is waived: {reason}" for law, reason in tested.waivers.items()]

    def _problem(self, test: str, what: str) -> None:
        if (line := f"{test}: {what}") not in self.problems:
            self.problems.append(line)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        report = yield
        # One that is marked has been told of already.
        if report.when == "setup" and report.skipped and _tested_by(item) and not item.get_closest_marker("skip"):
            self._problem(_test_of(item), "skipped before it began, by a fixture, where a waiver gives the reason")
        return report

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """What a process of pytest-xdist has seen."""
        problems, notes = getattr(node, "workeroutput", {}).get("altx", ([], []))
        self.problems += [line for line in problems if line not in self.problems]
        self.notes += [line for line in notes if line not in self.notes]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.worker is not None:
            self.worker["altx"] = (self.problems, self.notes)
        elif self.problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.problems or self.notes:
            terminalreporter.section("altx conformance")
        for line in self.problems:
            terminalreporter.write_line(f"ERROR {line}", red=True)
        for line in self.notes:
            terminalreporter.write_line(line)


def _tested_by(item: pytest.Item) -> Any:
    """The `Conformance` that an item is a case of, if it is."""
    return getattr(getattr(item, "function", None), "conformance", None) if _DOOR in sys.modules else None


def _test_of(item: pytest.Item) -> str:
    """An item's test, without its parameters."""
    return item.nodeid.partition("[")[0]


def _listed(laws: list[str]) -> str:
    """Some names of laws, or how many they are."""
    return ", ".join(laws) if len(laws) <= 8 else f"{len(laws)} laws"


def _law_of(item: pytest.Item) -> str:
    """The law that an item of a conformance test tries."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("law", "?")) if callspec else "?"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Guard(config), "altx-guard")
