"""`altx guide`: the author's guide, and a section for every law."""

from __future__ import annotations

import pytest

from altx.testing import CHECKS
from altx_cli.commands.guide import headings, page, section


def test_every_check_has_its_section_in_the_guide_and_no_section_is_of_a_check_that_is_gone():
    text = page()
    laws = section(text, "The laws, one by one")
    assert laws
    assert sorted(heading for _, level, heading in headings(laws) if level == 3) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_a_section_says_the_law_why_it_matters_the_usual_mistake_and_how_to_mend_it(check):
    text = section(page(), check)
    assert text
    assert text.splitlines()[0] == f"### {check}"
    assert [label for label in ("**Law.**", "**Why.**", "**Usual mistake.**", "**Mend.**") if label not in text] == []


def test_the_whole_guide_and_one_section(altx):
    assert altx("guide").stdout.startswith("# ")
    one = altx("guide", "padding")
    assert one.exit_code == 0
    assert one.stdout.startswith("### padding\n")
    assert "###" not in one.stdout[3:]


def test_a_section_that_is_not_there_lists_those_that_are(altx):
    result = altx("guide", "paddings")
    assert result.exit_code == 2
    assert "no section 'paddings'" in result.stderr
    assert "did you mean 'padding'?" in result.stderr


def test_headings_in_code_are_none_and_a_heading_takes_its_subsections():
    text = "# A\n\n```\n# not one\n```\n\n## B\nb\n### Packing\nc\n\n### packing\nd\n## C\n"
    assert [heading for _, _, heading in headings(text)] == ["A", "B", "Packing", "packing", "C"]
    assert section(text, "b") == "## B\nb\n### Packing\nc\n\n### packing\nd"
    assert section(text, "packing") == "### packing\nd"
