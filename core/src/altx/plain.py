"""YAML as plain data, from anybody: numbers, texts, lists and mappings, few enough to be read at once.

Nothing in a text runs: there are no tags, and so no objects. There are no aliases and no merges either, of which a few
lines can stand for gigabytes. Never imports torch.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from altx.errors import ConfigError, printable

MAX_DEPTH = 64
MAX_VALUES = 1 << 18

CORE = ("null", "bool", "int", "float")
"""What a word may stand for: not a date, which is a text here, nor a merge."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in CORE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self.depth += 1
        self.values += 1
        problem = (
            "aliases are not allowed" if isinstance(event, yaml.AliasEvent)
            else "tags are not allowed" if getattr(event, "tag", None) is not None
            else f"more than {MAX_DEPTH} levels inside each other" if self.depth > MAX_DEPTH
            else f"more than {MAX_VALUES} values" if self.values > MAX_VALUES
            else ""
        )  # fmt: skip
        if problem:
            raise ConstructorError(None, None, problem, event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if not (isinstance(key, yaml.ScalarNode) and key.tag.endswith(":str")):
                what = f"the key {printable(str(key.value), 60)!r}" if isinstance(key, yaml.ScalarNode) else "a key"
                raise ConstructorError(None, None, f"{what} is no text; write it in quotes", key.start_mark)
            if key.value in seen:
                problem = f"{printable(key.value, 60)!r} stands here twice"
                raise ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def number(self, node: Any) -> int | float:
        """A number of a sensible size; PyYAML also reads 1:30 as 90."""
        integer = node.tag.endswith(":int")
        try:
            if ":" not in node.value:
                value: int | float = (self.construct_yaml_int if integer else self.construct_yaml_float)(node)
                if not integer or -(1 << 63) <= value < 1 << 63:
                    return value
        except ValueError:
            pass
        problem = f"{printable(node.value, 60)!r} is no number of at most 64 bits; if it is a text, write it in quotes"
        raise ConstructorError(None, None, problem, node.start_mark)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for number in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{number}", _Loader.number)
for each in (_Loader, _Dumper):
    # YAML 1.1 takes 1e-3 for a word.
    exponent = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    each.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))


def parse(text: str, where: str) -> Any:
    """Plain data from YAML.

    Args:
        where: file or option that it comes from, for messages.

    Raises:
        ConfigError: if it is none, or holds more than plain data.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: not valid YAML{place}: {printable(problem)}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {printable(str(error))}") from None


def dump(data: Any) -> str:
    """Plain data as YAML, which `parse` turns into the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)
