"""The few images that a run is tuned on: chosen by seed, and kept in its `split.json`."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from capt_deploy.core.console import counted, track
from capt_deploy.core.errors import DataError, ImageError, RunError
from capt_deploy.core.files import is_file, is_inside, read_json, sha256_file, write_json
from capt_deploy.data.datasets import Dataset, Item, Skipped
from capt_deploy.data.images import load_image


@dataclass(frozen=True)
class FewShotSplit:
    """The images a run uses, with their content hashes. `test` is never part of it."""

    class_names: tuple[str, ...]  # all of the data set, in label order
    tuned: tuple[int, ...]  # labels of the classes that are tuned
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    sha256: dict[str, str]  # of each image above, by path
    skipped: tuple[Skipped, ...] = ()
    notices: tuple[str, ...] = ()  # about the choice, for people

    @property
    def tuned_flags(self) -> tuple[bool, ...]:
        """Return for each class whether it is tuned."""
        tuned = set(self.tuned)
        return tuple(label in tuned for label in range(len(self.class_names)))

    def fingerprint(self) -> str:
        """Return a SHA-256 of class names, labels and contents, a run's `data_fingerprint`."""
        content = [
            self.class_names,
            self.tuned,
            [(item.path, item.label, self.sha256[item.path]) for item in self.train + self.val],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the split as JSON."""
        rows = {
            name: [[item.path, item.label, self.sha256[item.path]] for item in items]
            for name, items in (("train", self.train), ("val", self.val))
        }
        write_json(
            path,
            {
                "fingerprint": self.fingerprint(),
                "class_names": self.class_names,
                "tuned": self.tuned,
                "skipped": [[file.path, file.reason] for file in self.skipped],
                "notices": self.notices,
                **rows,
            },
        )

    @classmethod
    def load(cls, path: Path) -> "FewShotSplit":
        """Read a saved split.

        Raises:
            RunError: it is missing, of another form, or was changed by hand.
        """
        content = read_json(path, RunError)
        try:
            rows = [*content["train"], *content["val"]]
            split = cls(
                class_names=tuple(content["class_names"]),
                tuned=tuple(content["tuned"]),
                train=tuple(Item(name, label) for name, label, _ in content["train"]),
                val=tuple(Item(name, label) for name, label, _ in content["val"]),
                sha256={name: digest for name, _, digest in rows},
                skipped=tuple(Skipped(name, reason) for name, reason in content["skipped"]),
                notices=tuple(content["notices"]),
            )
            unchanged = split.fingerprint() == content["fingerprint"]
            unchanged &= all(map(is_inside, split.sha256))
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise RunError(f"{path}: not a split as capt-train writes it ({cause!r})") from cause
        if not unchanged:
            raise RunError(f"{path}: was changed after it was written; tune again")
        return split

    def check(self, dataset: Dataset) -> None:
        """Check that the data set still holds the same images and classes.

        Raises:
            DataError: class names differ, or an image is gone or has changed.
        """
        if dataset.class_names != self.class_names:
            raise DataError(
                f"{dataset.root}: its {len(dataset.class_names)} class names are not the "
                f"{len(self.class_names)} that the run was made with"
            )
        changed = [
            name for name, digest in self.sha256.items() if _sha256(dataset.root / name) != digest
        ]
        if changed:
            raise DataError(
                f"{dataset.root}: {len(changed)} of the run's {len(self.sha256)} images changed or "
                f"are gone, e.g. {changed[0]}; restore them, or tune into a new run folder"
            )


def choose(dataset: Dataset, classes: str, shots: int | None, seed: int) -> FewShotSplit:
    """Choose `shots` readable training images of each tuned class by seed.

    A class with fewer gives all it has. Validation images are those of the data set in the tuned
    classes.

    Args:
        dataset: all images.
        classes: `all`, or `base`: the first half (rounded up) in label order.
        shots: images a class; None for all.
        seed: decides which images.

    Raises:
        DataError: fewer than two classes, or a tuned class without a readable training image.
    """
    tuned = dataset.classes(classes)
    if len(tuned) < 2:
        raise DataError(
            f"{dataset.root}: expected at least two classes to tune on, came {len(tuned)} "
            f"({classes} of {len(dataset.class_names)})"
        )
    chosen: list[Item] = []
    skipped: list[Skipped] = []
    candidates: dict[int, list[Item]] = {label: [] for label in tuned}
    for item in dataset.splits["train"]:
        if item.label in candidates:
            candidates[item.label].append(item)
    for label, items in track(list(candidates.items()), "choosing shots", "classes"):
        random.Random(f"{seed}/{dataset.class_names[label]}").shuffle(items)
        chosen += _first_readable(dataset, items, shots or len(items), skipped)
    counts = Counter(item.label for item in chosen)
    if missing := [dataset.class_names[label] for label in tuned if not counts[label]]:
        why = f" ({skipped[0].path}: {skipped[0].reason})" if skipped else ""
        raise DataError(f"{dataset.root}: no readable training image of {missing}{why}; add some")
    unused = sum(map(len, candidates.values())) - len(chosen) - len(skipped)
    val: list[Item] = []
    # Decoding all of these would take too long here; unreadable ones are left out later.
    for item in (item for item in dataset.splits["val"] if item.label in candidates):
        if is_file(dataset.path(item)):
            val.append(item)
        else:
            skipped.append(Skipped(item.path, "no such file"))
    left_out = (*dataset.skipped, *skipped)
    fewer = {dataset.class_names[label]: n for label, n in counts.items() if n < (shots or 0)}
    return FewShotSplit(
        dataset.class_names,
        tuned,
        tuple(chosen),
        tuple(val),
        {item.path: sha256_file(dataset.path(item)) for item in (*chosen, *val)},
        left_out,
        tuple(_notices(fewer, shots or 0, left_out, unused)),
    )


def _sha256(path: Path) -> str | None:
    """Return the SHA-256 of a file; None where it cannot be read."""
    try:
        return sha256_file(path)
    except OSError:
        return None


def _first_readable(
    dataset: Dataset, items: Sequence[Item], count: int, skipped: list[Skipped]
) -> list[Item]:
    """Return the first `count` images that decode."""
    readable: list[Item] = []
    for item in items:
        if len(readable) == count:
            break
        try:
            load_image(dataset.path(item))
            readable.append(item)
        except ImageError as error:
            skipped.append(Skipped(item.path, str(error)))
    return readable


def _notices(
    fewer: Mapping[str, int],
    shots: int,
    skipped: Sequence[Skipped],
    unused: int,
) -> Iterator[str]:
    if fewer:
        listed = ", ".join(f"{name} ({n})" for name, n in list(fewer.items())[:10])
        more = ", …" if len(fewer) > 10 else ""
        classes = counted(len(fewer), "class has", "classes have")
        yield f"{classes} fewer than {counted(shots, 'image')}: {listed}{more}"
    if skipped:
        yield (
            f"left out {counted(len(skipped), 'file or folder', 'files or folders')}, e.g. "
            f"{skipped[0].path}: {skipped[0].reason}; the run's split.json lists all"
        )
    if unused > 0:
        yield (
            f"{counted(unused, 'training photo')} unused: --shots {shots} takes at most {shots} of "
            "each class; leave it out to use all"
        )
