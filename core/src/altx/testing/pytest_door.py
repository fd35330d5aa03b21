"""The conformance checks as a pytest test, for plugin authors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altx import registry
from altx.errors import ConfigError, UnknownComponent
from altx.isolation import distribution_of
from altx.testing.check import REGISTERED
from altx.testing.guard import changes
from altx.testing.result import Result
from altx.testing.runner import Trying, subjects

if TYPE_CHECKING:
    import pytest


@dataclass
class Conformance:
    """A component's conformance test, while pytest runs.

    Args:
        name, kind, config: the component.
        waivers: laws that it is known to break, with the reasons.
    """

    name: str
    kind: str | None
    config: Mapping[str, Any] | None
    waivers: Mapping[str, str]
    laws: tuple[str, ...] = tuple(REGISTERED)
    _trying: list[Trying] = field(default_factory=list)

    def results(self, law: str, path: Path) -> list[Result]:
        """A law of every subject, tried among the plugins of the project that the test file belongs to."""
        if not self._trying:
            self._trying = [Trying(subject) for subject in self._subjects(distribution_of(path))]
        return [trying.result(law) for trying in self._trying]

    def _subjects(self, distribution: str | None) -> list[Any]:
        if distribution:
            alone = registry.Registry(allow=[distribution])
            try:
                alone.find(self.name, self.kind)
            except UnknownComponent:
                pass  # somebody else's component
            else:
                return subjects(self.name, self.kind, self.config, alone)
        return subjects(self.name, self.kind, self.config)


CREATED: list[Conformance] = []
"""Those that altx's pytest plugin has not looked for yet among the tests that were collected."""


def conformance(
    name: str,
    *,
    kind: str | None = None,
    config: Mapping[str, Any] | None = None,
    waivers: Mapping[str, str] | None = None,
) -> Callable[..., None]:
    """A parametrized test, one case per law: `test_mamba = conformance("mamba")`.

    Only the built-ins and the plugin that the test's project installs are discovered. altx's pytest plugin sees to it
    that no law is left out; see `altx guide "What the tests guard"`.

    Args:
        name: the component.
        kind: needed where several kinds have a component of that name.
        config: its settings.
        waivers: laws that it is known to break, each with the reason. Strict: a waived law that holds fails
            the test, so that a waiver cannot outlive its reason.

    Raises:
        ConfigError: if a waiver names no check, or gives no reason.
    """
    import pytest

    waivers = dict(waivers or {})
    for check, reason in waivers.items():
        if check not in REGISTERED:
            raise ConfigError(f"waiver for {check!r}: there is no such check", hint=f"checks: {', '.join(REGISTERED)}")
        if not isinstance(reason, str) or not reason.strip():
            why = f'waivers={{"{check}": "why it cannot hold"}}'
            raise ConfigError(f"waiver for {check!r}: give the reason", hint=why)
    tested = Conformance(name, kind, config, waivers)
    CREATED.append(tested)

    @pytest.mark.parametrize("law", tested.laws)
    def test(law: str, request: pytest.FixtureRequest) -> None:
        if changed := changes():
            pytest.fail("\n".join(changed), pytrace=False)
        results = tested.results(law, request.path)
        broken = [result for result in results if result.status == "failed"]
        untried = [result.message for result in results if result.status == "skipped"]
        if law in tested.waivers:
            if broken:
                pytest.xfail(tested.waivers[law])
            if len(untried) < len(results):
                pytest.fail(f"waived ({tested.waivers[law]}), but the law holds: remove the waiver", pytrace=False)
            if not any(message.startswith("needs ") for message in untried):
                why = f"but the law does not apply ({untried[0]}): remove the waiver"
                pytest.fail(f"waived ({tested.waivers[law]}), {why}", pytrace=False)
        if broken:
            reports = [f"{result.subject} breaks {law}: {result.law}\n{result.report()}" for result in broken]
            pytest.fail("\n\n".join(reports), pytrace=False)
        if len(untried) == len(results):
            pytest.skip(untried[0])

    test.conformance = tested  # type: ignore[attr-defined]
    return test
