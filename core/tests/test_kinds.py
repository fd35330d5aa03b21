"""Kinds that other packages add: in any order, by name, and without harm to anybody else's."""

from __future__ import annotations

import pytest

from altx.errors import AltxError, UnknownComponent
from altx.registry import Plugin, Registry

OWNER = """
from dataclasses import dataclass
from typing import ClassVar
from altx import ComponentSpec, Kind, hookimpl, hookspec

@dataclass(frozen=True)
class SuiteSpec(ComponentSpec):
    kind: ClassVar[str] = "suite"
    roles: ClassVar[tuple[str, ...]] = ("build",)
    tasks: tuple[str, ...] = ()

class Hooks:
    @hookspec
    def altx_suites():
        pass

@hookimpl
def altx_kinds():
    return [Kind("suite", "altx_suites", SuiteSpec, Hooks)]
"""
GUEST = """
from altx import MixerSpec, hookimpl
from owner_module import SuiteSpec

@hookimpl(optionalhook={optional})
def altx_suites():
    return [SuiteSpec("quick", summary="s", build="m:b", tasks=("recall",))]

@hookimpl
def altx_token_mixers():
    return [MixerSpec("guest", summary="s", build="m:b", config="m:c", capabilities="m:d")]
"""


def plugin(registry: Registry, distribution: str) -> Plugin:
    return next(p for p in registry.plugins if p.distribution == distribution)


@pytest.fixture
def both(install):
    """Installs the package that owns the kind and one that offers a suite, which is loaded before or after it."""

    def both(before: bool, optional: bool = False, **edit: str) -> Registry:
        source = OWNER
        for old, new in edit.values() if edit else ():
            source = source.replace(old, new)
        install("altx-owner", "1.0", {"owner": "owner_module"}, owner_module=source)
        guest = "altx-a-guest" if before else "altx-z-guest"
        install(guest, "1.0", {"guest": "guest_module"}, guest_module=GUEST.format(optional=optional))
        return Registry()

    return both


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("ask", ["components", "find", "get", "a mixer first"])
def test_what_others_offer_of_a_new_kind_is_found_whoever_is_loaded_first(both, before, optional, ask) -> None:
    registry = both(before, optional)
    if ask == "a mixer first":
        assert registry.get("mixer", "guest").name == "guest"
    if ask == "find":
        found = registry.find("quick", "suite")
    elif ask == "get":
        found = registry.get("suite", "quick")
    else:
        (found,) = registry.components("suite")
    assert (found.name, found.spec.tasks, found.spec.kind) == ("quick", ("recall",), "suite")
    assert [p.errors for p in registry.plugins if "guest" in p.name or "owner" in p.name] == [[], []]
    assert registry.kinds[-1] == "suite"
    assert [c.name for c in registry.components("mixer") if c.name == "guest"] == ["guest"]


def test_what_promises_nothing_cannot_be_checked(both) -> None:
    from altx.testing import check_component

    with pytest.raises(AltxError, match=r"suite 'quick' of altx-a-guest 1\.0 promises nothing"):
        check_component("quick", plugins=both(True))


def test_what_a_kind_does_without_is_not_missed(both) -> None:
    from altx.part import examine

    (suite,) = both(True).components("suite")
    assert examine(suite) == "suite 'quick' of altx-a-guest 1.0: its build 'm:b' leads nowhere: there is no module m"
    object.__setattr__(suite.spec, "build", "math:sqrt")
    assert examine(suite) is None


def test_an_unknown_suite_gets_the_nearest_name(both) -> None:
    with pytest.raises(UnknownComponent, match="no plugin offers a suite 'quik'"):
        both(True).get("suite", "quik")


def test_without_the_owner_an_optional_hook_is_no_matter_and_another_is_told(install) -> None:
    source = GUEST.replace("from owner_module", "from altx").replace("SuiteSpec", "ComponentSpec")
    install("altx-a", "1.0", {"a": "a_module"}, a_module=source.format(optional=True))
    install("altx-b", "1.0", {"b": "b_module"}, b_module=source.format(optional=False))
    registry = Registry()
    registry.load_all()
    assert plugin(registry, "altx-a").status == "ok"
    assert plugin(registry, "altx-b").errors == ["unknown hook 'altx_suites'; is a plugin missing that adds a kind?"]
    with pytest.raises(AltxError, match="there is no kind 'suite'"):
        registry.components("suite")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            'Kind("suite", ',
            'Kind("mixer", ',
            "spec must be a subclass of altx.spec.ComponentSpec whose kind is 'mixer'",
        ),
        ('Kind("suite", ', 'Kind("Suite!", ', "does not match"),
        ('Kind("suite", ', "Kind(3, ", "name 3 does not match"),
        ("SuiteSpec, Hooks)", "int, Hooks)", "spec must be a subclass"),
        ("SuiteSpec, Hooks)", "SuiteSpec)", "hookspecs declares no hook 'altx_suites' with @altx.hookspec"),
        ("    @hookspec\n", "", "hookspecs declares no hook 'altx_suites' with @altx.hookspec"),
        (
            'return [Kind("suite", "altx_suites", SuiteSpec, Hooks)]',
            "return [3]",
            "altx_kinds() returned 3, not a Kind",
        ),
        ("return [Kind", "1 / 0\n    return [Kind", "altx_kinds() raised ZeroDivisionError"),
        ("def altx_suites", "def altx_routers", "hookspecs declares no hook 'altx_suites'"),
    ],
)
def test_a_kind_that_is_none_is_told_and_hurts_nobody(both, old, new, reason) -> None:
    registry = both(False, True, first=(old, new))
    assert "mixer" in registry.kinds and registry.get("mixer", "guest")
    registry.load_all()
    owner = plugin(registry, "altx-owner")
    assert owner.status == "broken" and reason in owner.errors[0], owner.errors
    assert "suite" not in registry.kinds
    assert plugin(registry, "altx-z-guest").errors == []


def test_a_kind_belongs_to_the_first_and_the_second_is_told(both, install) -> None:
    install("altx-second", "1.0", {"second": "second_module"}, second_module=OWNER)
    registry = both(True)
    assert [c.name for c in registry.components("suite")] == ["quick"]
    (error,) = plugin(registry, "altx-second").errors
    assert error == "kind 'suite': there is one with that name or with the hook 'altx_suites' already"


def test_what_is_offered_of_a_new_kind_is_examined_like_any_other(both) -> None:
    registry = both(True, first=("tasks: tuple[str, ...] = ()", "tasks: str = ''"))
    assert registry.components("suite") == []
    assert "suite 'quick': tasks must be str, not ('recall',)" in plugin(registry, "altx-a-guest").errors[0]


def test_a_hook_with_arguments_is_an_error_of_who_implements_it(both, install) -> None:
    install(
        "altx-eager",
        "1.0",
        {"eager": "eager_module"},
        eager_module=GUEST.replace("suites()", "suites(x)").format(optional=True),
    )
    registry = both(False)
    assert [c.name for c in registry.components("suite")] == ["quick"]
    assert plugin(registry, "altx-eager").status == "broken"
