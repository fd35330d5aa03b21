"""Errors a user can mend. The command line prints them without a traceback and exits with status 2."""

from __future__ import annotations

from types import TracebackType


class AltxError(Exception):
    """Something the user can put right.

    Args:
        what: what is wrong and where, naming the value, the plugin and its version where they matter.
        hint: what to do about it.
    """

    def __init__(self, what: str, *, hint: str = "") -> None:
        self.what, self.hint = clean(what), clean(hint)
        super().__init__(f"{self.what}\n{self.hint}" if hint else self.what)


class ConfigError(AltxError):
    """A value in a configuration is wrong; the message starts with its path in the file."""


class UnknownComponent(AltxError):
    """No plugin offers a component of this name."""


class AmbiguousComponent(AltxError):
    """Several plugins offer a component of this name; a qualified name is needed."""


class BrokenPlugin(AltxError):
    """A plugin could not be loaded, or one of its import strings leads nowhere."""


class CompositionError(AltxError):
    """Parts that are valid by themselves cannot live together in this model."""


class UnsupportedContext(AltxError):
    """A call carries a context (mask, packing, resets, length) that the model cannot honour."""


class StateError(AltxError):
    """A state was asked for something that it cannot do exactly."""


class CheckpointError(AltxError):
    """A checkpoint is missing, damaged, or belongs to another model."""


MAX_SHOWN = 300
MAX_MESSAGE = 10_000


def clean(text: str) -> str:
    """A message, with nothing in it that a terminal would obey: names in it may come from a file or a plugin."""
    text = text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """Text of unknown origin as a line of a message can hold it."""
    return clean(text if len(text) <= limit else text[: limit - 3] + "...").replace("\n", "\\n")


def shown(value: object) -> str:
    """The repr of a value of unknown origin, as a message can hold it."""
    try:
        return printable(repr(value))
    except Exception:
        return f"a {type(value).__name__}"


def describe(error: BaseException) -> str:
    """An exception in one line."""
    try:
        text = str(error).strip()
    except Exception:
        text = ""
    name = printable(type(error).__name__)
    return f"{name}: {printable(text.splitlines()[0])}" if text else name


def remedy(error: BaseException, otherwise: str) -> str:
    """What to do about an exception in a component's code: `otherwise`, where it is not that memory ran out."""
    text = describe(error).lower()
    if any(words in text for words in ("memoryerror", "outofmemory", "can't allocate memory", "bad_alloc")):
        return f"memory ran out: use smaller settings, a smaller batch or shorter sequences; else {otherwise}"
    return otherwise


def culprit(error: BaseException) -> str:
    """The component of a plugin in whose code an exception was raised, with plugin and version; empty if in none."""
    found = ""
    trace: TracebackType | None = error.__traceback__
    while trace:
        found = getattr(trace.tb_frame.f_locals.get("self"), "__dict__", {}).get("built_as") or found
        trace = trace.tb_next
    return found
