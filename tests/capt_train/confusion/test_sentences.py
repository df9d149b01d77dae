from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capt_deploy.core.errors import DataError
from capt_train.confusion.sentences import (
    PairSentences,
    clean,
    gather,
    list_names,
    pair_key,
    read_class_file,
    read_pair_file,
    templates,
    write_pair_file,
)

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
        assert gathered.sources[pair] == sources
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
    names = ("cat", "dog", "emu", "fox")
    cat, dog, emu = gathered.coverage(names)  # no pair has the fox
    assert (cat.pairs, cat.commonality, cat.difference, cat.sources) == (1, 2, 1, ("class file",))
    assert (dog.pairs, dog.commonality, dog.difference, dog.sources) == (2, 3, 3, ("templates",))
    assert (emu.pairs, emu.commonality, emu.difference) == (1, 3, 3)
    assert gathered.notices(names) == [
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
    gathered = gather([("cat", "dog")], pair_sentences=file)
    assert gathered.notices(("cat", "dog")) == [
        "--sentences: unknown: dodo",
        "--sentences: empty: cat|dog (commonality)",
    ]
    assert gathered.coverage(("cat", "dog"))[0].sources == ("pair file", "templates")


def test_many_names_are_counted() -> None:
    assert list_names([str(n) for n in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert list_names([str(n) for n in range(12)]).endswith("8, 9 and 2 more")


CLASSES = ("maine coon", "otter", "t-shirt")


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sentences.json"


@pytest.mark.parametrize("spelling", ["Maine_Coon", "MAINE-COON", " maine \t coon", "maine coon"])
def test_classes_are_found_however_they_are_spelt(spelling: str, file: Path) -> None:
    assert read_class_file(write(file, {spelling: ["a"]}), CLASSES) == {"maine coon": ("a",)}
    pairs = read_pair_file(write(file, {f"otter|{spelling}": {"difference": ["a"]}}), CLASSES)
    assert pairs == {("maine coon", "otter"): PairSentences((), ("a",))}


def test_classes_that_only_a_hyphen_tells_apart_go_by_their_exact_names(file: Path) -> None:
    content = {"t-shirt": ["a"], "t_shirt": ["b"], "T SHIRT": ["c"]}
    found = read_class_file(write(file, content), ("t-shirt", "t_shirt"))
    assert found == {"t-shirt": ("a",), "t_shirt": ("b",), "T SHIRT": ("c",)}


def test_sentences_are_stripped_and_empty_and_repeated_ones_dropped(file: Path) -> None:
    content = {"otter": [" a  b\n", "a b", "", " ", "c"], "Otter": ["c", "d"]}
    assert read_class_file(write(file, content), CLASSES) == {"otter": ("a b", "c", "d")}
    both = {
        "otter|t-shirt": {"commonality": ["x", " x"], "difference": []},
        "t-shirt|otter": {"commonality": ["y"], "difference": ["z"]},
    }
    found = read_pair_file(write(file, both), CLASSES)
    assert found == {("otter", "t-shirt"): PairSentences(("x", "y"), ("z",))}


def test_text_that_no_file_can_hold_can_still_be_written_again(file: Path) -> None:
    found = read_class_file(write(file, '{"otter": ["a \\ud800 b"], "\\udfff": []}'), CLASSES)
    assert found == {"otter": ("a ? b",), "?": ()}
    assert clean(["\ud800"]) == ("?",)


def test_names_may_hold_a_bar(file: Path) -> None:
    names = ("a|b", "c", "d")
    content = {"a|b|c": {"commonality": ["x"]}, "d|a|b": {"commonality": ["y"]}}
    found = read_pair_file(write(file, content), names)
    assert set(found) == {("a|b", "c"), ("a|b", "d")}


WRONG = [
    ("", "readable JSON"),
    ("{", "readable JSON"),
    ("[]", r"came \[\]"),
    ("3", "came 3"),
    ("null", "came None"),
    ("[" * 100_000, "more than 100 deep"),
    (f'{{"a": {"9" * 5000}}}', "number 9+… of 5000 characters"),
]


@pytest.mark.parametrize(("content", "came"), WRONG)
def test_a_file_that_is_no_object_is_refused(content: str, came: str, file: Path) -> None:
    write(file, content)
    for read, form in ((read_class_file, r'\{"class"'), (read_pair_file, r'\{"a\|b"')):
        with pytest.raises(DataError, match=f"{came}.*{form}|{form}.*{came}") as caught:
            read(file, CLASSES)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "came"),
    [
        (3, "3"),
        (None, "None"),
        ("a sentence", "'a sentence'"),
        (["a", 3], r"\['a', 3\]"),
        ([["a"]], r"\[\['a'\]\]"),
        ([True], r"\[True\]"),
    ],
)
def test_entries_that_are_no_lists_of_sentences_are_refused(
    texts: Any, came: str, file: Path
) -> None:
    with pytest.raises(DataError, match=f"'otter' with {came}; correct it"):
        read_class_file(write(file, {"otter": texts}), CLASSES)
    with pytest.raises(DataError, match=f"'otter.t-shirt' with {came}"):
        read_pair_file(write(file, {"otter|t-shirt": {"difference": texts}}), CLASSES)


def test_the_other_form_is_recognised(file: Path) -> None:
    pairs = {"otter|t-shirt": {"commonality": ["a"], "difference": ["b"]}}
    with pytest.raises(DataError, match=r"is the file of the form .*--sentences"):
        read_class_file(write(file, pairs), CLASSES)
    with pytest.raises(DataError, match=r"is the file of the form .*--commonality, --difference"):
        read_pair_file(write(file, {"otter": ["a"]}), CLASSES)


@pytest.mark.parametrize("name", ["otter", "otter|", "|", "", "otter|Otter", "dodo|dodo"])
def test_a_pair_needs_two_classes(name: str, file: Path) -> None:
    with pytest.raises(DataError, match="expected two classes"):
        read_pair_file(write(file, {name: {"commonality": ["a"]}}), CLASSES)


def test_other_keys_of_a_pair_are_refused(file: Path) -> None:
    with pytest.raises(DataError, match=r"with \{'commonalities': \['a'\]\}"):
        read_pair_file(write(file, {"otter|t-shirt": {"commonalities": ["a"]}}), CLASSES)


def test_files_that_are_missing_or_huge_are_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for read in (read_class_file, read_pair_file):
        with pytest.raises(DataError, match="No such file"):
            read(file, CLASSES)
        with pytest.raises(DataError, match="expected a regular file"):
            read(file.parent, CLASSES)
    monkeypatch.setattr("capt_train.confusion.sentences._MAX_MIB", 0)
    with pytest.raises(DataError, match="at most 0 MiB"):
        read_class_file(write(file, {}), CLASSES)


def test_what_is_written_can_be_given_again_and_templates_stay_templates(file: Path) -> None:
    pairs = [("otter", "maine coon"), ("otter", "t-shirt")]
    first = gather(pairs, commonality={"otter": OTTER})
    write_pair_file(file, first.sentences)
    assert json.loads(file.read_text()) == {
        "|".join(pair): {"commonality": [*texts.commonality], "difference": [*texts.difference]}
        for pair, texts in first.sentences.items()
    }
    again = gather(pairs, pair_sentences=read_pair_file(file, CLASSES))
    assert again.sentences == first.sentences
    assert again.sources[pairs[1]] == ("pair file", "templates")
    answers = {pairs[1]: PairSentences(("c",), ("d",))}
    with_llm = gather(pairs, pair_sentences=again.sentences, llm=answers)
    assert with_llm.sentences[pairs[1]] == PairSentences(OTTER, ("d",))


def test_the_published_files_of_the_pets_are_read_and_their_gaps_named(shared: Path) -> None:
    folder = shared / "data" / "descriptions"
    common, distinct = folder / "oxford_pets_common.json", folder / "oxford_pets_distinct.json"
    published = json.loads(common.read_text())
    names = tuple(sorted(name.title() for name in published))
    assert len(names) == 37
    commonality, difference = (read_class_file(path, names) for path in (common, distinct))
    assert {len(commonality["Newfoundland"]), len(commonality["Pug"])} == {9, 10}
    pairs = [("Beagle", "Basset Hound"), ("Siamese", "Keeshond"), ("Pug", "Keeshond")]
    gathered = gather(pairs, commonality=commonality, difference=difference)
    assert gathered.sentences[("Basset Hound", "Beagle")].difference == (
        "The biggest difference between basset hound and beagle lies in droopy ears and very "
        "short legs.",
        "The biggest difference between beagle and basset hound lies in tri-color coat and long "
        "ears.",
    )
    assert gathered.on_templates == (("Keeshond", "Siamese"),)
    assert len(gathered.sentences[("Keeshond", "Pug")].difference) == 10
    assert gathered.notices(names) == ["--difference: missing: Keeshond, Siamese"]
    with pytest.raises(DataError, match="--commonality, --difference"):
        read_pair_file(common, names)
