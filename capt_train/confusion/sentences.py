"""Sentences on what two confused classes share and what tells them apart (METHOD 3)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from capt_train.parts import SENTENCE_KINDS

SOURCES = ("pair file", "class file", "llm", "templates")  # the first that has sentences wins
# By sound, not by letter: a unicorn, a ewe, an hour, an x-ray, an MD-80.
_TAKES_AN = re.compile(
    r"(?i:hour|heir|honest|honou?r|8|1[18](?!\d))"
    r"|(?i:(?!eu|ew|one|once|ufo|uk|uni(?!n)|ura|uri|us[abeu]|ut[ei]|u-)[aeiou])"
    r"|[FHLMNRSXfhlmnrsx][A-Z]?[-/\d]"
)

Pair: TypeAlias = tuple[str, str]  # class names in alphabetical order, as `pair_key` makes it
ClassSentences: TypeAlias = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class PairSentences:
    """What is said of one pair."""

    commonality: tuple[str, ...] = ()
    difference: tuple[str, ...] = ()

    def of(self, kind: str) -> tuple[str, ...]:
        """Return the sentences of one of `SENTENCE_KINDS`."""
        return self.commonality if kind == "commonality" else self.difference


Sentences: TypeAlias = Mapping[Pair, PairSentences]


def pair_key(a: str, b: str) -> Pair:
    """Return both names in the order in which pairs are stored."""
    return (a, b) if a < b else (b, a)


def clean(texts: Iterable[str]) -> tuple[str, ...]:
    """Collapse blanks, drop empty and repeated texts; what UTF-8 cannot hold becomes a `?`."""
    plain = (" ".join(text.encode("utf-8", "replace").decode().split()) for text in texts)
    return tuple(dict.fromkeys(text for text in plain if text))


def plain_name(text: str) -> str:
    """Return a name as it is compared: case, underscores, hyphens and runs of blanks dropped."""
    return " ".join(re.sub("[_-]", " ", text.casefold()).split())


def templates(a: str, b: str) -> PairSentences:
    """Return sentences made from the names alone, for where nobody wrote any *(ours)*."""
    one, other = (f"an {name}" if _TAKES_AN.match(name) else f"a {name}" for name in pair_key(a, b))
    return PairSentences(
        commonality=(
            f"A photo of what could be {one} or {other}.",
            f"Shape, colour and texture that {one} and {other} share.",
            f"What makes {one} and {other} look alike.",
        ),
        difference=(
            f"A photo of {one}, not {other}.",
            f"A photo of {other}, not {one}.",
            f"What tells {one} from {other} in a photo.",
        ),
    )


@dataclass(frozen=True)
class ClassCoverage:
    """What was found for one class; sentences that only speak of its partner don't count."""

    name: str
    pairs: int  # mined ones with this class
    commonality: int  # different sentences
    difference: int
    sources: tuple[str, ...]  # of these sentences


@dataclass(frozen=True)
class Coverage:
    """Who has sentences, and from where."""

    rows: tuple[ClassCoverage, ...]
    without: tuple[str, ...]  # classes of mined pairs that nothing but templates describes
    # By option: names that are "unknown" to the data set, "missing" in the file, "empty" there.
    files: Mapping[str, Mapping[str, tuple[str, ...]]]

    def notices(self) -> list[str]:
        """Return what a person should know, one line each."""
        facts = [
            (f"{option}: {fact}", names)
            for option, file in self.files.items()
            for fact, names in file.items()
        ]
        facts.append(("only templates describe", self.without))
        return [f"{fact}: {list_names(names)}" for fact, names in facts if names]


