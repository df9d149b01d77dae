"""Sentences on what two confused classes share and what tells them apart (METHOD 3)."""

import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from capt_deploy.core.errors import DataError
from capt_deploy.core.files import read_json, write_json
from capt_deploy.data.class_names import plain_spelling
from capt_train.parts import SENTENCE_KINDS

SOURCES = ("pair file", "class file", "llm", "templates")  # the first that has sentences wins
_PAIR_FORM = '{"a|b": {"commonality": ["…"], "difference": ["…"]}} (--sentences)'
_CLASS_FORM = '{"class": ["sentence", "…"]} (--commonality, --difference)'
_MAX_MIB = 64
# By sound, not by letter: a unicorn, a ewe, an hour, an x-ray, an MD-80.
_TAKES_AN = re.compile(
    r"(?i:hour|heir|honest|honou?r|8|1[18](?!\d))"
    r"|(?i:(?!eu|ew|one|once|ufo|uk|uni(?!n)|ura|uri|us[abeu]|ut[ei]|u-)[aeiou])"
    r"|[FHLMNRSXfhlmnrsx][A-Z]?[-/\d]"
)


class PairSentences(NamedTuple):
    """The sentences about one pair, in the order of `SENTENCE_KINDS`."""

    commonality: tuple[str, ...] = ()
    difference: tuple[str, ...] = ()


NamePair: TypeAlias = tuple[str, str]  # class names in alphabetical order, as by `pair_key`
ClassSentences: TypeAlias = Mapping[str, tuple[str, ...]]
Sentences: TypeAlias = Mapping[NamePair, PairSentences]


class ClassCoverage(NamedTuple):
    """The sentences about one class; those about its partner alone do not count."""

    name: str
    pairs: int  # mined ones with this class
    commonality: int  # different sentences
    difference: int
    sources: tuple[str, ...]  # of these sentences


@dataclass(frozen=True)
class Gathered:
    """The sentences of the mined pairs, in their order, and where each came from."""

    sentences: Sentences
    sources: Mapping[NamePair, tuple[str, ...]]  # one of SOURCES for each of SENTENCE_KINDS
    pair_file: Sentences | None
    class_files: Mapping[str, ClassSentences | None]  # by kind

    @property
    def on_templates(self) -> tuple[NamePair, ...]:
        """Return the pairs to ask an LLM about: a kind of their sentences is from templates."""
        return tuple(pair for pair, sources in self.sources.items() if "templates" in sources)

    def of_kind(self, kind: str) -> list[str]:
        """Return the different sentences of one of `SENTENCE_KINDS`."""
        by_pair = (getattr(texts, kind) for texts in self.sentences.values())
        return list(dict.fromkeys(text for texts in by_pair for text in texts))

    def coverage(self, class_names: Sequence[str]) -> list[ClassCoverage]:
        """Count the sentences of each class that is in a mined pair."""
        rows = (self._coverage_of(name) for name in class_names)
        return [row for row in rows if row.pairs]

    def notices(self, class_names: Sequence[str]) -> list[str]:
        """Return notices, one a line: names that the files lack, do not know or leave empty.

        The last one lists the classes that only templates describe.
        """
        facts: dict[str, Iterable[str]] = {}
        if self.pair_file is not None:
            named = dict.fromkeys(name for pair in self.pair_file for name in pair)
            facts["--sentences: unknown"] = [name for name in named if name not in class_names]
            facts["--sentences: empty"] = [
                f"{'|'.join(pair)} ({kind})"
                for pair, texts in self.pair_file.items()
                for kind, sentences in zip(SENTENCE_KINDS, texts, strict=True)
                if not sentences and {*pair} <= {*class_names}
            ]
        for kind, file in self.class_files.items():
            if file is not None:
                facts[f"--{kind}: unknown"] = [name for name in file if name not in class_names]
                facts[f"--{kind}: missing"] = [name for name in class_names if name not in file]
                facts[f"--{kind}: empty"] = [name for name in class_names if file.get(name) == ()]
        covered = self.coverage(class_names)
        bare = [row.name for row in covered if {*row.sources} <= {"templates"}]
        facts["only templates describe"] = bare
        return [f"{fact}: {list_names([*names])}" for fact, names in facts.items() if names]

    def _coverage_of(self, name: str) -> ClassCoverage:
        pairs = [pair for pair in self.sentences if name in pair]
        counts, origins = [], set()
        for position, file in enumerate(self.class_files.values()):
            different: set[str] = set()
            for pair in pairs:
                texts, source = {*self.sentences[pair][position]}, self.sources[pair][position]
                if source == "class file":
                    texts &= {*(file or {}).get(name, ())}
                if texts:
                    origins.add(source)
                different |= texts
            counts.append(len(different))
        sources = tuple(source for source in SOURCES if source in origins)
        return ClassCoverage(name, len(pairs), counts[0], counts[1], sources)


