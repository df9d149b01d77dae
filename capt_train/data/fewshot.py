"""Choose the few images to tune on, and remember them so that they can be chosen again."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capt_deploy.core.console import track
from capt_deploy.core.errors import DataError, ImageError, RunError
from capt_deploy.core.files import is_inside, read_json, sha256_file, write_json
from capt_deploy.data.datasets import Dataset, Item, Skipped
from capt_deploy.data.images import load_image


@dataclass(frozen=True)
class FewShotSplit:
    """The images a run uses, with their content hashes. `test` is never part of it."""

    class_names: tuple[str, ...]  # all of the data set, in label order
    tuned: tuple[int, ...]  # indices of the classes that are tuned
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    sha256: dict[str, str]  # of each image above, by path
    skipped: tuple[Skipped, ...] = ()
    notices: tuple[str, ...] = ()  # what the person should know about the choice

    @property
    def tuned_flags(self) -> tuple[bool, ...]:
        """Whether each class is tuned."""
        own = set(self.tuned)
        return tuple(index in own for index in range(len(self.class_names)))

    def fingerprint(self) -> str:
        """Return a SHA-256 over class names, images, labels and contents."""
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
            split = cls._from_json(content)
            known = split.fingerprint() == content["fingerprint"]
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise RunError(f"{path}: not a split as capt-train writes it ({cause!r})") from cause
        if not known or not all(is_inside(name) for name in split.sha256):
            raise RunError(f"{path}: was changed after it was written; tune again")
        return split

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> "FewShotSplit":
        rows = [*content["train"], *content["val"]]
        return cls(
            class_names=tuple(content["class_names"]),
            tuned=tuple(content["tuned"]),
            train=tuple(Item(path, label) for path, label, _ in content["train"]),
            val=tuple(Item(path, label) for path, label, _ in content["val"]),
            sha256={path: digest for path, _, digest in rows},
            skipped=tuple(Skipped(path, reason) for path, reason in content["skipped"]),
            notices=tuple(content["notices"]),
        )

    def check(self, dataset: Dataset) -> None:
        """Make sure that the data set still holds these very images and classes.

        Raises:
            DataError: class names differ, or an image is gone or has changed.
        """
        if dataset.class_names != self.class_names:
            raise DataError(
                f"{dataset.root}: its {len(dataset.class_names)} class names are not the "
                f"{len(self.class_names)} that the run was made with"
            )
        changed = []
        for path, digest in self.sha256.items():
            try:
                same = sha256_file(dataset.root / path) == digest
            except OSError:
                same = False
            if not same:
                changed.append(path)
        if changed:
            raise DataError(
                f"{dataset.root}: {len(changed)} of the run's {len(self.sha256)} images changed or "
                f"are gone, e.g. {changed[0]}; restore them, or tune into a new run folder"
            )


def choose(dataset: Dataset, classes: str, shots: int, seed: int) -> FewShotSplit:
    """Choose `shots` readable training images of each tuned class by seed.

    A class with fewer gives all it has. Validation images are the data's own of the tuned
    classes; where there are none, training images that were not chosen, up to `shots` a class.

    Args:
        dataset: what to choose from.
        classes: `all`, or `base`: the first half (rounded up) in label order.
        shots: images a class.
        seed: decides which.

    Raises:
        DataError: fewer than two classes, or a tuned class without a readable training image.
    """
    count = len(dataset.class_names)
    tuned = tuple(range(count if classes == "all" else (count + 1) // 2))
    if len(tuned) < 2:
        raise DataError(
            f"{dataset.root}: expected at least two classes to tune on, came {len(tuned)} "
            f"({classes} of {count})"
        )
    candidates: dict[int, list[Item]] = {label: [] for label in tuned}
    for item in dataset.splits["train"]:
        if item.label in candidates:
            candidates[item.label].append(item)
    chosen: list[Item] = []
    spare: list[Item] = []
    skipped: list[Skipped] = []
    for label in track(tuned, "choosing shots", "classes"):
        items = candidates[label]
        random.Random(f"{seed}/{dataset.class_names[label]}").shuffle(items)
        own, rest = _readable(dataset, items, shots, skipped)
        chosen += own
        spare += rest[:shots]
    missing = _without(chosen, tuned)
    if missing:
        names = [dataset.class_names[label] for label in missing]
        raise DataError(f"{dataset.root}: no readable training image of {names}; add some")
    val = [item for item in dataset.splits["val"] if item.label in candidates] or spare
    val = _present(dataset, val, skipped)
    digests = {item.path: sha256_file(dataset.path(item)) for item in (*chosen, *val)}
    left_out = (*dataset.skipped, *skipped)
    notices = tuple(_notices(dataset, chosen, val, left_out, shots))
    return FewShotSplit(
        dataset.class_names, tuned, tuple(chosen), tuple(val), digests, left_out, notices
    )


def _readable(
    dataset: Dataset, items: Sequence[Item], count: int, skipped: list[Skipped]
) -> tuple[list[Item], list[Item]]:
    """Return the first `count` images that decode, and those after them."""
    good: list[Item] = []
    for position, item in enumerate(items):
        if len(good) == count:
            return good, list(items[position:])
        try:
            load_image(dataset.path(item))
            good.append(item)
        except ImageError as error:
            skipped.append(Skipped(item.path, str(error)))
    return good, []


def _present(dataset: Dataset, items: Sequence[Item], skipped: list[Skipped]) -> list[Item]:
    """Leave out files that a list names but that are gone; decoding would take too long here."""
    gone = {item for item in items if not dataset.path(item).is_file()}
    skipped += [Skipped(item.path, "no such file") for item in items if item in gone]
    return [item for item in items if item not in gone]


def _without(items: Sequence[Item], labels: Sequence[int]) -> list[int]:
    present = {item.label for item in items}
    return [label for label in labels if label not in present]


def _notices(
    dataset: Dataset,
    chosen: Sequence[Item],
    val: Sequence[Item],
    skipped: Sequence[Skipped],
    shots: int,
) -> list[str]:
    notices = []
    counts: dict[int, int] = {}
    for item in chosen:
        counts[item.label] = counts.get(item.label, 0) + 1
    fewer = {dataset.class_names[label]: n for label, n in counts.items() if n < shots}
    if fewer:
        listed = ", ".join(f"{name} ({n})" for name, n in list(fewer.items())[:10])
        more = ", …" if len(fewer) > 10 else ""
        notices.append(f"{len(fewer)} classes have fewer than {shots} images: {listed}{more}")
    if skipped:
        notices.append(
            f"{len(skipped)} files are no readable images and were left out, e.g. "
            f"{skipped[0].path}; the run's split.json lists them"
        )
    if val and not set(val) & set(dataset.splits["val"]):
        notices.append(
            "no validation images: training images that were not chosen stand in for them"
        )
    if not val:
        notices.append(
            "no validation images: all epochs are trained, and confidences are calibrated by "
            "tuning again without a part of the training images, each in turn"
        )
    return notices
