"""Nothing that is not markup gets into the page as markup."""

from hypothesis import given as drawn
from hypothesis import strategies as st

from capt_deploy.report.markup import Markup, element, given, table


def test_content_and_attributes_are_escaped():
    found = element("p", "<b>&", element("i", "'\""), title='"><script>')
    assert found == ('<p title="&quot;&gt;&lt;script&gt;">&lt;b&gt;&amp;<i>&#x27;&quot;</i></p>')


def test_attributes_have_their_own_names_and_may_be_left_out():
    found = element("img", class_="a", aria_label="b", width=None, name="c", alt="")
    assert found == '<img class="a" aria-label="b" name="c" alt="">'


@drawn(st.text())
def test_no_text_opens_an_element(text):
    for found in (element("p", text), given(text), table(text, [text], [[text]], set())):
        inside = found
        for name in ("p", "bdi", "table", "caption", "thead", "tbody", "tr", "th", "div"):
            inside = Markup(inside.replace(f"</{name}>", ""))
            inside = Markup(inside.replace(f"<{name}>", ""))
        assert "<script" not in inside and "</" not in inside
    assert '"' not in element("p", title=text)[10:-6]


def test_a_table_has_a_caption_and_names_its_rows_and_columns():
    found = table("All", ["what", "count"], [["a", "1"], ["b", "2"]], {"count"})
    assert "<caption>All</caption>" in found
    assert found.count('scope="col"') == 2 and found.count('scope="row"') == 2
    assert found.count('class="number"') == 3