def gather(
    pairs: Iterable[NamePair],
    *,
    pair_sentences: Sentences | None = None,
    commonality: ClassSentences | None = None,
    difference: ClassSentences | None = None,
    llm: Sentences | None = None,
) -> Gathered:
    """Take, for each mined pair and kind, the first source that has sentences.

    Sentences that equal the templates count as templates. Otherwise the templates in a file that an
    earlier run wrote would keep an LLM from being asked.

    Args:
        pairs: mined pairs, in any order within a pair; repeated ones count once.
        pair_sentences: as by `read_pair_file`; None without a file, here and below.
        commonality: as by `read_class_file`.
        difference: as by `read_class_file`.
        llm: answers, as by `capt_train.confusion.llm_answers.ask_all`.
    """
    class_files = {"commonality": commonality, "difference": difference}
    sentences, sources = {}, {}
    for pair in dict.fromkeys(pair_key(*pair) for pair in pairs):
        by_class = (
            _of_both(pair, file or {}, only_if_named=kind == "difference")
            for kind, file in class_files.items()
        )
        by_pair, answers = (
            (file or {}).get(pair, PairSentences()) for file in (pair_sentences, llm)
        )
        chosen = []
        for *offers, default in zip(by_pair, by_class, answers, templates(*pair), strict=True):
            usable = (
                pick for pick in zip(SOURCES, offers, strict=False) if pick[1] not in ((), default)
            )
            chosen.append(next(usable, ("templates", default)))
        sources[pair] = tuple(source for source, _ in chosen)
        sentences[pair] = PairSentences(*(texts for _, texts in chosen))
    return Gathered(sentences, sources, pair_sentences, class_files)


def templates(a: str, b: str) -> PairSentences:
    """Return sentences made from the names of two classes alone *(ours)*."""
    first, second = (
        f"an {name}" if _TAKES_AN.match(name) else f"a {name}" for name in pair_key(a, b)
    )
    return PairSentences(
        commonality=(
            f"A photo of what could be {first} or {second}.",
            f"Shape, colour and texture that {first} and {second} share.",
            f"What makes {first} and {second} look alike.",
        ),
        difference=(
            f"A photo of {first}, not {second}.",
            f"A photo of {second}, not {first}.",
            f"What tells {first} from {second} in a photo.",
        ),
    )


def pair_key(a: str, b: str) -> NamePair:
    """Return both names in the order in which pairs are stored."""
    return (a, b) if a < b else (b, a)


def clean(texts: Iterable[str]) -> tuple[str, ...]:
    """Collapse blanks, drop empty and repeated texts; what UTF-8 cannot hold becomes a `?`."""
    plain = (" ".join(text.encode("utf-8", "replace").decode().split()) for text in texts)
    return tuple(dict.fromkeys(text for text in plain if text))


def list_names(names: Sequence[str]) -> str:
    """Return the names in one line: the first ten, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def read_class_file(path: Path, class_names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read `{class: [sentence, …]}`, the form the CAPT authors publish.

    Args:
        path: the JSON file.
        class_names: of the data set; case, underscores, hyphens and runs of blanks don't matter.

    Returns:
        Sentences by class. A name that is no class keeps its spelling, and an empty list stays
        empty, so that `Gathered.notices` can report both.

    Raises:
        DataError: the file cannot be read or has another form.
    """
    lookup = _lookup(class_names)
    sentences: dict[str, tuple[str, ...]] = {}
    for key, texts in _read_object(path, _CLASS_FORM).items():
        name = _class_name(key, lookup)
        sentences[name] = clean([*sentences.get(name, ()), *_texts(texts, path, key, _CLASS_FORM)])
    return sentences


