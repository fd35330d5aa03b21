"""Whatever a plugin's code raises, and wherever: it is named with its version and what to do, and the others work."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import pytest

from altx import recipe
from altx.capabilities import Capabilities
from altx.compose import build, compose
from altx.errors import AltxError, BrokenPlugin, ConfigError, describe
from altx.part import examine
from altx.registry import Component, Registry
from altx.resolve import resolve
from altx.spec import RouterSpec

ENTRY = """
{import_}
from altx import MixerSpec, hookimpl

def specs():
    yield MixerSpec("{name}", summary="s", build="{module}:build", config="{module}:Settings",
                    capabilities="{module}:capabilities")
    {midway}

@hookimpl
def altx_token_mixers():
    {hook}
    return specs()
"""
CODE = """
{code}
from altx.capabilities import Capabilities
from altx.config import Config
from pydantic import field_serializer, field_validator

class Settings(Config):
    size: int = 1

    @field_validator("size")
    @classmethod
    def check(cls, value):
        {validator}
        return value

    @field_serializer("size")
    def dump(self, value):
        {serializer}
        return value

    def fit(self, dim):
        {fit}

def capabilities(config):
    {capabilities}
    return Capabilities(growth="constant", rollback="snapshot")

def build(config, ctx):
    from altx.testing.partners import MovingAverage

    class Layer(MovingAverage):
        def init_state(self, *args, **kwargs):
            {init_state}
            return super().init_state(*args, **kwargs)

    {build}
    return Layer(ctx.dim)
