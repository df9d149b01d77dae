import pytest

from capt_deploy.core.text import printable, shortened


@pytest.mark.parametrize("longest", [28, 32])
def test_long_names_are_cut_in_their_middle(longest):
    assert shortened("a" * longest, longest) == "a" * longest
    cut = shortened("begin" + "x" * 50 + "end", longest)
    assert len(cut) == longest and cut.startswith("begin") and cut.endswith("end")


def test_names_stand_on_one_line():
    assert shortened(" a\nb ", 20) == "a b"


def test_what_is_printable_stays():
    assert printable("<b> & سمكة 😀") == "<b> & سمكة 😀"
