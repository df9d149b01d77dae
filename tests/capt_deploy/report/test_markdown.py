"""The Markdown shows names as they are."""

import pytest

from capt_deploy.report.contents import find_contents
from capt_deploy.report.data import checked
from capt_deploy.report.markdown import markdown, plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", r"a\|b"),
        ("<script>&", "&lt;script&gt;&amp;"),
        ("aquarium_fish *x* `y` [z](u)", r"aquarium\_fish \*x\* \`y\` \[z\](u)"),
        ("back\\slash", "back\\\\slash"),
        (" a  b\n", "a b"),
        ("水族館 0.5", "水族館 0.5"),
    ],
)
def test_what_markdown_would_read_otherwise_is_escaped(text, expected):
    assert plain(text) == expected


def test_all_rows_of_a_table_have_as_many_cells(make_data):
    data = checked(make_data(names=("a|b", "c", "d", "e"), tuned=(True, True, False, False)))
    found = markdown(data, find_contents(data))
    tables = [part.splitlines() for part in found.split("\n\n") if part.startswith("| ")]
    assert len(tables) == 4
    for lines in tables:
        cells = {line.replace(r"\|", "").count("|") for line in lines}
        assert len(cells) == 1
    assert "| versions / numpy | 2 |" in found and "| classes | \\[1, 2\\] |" in found
