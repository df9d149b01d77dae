from __future__ import annotations

import subprocess
import sys

import pytest

from capt_train.confusion.sentences import PairSentences, gather, list_names, pair_key, templates

OTTER = ("an otter has webbed feet",)


def test_it_needs_no_torch() -> None:
    code = "import sys, capt_train.confusion.llm_answers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ARTICLES = {
    "an": ["otter", "umbrella", "hour glass", "x-ray", "MD-80", "A300", "8-ball", "Urban fox"],
    "a": ["dog", "unicorn", "European robin", "honeycomb", "one-piece", "UFO", "hi-fi", "U-2"],
}


@pytest.mark.parametrize(("article", "names"), ARTICLES.items())
def test_templates_are_grammatical(article: str, names: list[str]) -> None:
    for name in names:
        made = templates(name, "zebra")
        for text in made.commonality + made.difference:
            assert f" {article} {name}" in text
            assert " a zebra" in text
            assert text[0].isupper() and text.endswith(".")


def test_templates_do_not_depend_on_the_order_and_differ_by_kind() -> None:
    made = templates("otter", "beaver")
    assert made == templates("beaver", "otter")
    assert len({*made.commonality, *made.difference}) == 6


def test_the_first_source_with_sentences_wins_for_each_kind_alone() -> None:
    pair = ("maine coon", "otter")
    files = {pair: PairSentences((), ("of the pair file",))}
    common, answers = {"otter": OTTER}, {pair: PairSentences(("llm c",), ("llm d",))}
    standard = templates(*pair)
    steps = [
        ({}, standard, ("templates", "templates")),
        ({"llm": answers}, answers[pair], ("llm", "llm")),
        (
            {"llm": answers, "commonality": common},
            PairSentences(OTTER, ("llm d",)),
            ("class file", "llm"),
        ),
        (
            {"commonality": common, "difference": common, "pair_sentences": files},
            PairSentences(OTTER, ("of the pair file",)),
            ("class file", "pair file"),
        ),
        ({"pair_sentences": {pair: PairSentences(("x",), ())}, "difference": {"otter": ()}},
         PairSentences(("x",), standard.difference), ("pair file", "templates")),
    ]  # fmt: skip
    for given, expected, sources in steps:
        gathered = gather([pair], **given)
        assert gathered.sentences == {pair: expected}
        assert tuple(gathered.sources[pair].values()) == sources
        assert gathered.on_templates == ((pair,) if "templates" in sources else ())


def test_pairs_keep_their_order_and_count_once() -> None:
    gathered = gather([("b", "a"), ("z", "y"), ("a", "b"), ("a", "z")])
    assert list(gathered.sentences) == [("a", "b"), ("y", "z"), ("a", "z")]
    assert pair_key("b", "a") == pair_key("a", "b") == ("a", "b")


def test_difference_prefers_the_sentences_that_name_the_other_class() -> None:
    difference = {
        "otter": ("unlike a Maine_Coon, an otter swims", "an otter dives", "no maine coons here"),
        "maine coon": ("a maine coon purrs", "a cat"),
    }
    gathered = gather([("maine coon", "otter")], commonality=difference, difference=difference)
    texts = gathered.sentences[("maine coon", "otter")]
    assert texts.difference == (*difference["maine coon"], difference["otter"][0])
    assert texts.commonality == (*difference["maine coon"], *difference["otter"])


def test_a_class_whose_only_sentences_are_its_partners_has_none_of_its_own() -> None:
    gathered = gather(
        [("cat", "dog"), ("dog", "emu")], commonality={"cat": ("c1", "c2"), "dodo": ("x",)},
        difference={"cat": ("c3",), "dog": ()},
    )  # fmt: skip
    coverage = gathered.coverage(("cat", "dog", "emu", "fox"))
    cat, dog, emu, fox = coverage.rows
    assert (cat.pairs, cat.commonality, cat.difference, cat.sources) == (1, 2, 1, ("class file",))
    assert (dog.pairs, dog.commonality, dog.difference, dog.sources) == (2, 3, 3, ("templates",))
    assert (emu.pairs, emu.commonality, emu.difference) == (1, 3, 3)
    assert (fox.pairs, fox.commonality, fox.difference, fox.sources) == (0, 0, 0, ())
    assert coverage.without == ("dog", "emu")
    assert coverage.files == {
        "--commonality": {"unknown": ("dodo",), "missing": ("dog", "emu", "fox"), "empty": ()},
        "--difference": {"unknown": (), "missing": ("emu", "fox"), "empty": ("dog",)},
    }
    assert coverage.notices() == [
        "--commonality: unknown: dodo",
        "--commonality: missing: dog, emu, fox",
        "--difference: missing: emu, fox",
        "--difference: empty: dog",
        "only templates describe: dog, emu",
    ]


def test_a_pair_file_is_compared_with_the_classes_too() -> None:
    file = {
        ("cat", "dog"): PairSentences((), ("x",)),
        ("cat", "dodo"): PairSentences((), ()),
    }
    coverage = gather([("cat", "dog")], pair_sentences=file).coverage(("cat", "dog"))
    assert coverage.files["--sentences"] == {
        "unknown": ("dodo",),
        "empty": ("cat|dog (commonality)",),
    }
    assert coverage.rows[0].sources == ("pair file", "templates")
    assert coverage.without == ()


def test_many_names_are_counted() -> None:
    assert list_names([str(n) for n in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert list_names([str(n) for n in range(12)]).endswith("8, 9 and 2 more")
