"""`altx schema`: an editor accepts what `altx compose` accepts, and marks what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from altx import recipe, registry
from altx.resolve import resolve

BLOCK = "{sublayers: [{mixer: {name: average, rate: 0.25}, memory: both, attach: gate}, {feed_forward: mlp}]}"
GOOD = [
    "{mixer: average}",
    "{mixer: altx-toy:average, dim: 16}",
    '{mixer: "3*average,both", layers: 8, feed_forward: "none"}',
    "{mixer: [{name: average, rate: 0.25, repeat: 2}, both], memory: both, attach: gate}",
    "{mixer: average, defaults: {average: {rate: 0.25}}}",
    f"{{blocks: [{BLOCK}]}}",
]
BAD = [
    "{mixer: averag}",
    "{mixer: swiglu}",
    "{mixer: average, dims: 16}",
    "{mixer: {name: average, rat: 0.25}}",
    "{mixer: {name: average, rate: 0}}",
    "{mixer: average, memory: average}",
    "{mixer: average, layers: many}",
    f"{{blocks: [{BLOCK.replace('rate', 'rat')}]}}",
    f"{{blocks: [{BLOCK.replace('mlp', 'average')}]}}",
]


@pytest.fixture
def editor(altx):
    schema = json.loads(altx("schema").stdout)
    checker = jsonschema.validators.validator_for(schema)
    checker.check_schema(schema)
    return checker(schema)


@pytest.mark.parametrize("text", GOOD)
def test_it_accepts_what_compose_accepts(altx, editor, text):
    Path("recipe.yaml").write_text(text)
    assert [error.message for error in editor.iter_errors(yaml.safe_load(text))] == []
    written = recipe.dump(resolve(recipe.load(recipe.read(Path("recipe.yaml"))), registry.default()).config)
    assert [error.message for error in editor.iter_errors(written)] == []


@pytest.mark.parametrize("text", BAD)
def test_it_refuses_what_compose_refuses(altx, editor, text):
    Path("recipe.yaml").write_text(text)
    assert not editor.is_valid(yaml.safe_load(text))
    assert altx("compose", "recipe.yaml", "--no-prove").exit_code == 2


def test_a_file_is_written_with_the_line_that_refers_to_it(altx):
    result = altx("schema", "-o", "altx.schema.json")
    assert result.stdout.splitlines()[-1] == "# yaml-language-server: $schema=altx.schema.json"
    assert json.loads(Path("altx.schema.json").read_text()) == json.loads(altx("schema").stdout)
    result = altx("schema", "-o", "missing/altx.schema.json")
    assert (result.exit_code, result.stderr.startswith("error: missing/altx.schema.json cannot be")) == (2, True)


def test_a_component_whose_config_is_broken_may_have_any_settings(altx, install, monkeypatch):
    source = (
        "from altx import MixerSpec, hookimpl\n@hookimpl\ndef altx_token_mixers():\n"
        "    return [MixerSpec('lost', summary='s', build='os:path', config='cli_toy:No', capabilities='os:path')]\n"
    )
    install("altx-lost", "altx.plugins", "lost = lost_module", "lost_module", source)
    monkeypatch.setenv("ALTX_PLUGINS", "toy,lost")
    schema = json.loads(altx("schema").stdout)
    assert jsonschema.validators.validator_for(schema)(schema).is_valid({"mixer": {"name": "lost", "any": 1}})