"""
HOLES = ["import_", "hook", "midway", "code", "validator", "serializer", "fit", "capabilities", "build", "init_state"]
RAISES = {
    "error": "raise KeyError('boom')",
    "exit": "raise SystemExit(0)",
    "generator": "raise GeneratorExit('boom')",
    "stop": "raise StopIteration('boom')",
    "memory": "raise MemoryError",
    "library": "raise ImportError('libfancy.so: cannot open shared object file')",
    "module": "import not_there_at_all",
    "syntax": "compile('def broken(:', 'f', 'exec')",
    "text": "b'\\xff'.decode()",
    "permission": "raise PermissionError(13, 'Permission denied', '/secret')",
    "speechless": "raise type('Odd', (BaseException,), {'__str__': lambda self: 1 / 0})",
}


@pytest.fixture
def neighbours(install):
    """Install a good plugin, and a bad one with code in one of its holes; the registry of both."""

    def neighbours(**holes: str) -> Registry:
        empty = dict.fromkeys(HOLES, "pass")
        for name, distribution, filled in (("good", "altx-good", empty), ("bad", "altx-bad", {**empty, **holes})):
            sources = {
                f"{name}_entry": ENTRY.format(name=name, module=f"{name}_code", **filled),
                f"{name}_code": CODE.format(**filled),
            }
            install(distribution, "0.3", {name: f"{name}_entry"}, **sources)
        return Registry()

    return neighbours


def names_it(error: BaseException) -> bool:
    """Whether a message says which plugin of which version failed, and what to do."""
    text = "\n".join([str(error), *getattr(error, "__notes__", [])])
    return "altx-bad 0.3" in text and ("tell its authors" in text or "reinstall it" in text)


@pytest.mark.parametrize("raises", RAISES)
@pytest.mark.parametrize("hole", HOLES)
def test_an_exception_names_the_plugin_and_the_others_work(neighbours, hole: str, raises: str) -> None:
    registry = neighbours(**{hole: RAISES[raises]})
    if hole == "init_state":
        model = compose({"mixer": "bad", "dim": 16}, plugins=registry)
        with pytest.raises(BaseException) as caught:
            model.init_state(1)
    else:
        with pytest.raises(AltxError) as caught:
            compose({"mixer": [{"name": "bad", "size": 2}], "dim": 16}, plugins=registry)
    if (hole, raises) in {("fit", "text"), ("validator", "text")}:
        # It is a ValueError, with which these two refuse a setting.
        assert isinstance(caught.value, ConfigError) and "altx-bad 0.3" in str(caught.value)
    else:
        assert names_it(caught.value), caught.value
    assert compose({"mixer": "good", "dim": 16}, plugins=registry).init_state(1) is not None


@pytest.mark.parametrize("hole", ["build", "init_state"])
@pytest.mark.parametrize(
    "raises", ["raise MemoryError", 'raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")']
)
def test_what_does_not_fit_into_memory_is_to_be_made_smaller(neighbours, hole: str, raises: str) -> None:
    with pytest.raises(BaseException) as caught:
        compose({"mixer": "bad", "dim": 16}, plugins=neighbours(**{hole: raises})).init_state(1)
    assert names_it(caught.value)
    assert "memory ran out: use smaller settings" in "\n".join(
        [str(caught.value), *getattr(caught.value, "__notes__", [])]
    )


@pytest.mark.parametrize("hole", ["import_", "hook", "capabilities", "build"])
def test_ctrl_c_is_the_user_and_goes_through(neighbours, hole: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        compose({"mixer": "bad", "dim": 16}, plugins=neighbours(**{hole: "raise KeyboardInterrupt"}))


def test_what_a_plugin_says_itself_is_kept_and_named(neighbours) -> None:
    words = "from altx.errors import CompositionError; raise CompositionError('too narrow', hint='use dim 64')"
    with pytest.raises(AltxError, match=r"mixer 'bad' of altx-bad 0\.3: too narrow\nuse dim 64"):
        compose({"mixer": "bad", "dim": 16}, plugins=neighbours(build=words))


def test_an_author_finds_the_traceback(neighbours) -> None:
    with pytest.raises(AltxError, match="ALTX_DEBUG=1") as caught:
        compose({"mixer": "bad", "dim": 16}, plugins=neighbours(build="raise KeyError('boom')"))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_plugin_that_failed_to_load_keeps_its_traceback(neighbours) -> None:
    registry = neighbours(import_="raise KeyError('boom')")
    registry.load_all()
    (bad,) = (plugin for plugin in registry.plugins if plugin.distribution == "altx-bad")
    assert "bad_entry.py" in bad.traceback and "KeyError: 'boom'" in bad.traceback


LIES = {
    "its config 'bad_code:Settings' is not an altx.config.Config": "del Settings\nclass Settings: pass",
    "its config 'bad_code:Settings' is not an altx.config.Config ": "Settings = 3",
    "cannot be imported: AttributeError": "del build, Settings",
    "its capabilities are a dict, not altx Capabilities": "capabilities = lambda config: {'causal': True}",
    "its capabilities are a NoneType, not altx Capabilities": "capabilities = lambda config: None",
    "reading its capabilities failed: ValueError: streaming must be one of none, chunk, token, not 'tokn'":
        "capabilities = lambda config: Capabilities(streaming='tokn')",
    "reading its capabilities failed: ValueError: requires must be a frozenset of names, not 'x'":
        "capabilities = lambda config: Capabilities(requires='x')",
    "reading its capabilities failed: ValueError: losses must be weights by name, not ['x']":
        "capabilities = lambda config: Capabilities(losses=['x'])",
    "reading its capabilities failed: TypeError: 'int' object is not callable": "capabilities = 3",
    "its build returned a NoneType, not a Layer": "build = lambda config, ctx: None",
    "its build returned a Linear, not a Layer": "import torch\nbuild = lambda config, ctx: torch.nn.Linear(2, 2)",
    "failed: TypeError: <lambda>() takes 0 positional arguments but 2 were given": "build = lambda: None",
}  # fmt: skip


@pytest.mark.parametrize("reason", LIES)
def test_code_that_is_not_what_the_record_says_is_named(neighbours, install, reason: str) -> None:
    registry = neighbours()
    registry.get("mixer", "bad")
    exec(LIES[reason], vars(importlib.import_module("bad_code")))
    with pytest.raises(AltxError) as caught:
        compose({"mixer": "bad", "dim": 16}, plugins=registry)
    assert reason.strip() in str(caught.value)
    assert names_it(caught.value)
    if "build" not in LIES[reason]:
        assert "altx-bad 0.3" in (examine(registry.get("mixer", "bad")) or "")
    assert examine(registry.get("mixer", "good")) is None


def test_a_memory_or_router_without_promises_of_its_kind_is_named(neighbours) -> None:
    registry = neighbours()
    bad = registry.get("mixer", "bad")
    spec = RouterSpec(**{f.name: getattr(bad.spec, f.name) for f in dataclasses.fields(bad.spec)})
    registry._components.append(Component(spec, bad.plugin))
    data = {"mixer": "good", "router": "bad", "dim": 16}
    with pytest.raises(BrokenPlugin, match="its capabilities must be RouterCapabilities") as caught:
        resolve(recipe.load(data), registry)
    assert names_it(caught.value)


@pytest.mark.parametrize(
    ("role", "target", "reason"),
    [
        ("build", "not_there_at_all:x", "its build 'not_there_at_all:x' leads nowhere: there is no module"),
        ("config", "bad_entry.inner:x", "there is no module bad_entry.inner"),
        ("capabilities", "bad_entry:x", "the module bad_entry has no x"),
        ("config", "json.decoder_:x", "there is no module json.decoder_"),
    ],
)
def test_an_import_string_to_nowhere_shows_before_anything_is_imported(neighbours, role, target, reason) -> None:
    registry = neighbours()
    bad = registry.get("mixer", "bad")
    assert bad.missing() is None and "bad_code" not in sys.modules
    lying = dataclasses.replace(bad, spec=dataclasses.replace(bad.spec, **{role: target}))
    assert reason in (lying.missing() or "")
    assert reason in (examine(lying) or "")
    assert "bad_code" not in sys.modules


def test_a_build_is_known_by_what_it_was_built_as(neighbours) -> None:
    model = build(resolve(recipe.load({"mixer": "bad", "dim": 16}), neighbours()), device="meta")
    assert "mixer 'bad' of altx-bad 0.3" in {getattr(module, "built_as", "") for module in model.modules()}


def test_an_exception_becomes_one_line_that_no_terminal_obeys() -> None:
    assert describe(ValueError("one\ntwo")) == "ValueError: one"
    assert describe(ValueError()) == "ValueError"
    assert describe(ValueError("\x1b[2Jred\u202e")) == "ValueError: \\x1b[2Jred\\u202e"
    assert len(describe(ValueError("x" * 10**6))) < 400


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"requires": "x"}, "frozenset of names"),
        ({"provides": frozenset({1})}, "frozenset of names"),
        ({"includes": frozenset({"bias"})}, "norm and residual"),
        ({"losses": {"x": "much"}}, "weights by name"),
        ({"len_multiple": 0}, "positive integer"),
    ],
)
def test_promises_that_mean_nothing_are_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        Capabilities(**wrong)