@dataclass(frozen=True)
class Gathered:
    """The sentences of the mined pairs, in their order, and where each came from."""

    sentences: Sentences
    sources: Mapping[Pair, Mapping[str, str]]  # by pair, then by kind: one of SOURCES
    pair_file: Sentences | None
    class_files: Mapping[str, ClassSentences | None]  # by kind

    @property
    def on_templates(self) -> tuple[Pair, ...]:
        """The pairs with a kind that only templates speak of: those to ask an LLM about."""
        return tuple(pair for pair, kinds in self.sources.items() if "templates" in kinds.values())

    def coverage(self, class_names: Sequence[str]) -> Coverage:
        """Compare what was found with the classes of the data set."""
        rows = tuple(self._row(name) for name in class_names)
        without = (row.name for row in rows if row.pairs and set(row.sources) <= {"templates"})
        files = {}
        if self.pair_file is not None:
            files["--sentences"] = _fit_of_pairs(self.pair_file, class_names)
        for kind, file in self.class_files.items():
            if file is not None:
                files[f"--{kind}"] = {
                    "unknown": tuple(name for name in file if name not in class_names),
                    "missing": tuple(name for name in class_names if name not in file),
                    "empty": tuple(name for name in class_names if file.get(name) == ()),
                }
        return Coverage(rows, tuple(without), files)

    def _row(self, name: str) -> ClassCoverage:
        pairs = [pair for pair in self.sentences if name in pair]
        found: dict[str, set[str]] = {kind: set() for kind in SENTENCE_KINDS}
        sources = set()
        for pair in pairs:
            for kind in SENTENCE_KINDS:
                texts, source = set(self.sentences[pair].of(kind)), self.sources[pair][kind]
                if source == "class file":
                    texts &= set((self.class_files[kind] or {}).get(name, ()))
                if texts:
                    found[kind] |= texts
                    sources.add(source)
        common, different = (len(found[kind]) for kind in SENTENCE_KINDS)
        in_order = tuple(source for source in SOURCES if source in sources)
        return ClassCoverage(name, len(pairs), common, different, in_order)


def gather(
    pairs: Iterable[Pair],
    *,
    pair_sentences: Sentences | None = None,
    commonality: ClassSentences | None = None,
    difference: ClassSentences | None = None,
    llm: Sentences | None = None,
) -> Gathered:
    """Take, for each mined pair and kind, the first source that has sentences.

    Sentences that equal the templates count as templates: those an earlier run wrote would else
    pass for somebody's own and keep an LLM from being asked.

    Args:
        pairs: mined pairs, in any order within a pair; repeated ones count once.
        pair_sentences: of `sentence_files.read_pair_file`; None where there is no file, as below.
        commonality: of `sentence_files.read_class_file`.
        difference: of `read_class_file`.
        llm: answers, of `capt_train.confusion.llm_answers.ask_all`.
    """
    class_files = {"commonality": commonality, "difference": difference}
    sentences, sources = {}, {}
    for pair in dict.fromkeys(pair_key(*pair) for pair in pairs):
        fallback = templates(*pair)
        written, answered = ((of or {}).get(pair, PairSentences()) for of in (pair_sentences, llm))
        chosen = {}
        for kind in SENTENCE_KINDS:
            by_class = _of_both(pair, class_files[kind] or {}, only_if_named=kind == "difference")
            offers = zip(SOURCES, (written.of(kind), by_class, answered.of(kind)), strict=False)
            own = (offer for offer in offers if offer[1] not in ((), fallback.of(kind)))
            chosen[kind] = next(own, ("templates", fallback.of(kind)))
        sources[pair] = {kind: source for kind, (source, _) in chosen.items()}
        sentences[pair] = PairSentences(*(texts for _, texts in chosen.values()))
    return Gathered(sentences, sources, pair_sentences, class_files)


def list_names(names: Sequence[str]) -> str:
    """Return the names in one line: the first ten, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _of_both(pair: Pair, file: ClassSentences, only_if_named: bool) -> tuple[str, ...]:
    """Return the sentences of both classes; where asked for, those that name the other class.

    A class whose sentences never name the other gives all of them: its marks still help.
    """
    chosen: list[str] = []
    for name, other in (pair, pair[::-1]):
        texts = file.get(name, ())
        word = re.compile(rf"(?<!\w){re.escape(plain_name(other))}(?!\w)")
        naming = [text for text in texts if only_if_named and word.search(plain_name(text))]
        chosen += naming or texts
    return tuple(dict.fromkeys(chosen))


def _fit_of_pairs(file: Sentences, class_names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    unknown = tuple(dict.fromkeys(n for pair in file for n in pair if n not in class_names))
    gaps = [
        (pair, kind)
        for pair, texts in file.items()
        for kind in SENTENCE_KINDS
        if not texts.of(kind)
    ]
    empty = (f"{'|'.join(pair)} ({kind})" for pair, kind in gaps if not {*pair} & {*unknown})
    return {"unknown": unknown, "empty": tuple(empty)}
