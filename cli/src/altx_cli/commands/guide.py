"""`altx guide`: how to write a plugin, all of it or one section."""

from __future__ import annotations

import difflib
import re
from importlib import resources
from typing import Annotated

import typer


def headings(text: str) -> list[tuple[int, int, str]]:
    """Line number, level and text of every heading of a markdown page, outside of its code."""
    found, code = [], False
    for number, line in enumerate(text.splitlines()):
        code ^= line.startswith("```")
        if not code and (match := re.match(r"(#+) (.+)", line)):
            found.append((number, len(match[1]), match[2].strip()))
    return found


def section(text: str, name: str) -> str | None:
    """The section whose heading is `name`, its subsections with it; capitals and punctuation count for nothing."""

    def key(heading: str) -> str:
        return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")

    known = headings(text)
    # A check's name may also be a word of the text above, with a capital.
    order = sorted(known, key=lambda heading: heading[2] != name)
    for number, level, heading in order:
        if key(heading) == key(name):
            end = next((line for line, other, _ in known if line > number and other <= level), None)
            return "\n".join(text.splitlines()[number:end]).strip()
    return None


def sections() -> list[str]:
    """The headings of the guide."""
    return [heading for _, _, heading in headings(page())]


def page() -> str:
    """The guide, a markdown page inside the package."""
    return resources.files("altx").joinpath("guide.md").read_text("utf-8")


def guide(
    name: Annotated[
        str | None, typer.Argument(metavar="SECTION", autocompletion=sections, help="A heading, or a check's name.")
    ] = None,
) -> None:
    """Print how to write a plugin, or one section of it.

    Every law that `altx check` tests has a section of its name.
    """
    text = page()
    found = section(text, name) if name else text.strip()
    if found is None:
        from altx.errors import AltxError

        known = [heading for _, _, heading in headings(text)]
        close = difflib.get_close_matches(name or "", known, n=1)
        hint = f"did you mean {close[0]!r}?\n" if close else ""
        raise AltxError(f"the guide has no section {name!r}", hint=f"{hint}its sections: {', '.join(known)}")
    print(found)
