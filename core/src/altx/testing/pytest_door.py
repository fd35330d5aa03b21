"""The conformance checks as a pytest test, for plugin authors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from altx.errors import ConfigError
from altx.testing.check import REGISTERED
from altx.testing.result import Result
from altx.testing.runner import check_component


def conformance(
    name: str,
    *,
    kind: str | None = None,
    config: Mapping[str, Any] | None = None,
    waivers: Mapping[str, str] | None = None,
) -> Callable[[str], None]:
    """A parametrized test, one case per law: `test_mamba = conformance("mamba")`.

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
        if not reason.strip():
            raise ConfigError(f"waiver for {check!r}: give the reason")
    found: dict[str, list[Result]] = {}

    @pytest.mark.parametrize("law", list(REGISTERED))
    def test(law: str) -> None:
        if not found:
            for result in check_component(name, kind, config):
                found.setdefault(result.check, []).append(result)
        results = found[law]
        broken = [result for result in results if result.status == "failed"]
        if law in waivers:
            assert broken, f"waived ({waivers[law]}), but the law holds: remove the waiver"
            pytest.xfail(waivers[law])
        for result in broken:
            number = "" if result.value is None else f" ({result.value:.1e}, allowed {result.tolerance:.0e})"
            pytest.fail(f"{result.subject} breaks {law}: {result.law}\n{result.message}{number}", pytrace=False)
        if all(result.status == "skipped" for result in results):
            pytest.skip(results[0].message)

    return test