def read_pair_file(path: Path, class_names: Sequence[str]) -> dict[NamePair, PairSentences]:
    """Read `{"a|b": {"commonality": [sentence, …], "difference": […]}}`, in any order of a and b.

    Class names are matched as by `read_class_file`; other names and empty lists are kept.

    Raises:
        DataError: the file cannot be read or has another form.
    """
    lookup = _lookup(class_names)
    sentences: dict[NamePair, PairSentences] = {}
    for key, kinds in _read_object(path, _PAIR_FORM).items():
        if not isinstance(kinds, dict) or not {*kinds} <= {*SENTENCE_KINDS}:
            raise _wrong_form(path, key, kinds, _PAIR_FORM)
        # Names may hold a | themselves: the split that gives two classes, else the first one.
        splits = [(key[: bar.start()], key[bar.end() :]) for bar in re.finditer(r"\|", key)]
        names = [(_class_name(a, lookup), _class_name(b, lookup)) for a, b in splits]
        a, b = next((ab for ab in names if {*ab} <= {*class_names}), (names or [("", "")])[0])
        if not a or not b or a == b:
            raise DataError(f"{path}: expected two classes, as in {_PAIR_FORM}, came {key!r}")
        pair = pair_key(a, b)
        texts = [_texts(kinds.get(kind, []), path, key, _PAIR_FORM) for kind in SENTENCE_KINDS]
        known = sentences.get(pair, PairSentences())
        sentences[pair] = PairSentences(
            *(clean([*k, *t]) for k, t in zip(known, texts, strict=True))
        )
    return sentences


def write_pair_file(path: Path, sentences: Sentences) -> None:
    """Write sentences, atomically, in the form that `read_pair_file` reads."""
    write_json(path, {"|".join(pair): texts._asdict() for pair, texts in sentences.items()})


def _of_both(pair: NamePair, file: ClassSentences, only_if_named: bool) -> tuple[str, ...]:
    """Return the sentences of both classes, or only those that name the other class.

    A class whose sentences never name the other class gives all of them.
    """
    chosen: list[str] = []
    for name, other in (pair, pair[::-1]):
        texts = file.get(name, ())
        word = re.compile(rf"(?<!\w){re.escape(_plain(other))}(?!\w)")
        naming = [text for text in texts if only_if_named and word.search(_plain(text))]
        chosen += naming or texts
    return tuple(dict.fromkeys(chosen))


def _plain(text: str) -> str:
    return plain_spelling(text.replace("-", " "))


def _lookup(class_names: Sequence[str]) -> dict[str, str]:
    """Return class names by themselves and, unless two share it (`t-shirt`, `t_shirt`), plainly."""
    times = Counter(map(_plain, class_names))
    plain = {_plain(name): name for name in class_names if times[_plain(name)] == 1}
    return plain | {name: name for name in class_names}


def _class_name(text: str, lookup: Mapping[str, str]) -> str:
    """Return the class whose name a text is in some spelling, else the text itself."""
    return lookup.get(text) or lookup.get(_plain(text)) or " ".join(clean([text]))


def _read_object(path: Path, form: str) -> dict[str, Any]:
    try:
        if path.is_file() and path.stat().st_size > _MAX_MIB * 2**20:
            raise DataError(f"{path}: expected at most {_MAX_MIB} MiB, came more")
        content = read_json(path, DataError)
    except DataError as error:
        raise DataError(f"{error}; expected {form}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected {form}, came {reprlib.repr(content)}")
    return content


def _texts(value: Any, path: Path, key: str, form: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _wrong_form(path, key, value, form)
    return value


def _wrong_form(path: Path, key: str, value: Any, form: str) -> DataError:
    kind, other_form = (list, _CLASS_FORM) if form == _PAIR_FORM else (dict, _PAIR_FORM)
    fix = f"is the file of the form {other_form}?" if isinstance(value, kind) else "correct it"
    return DataError(f"{path}: expected {form}, came {key!r} with {reprlib.repr(value)}; {fix}")
