"""The registry: lazy, in two stages; failures are data, clashes are named, nothing is shadowed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from altx.errors import AltxError, AmbiguousComponent, BrokenPlugin, UnknownComponent
from altx.registry import KINDS, Plugin, Registry

GOOD = """
from altx import MixerSpec, hookimpl
@hookimpl
def altx_token_mixers():
    return [MixerSpec("{name}", summary="s", build="m:b", config="m:c", capabilities="m:d", api_version={api})]
"""


def good(name: str, api: int = 1) -> str:
    return GOOD.format(name=name, api=api)


def plugin(registry: Registry, distribution: str) -> Plugin:
    return next(p for p in registry.plugins if p.distribution == distribution)


def test_discovery_imports_nothing(install) -> None:
    install("altx-lazy", "1.0", {"lazy": "lazy_module"}, lazy_module="raise SystemExit('imported')")
    registry = Registry()
    assert plugin(registry, "altx-lazy").status == "not loaded"
    assert "lazy_module" not in sys.modules


def test_a_name_loads_the_entry_point_of_that_name_and_no_other(install) -> None:
    install("altx-one", "1.0", {"one": "one_module"}, one_module=good("one"))
    install("altx-two", "1.0", {"two": "two_module"}, two_module=good("two"))
    registry = Registry()
    assert registry.get("mixer", "one").qualified == "altx-one:one"
    assert "one_module" in sys.modules and "two_module" not in sys.modules
    registry.get("mixer", "altx-two:two")
    assert "two_module" in sys.modules


def test_a_miss_loads_the_rest(install) -> None:
    install("altx-family", "1.0", {"family": "family_module"}, family_module=good("member"))
    assert Registry().get("mixer", "member").plugin.distribution == "altx-family"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
        (
            "from altx import hookimpl\n@hookimpl\ndef altx_token_mixer(): return []",
            "unknown hook 'altx_token_mixer'; did you mean 'altx_token_mixers'?",
        ),
        ("from altx import hookimpl\n@hookimpl\ndef altx_token_mixers(): raise KeyError('k')", "KeyError: 'k'"),
        ("from altx import hookimpl\n@hookimpl\ndef altx_token_mixers(): return [3]", "returned 3, not a MixerSpec"),
        ("from altx import MixerSpec", "it implements no hook; is @altx.hookimpl missing?"),
        (good("Bad Name"), "does not match"),
        (good("x").replace('"m:b"', '"nonsense"'), "build must be an import string"),
        (good("x").replace('"m:b"', "None"), "build must be str, not None"),
        (good("../../x"), "does not match"),
        (good("x" * 65), "name has 65 characters, more than 64"),
        (good(r"x\x1b[2J"), r"mixer 'x\x1b[2J': name holds characters that cannot be printed"),
        (good("x").replace('"s"', '"s" * 10**7'), "summary has 10000000 characters, more than 200"),
        (good("x").replace('"s"', r'"one\ntwo"'), "summary holds characters that cannot be printed"),
        (good("x").replace('"s"', '" "'), "summary is empty"),
        (good("x").replace('"s"', '"s", description="d" * 10001'), "description has 10001 characters"),
        (good("x").replace('"s"', r'"s", install="pip install x\x1b]0;"'), "install holds characters"),
        (good("x").replace('"m:b"', '"m..n:b"'), "build must be an import string"),
        (good("x").replace('"m:b"', '"/etc/m:b"'), "build must be an import string"),
        (good("x").replace("=1)", "=True)"), "api_version must be int, not True"),
        (good("x").replace("=1)", "='1')"), "api_version must be int, not '1'"),
        (good("x").replace("return", "return 2 *"), "mixer 'x' is offered twice"),
        (good("x").replace("return [", "return iter(lambda: 3, 4) or ["), "offers more than 1000 components"),
        (good("x").replace("return", "return 3 or"), "TypeError: 'int' object is not iterable"),
        (
            "from altx import MemorySpec\n" + good("x").replace("return [", 'return [MemorySpec("y"), '),
            "returned MemorySpec(name='y'",
        ),
        (
            "class Liar:\n    __class__ = property(lambda self: 1 / 0)\n"
            + good("x").replace("return", "return [Liar()] or"),
            "reading what altx_token_mixers() returned raised ZeroDivisionError",
        ),
        (
            "class Mute:\n    def __repr__(self): raise SystemExit\n"
            + good("x").replace("return", "return [Mute()] or"),
            "reading what altx_token_mixers() returned raised SystemExit",
        ),
        (
            "from altx import MixerSpec\nclass Other(MixerSpec): kind = 'memory'\n"
            + good("x").replace("[MixerSpec", "[Other"),
            "returned a record of kind 'memory'",
        ),
    ],
)
def test_a_broken_plugin_is_kept_with_its_reason_and_hurts_nobody(install, source: str, reason: str) -> None:
    install("altx-broken", "0.3", {"broken": "broken_module"}, broken_module=source)
    install("altx-good", "1.0", {"good": "good_module"}, good_module=good("good"))
    registry = Registry()
    assert [c.name for c in registry.components("mixer") if c.plugin.distribution == "altx-good"] == ["good"]
    broken = plugin(registry, "altx-broken")
    assert broken.status == "broken"
    assert reason in broken.errors[0]
    with pytest.raises(UnknownComponent, match=r"altx-broken 0\.3 did not load"):
        registry.get("mixer", "goood")


def test_of_many_defects_the_first_are_told(install) -> None:
    source = good("x").replace("return", "return ['x'] * 999 or")
    install("altx-much", "1.0", {"much": "much_module"}, much_module=source)
    registry = Registry()
    registry.load_all()
    errors = plugin(registry, "altx-much").errors
    assert len(errors) == 11 and errors[-1] == "and more"


def test_what_is_sound_beside_a_defect_is_offered(install) -> None:
    source = good("x").replace("return [", "return ['nonsense', ")
    install("altx-half", "1.0", {"half": "half_module"}, half_module=source)
    registry = Registry()
    assert registry.get("mixer", "x").plugin.errors == ["altx_token_mixers() returned 'nonsense', not a MixerSpec"]


def test_two_plugins_with_one_name_both_stay_and_the_short_name_is_an_error(install) -> None:
    install("altx-a", "1.0", {"a": "a_module"}, a_module=good("same"))
    install("altx-b", "2.0", {"b": "b_module"}, b_module=good("same"))
    registry = Registry()
    with pytest.raises(AmbiguousComponent) as error:
        registry.get("mixer", "same")
    assert "altx-a 1.0 and altx-b 2.0" in error.value.what
    assert "'altx-a:same' or 'altx-b:same'" in error.value.hint
    assert registry.get("mixer", "altx-b:same").plugin.version == "2.0"


def test_a_plugin_cannot_shadow_a_built_in(install) -> None:
    source = good("swiglu").replace("MixerSpec", "FeedForwardSpec").replace("altx_token_mixers", "altx_feed_forwards")
    install("altx-shadow", "1.0", {"swiglu": "shadow_module"}, shadow_module=source)
    registry = Registry()
    registry.load_all()
    with pytest.raises(AmbiguousComponent, match="'altx-shadow:swiglu'"):
        registry.get("feed-forward", "swiglu")


def test_a_plugin_from_the_future_is_listed_with_what_to_do(install) -> None:
    install("altx-future", "9.0", {"future": "future_module"}, future_module=good("future", api=99))
    registry = Registry()
    with pytest.raises(UnknownComponent, match="upgrade altx"):
        registry.get("mixer", "future")
    assert plugin(registry, "altx-future").status == "incompatible"


def test_the_version_before_this_one_is_accepted(install) -> None:
    install("altx-old", "1.0", {"old": "old_module"}, old_module=good("old", api=0))
    install("altx-older", "1.0", {"older": "older_module"}, older_module=good("older", api=-1))
    registry = Registry()
    assert registry.get("mixer", "old").name == "old"
    registry.load_all()
    assert "upgrade the plugin" in plugin(registry, "altx-older").errors[0]


def test_unknown_names_get_the_nearest_ones(install) -> None:
    install("altx-near", "1.0", {"near": "near_module"}, near_module=good("nearby"))
    with pytest.raises(UnknownComponent, match="did you mean 'nearby'"):
        Registry().get("mixer", "neraby")
    with pytest.raises(UnknownComponent, match="there is a mixer of that name, from altx-near"):
        Registry().get("memory", "nearby")


def test_altx_plugins_restricts_what_loads(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("altx-one", "1.0", {"one": "one_module"}, one_module=good("one"))
    install("altx-two", "1.0", {"two": "two_module"}, two_module=good("two"))
    monkeypatch.setenv("ALTX_PLUGINS", "one")
    registry = Registry()
    assert [c.name for c in registry.components("mixer")] == ["one"]
    assert plugin(registry, "altx-two").status == "disabled"
    with pytest.raises(UnknownComponent, match=r"altx-two 1\.0 is disabled by ALTX_PLUGINS"):
        registry.get("mixer", "two")
    monkeypatch.setenv("ALTX_PLUGINS", "")
    assert Registry().components("mixer") == []
    monkeypatch.setenv("ALTX_PLUGINS", "thre")
    with pytest.raises(AltxError, match="'thre', which is not installed"):
        Registry()


def test_an_import_string_to_nowhere_names_the_plugin() -> None:
    from importlib import metadata

    toy = Registry(entry_points=[metadata.EntryPoint("toy", "toy_plugin", "altx.plugins")])
    with pytest.raises(BrokenPlugin, match="'nowhere' of toy-plugin unknown: its config 'toy_plugin:Missing'"):
        toy.get("mixer", "nowhere").load("config")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_hook_is_collected(install, kind) -> None:
    extra = ', attach=("residual",), default_attach="residual"' if kind.name == "memory" else ""
    source = good("thing").replace("MixerSpec", kind.spec.__name__).replace("altx_token_mixers", kind.hook)
    install(
        "altx-thing",
        "1.0",
        {"thing": "thing_module"},
        thing_module=source.replace(", api_version", f"{extra}, api_version"),
    )
    found = Registry().get(kind.name, "thing")
    assert isinstance(found.spec, kind.spec)


def test_describing_components_never_imports_torch() -> None:
    code = (
        "import sys, altx.registry, altx.resolve, altx.recipe, altx.config\n"
        "registry = altx.registry.default()\n"
        "for c in registry.components(): [c.load(role) for role in c.spec.roles if role != 'build']\n"
        "altx.resolve.resolve(altx.recipe.load({'blocks': [{'sublayers': [{'feed_forward': 'mlp'}]}]}), registry)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
