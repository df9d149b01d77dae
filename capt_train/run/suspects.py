"""Find the photos of a run to look at again, and write `suspects.json`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from capt_deploy.core.console import counted, say
from capt_deploy.data.datasets import Item
from capt_deploy.metrics.probabilities import Floats
from capt_train.calibrate.label_noise import fit_label_noise
from capt_train.data.copies import find_copies
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import embed
from capt_train.data.suspects import SUSPECTS, SuspectLabel, Suspects, rank_labels
from capt_train.method.losses import right_probabilities
from capt_train.run.fitting import HeldOut, Outcome
from capt_train.run.folder import TunedModel
from capt_train.run.setup import Setup


def write_suspects(
    setup: Setup,
    model: TunedModel,
    outcome: Outcome,
    held_out: HeldOut,
    cache: EmbeddingCache,
    out: Path,
) -> None:
    """Rank the labels of all photos that a model has not seen, and find copies among all photos.

    Training and validation photos are compared with each other and with test photos, test photos
    not among themselves.
    """
    labels: list[SuspectLabel] = []
    wrong = 0.0
    for split, items, positions, logits in _judged(setup, outcome, held_out):
        noise = fit_label_noise(logits, positions, setup.config.tuning.label_noise)
        right = right_probabilities(logits.double() / noise.temperature, positions, noise.share)
        labels += _ranked(setup, model, split, items, positions, logits, 1 - right.numpy())
        wrong += noise.share * len(items)
    labels.sort(key=lambda photo: photo.p_label)
    dataset, rows = setup.dataset, []
    embedded = {"train": outcome.frozen.train, "val": outcome.frozen.val}
    for split, features in embedded.items():
        rows += [(split, item) for item in features.kept(getattr(setup.split, split))]
    vectors = [features.embeddings for features in embedded.values()]
    if dataset.splits["test"]:
        workers = setup.config.workers
        test = dataset.splits["test"]
        features = embed(setup.backbone, cache, dataset, test, "test images", workers=workers)
        rows += [("test", item) for item in features.kept(test)]
        vectors.append(features.embeddings)

    def describe(row: int) -> tuple[str, str, str]:
        split, item = rows[row]
        return item.path, split, dataset.class_names[item.label]

    copies = find_copies(
        [dataset.path(item) for _, item in rows],
        torch.cat(vectors).numpy(),
        describe,
        sum(len(features) for features in embedded.values()),
    )
    suspects = Suspects(tuple(labels), wrong / max(len(labels), 1), copies)
    suspects.save(out / SUSPECTS)
    wrong_labels = len(suspects.probably_wrong)
    spoiling = sum(bool(copy.problem) for copy in copies)
    if wrong_labels or spoiling:
        say(
            f"note: {counted(wrong_labels, 'label')} probably wrong among "
            f"{counted(len(labels), 'photo')} that were held out, and "
            f"{counted(spoiling, 'photo')} with a copy in another split or class: "
            f"capt-suspects {out}"
        )


def _judged(
    setup: Setup, outcome: Outcome, held_out: HeldOut
) -> Iterator[tuple[str, list[Item], Int[Tensor, " photos"], Float[Tensor, "photos tuned"]]]:
    """Yield split, photos, positions of their labels, and logits by models that had not seen them.

    Held-out photos are of the validation split where there is one; then the folds of the choice
    have judged the training photos as well.
    """
    task, choice = outcome.task, outcome.choice
    split = "val" if len(task.val) else "train"
    if len(held_out):
        yield split, [*held_out.items], held_out.labels, held_out.tuned
    if split == "val" and choice is not None:
        items = outcome.frozen.train.kept(setup.split.train)
        judged = [items[row] for row in choice.judging.tolist()]
        if judged:
            yield "train", judged, task.labels[choice.judging], choice.out_of_fold


def _ranked(
    setup: Setup,
    model: TunedModel,
    split: str,
    items: list[Item],
    labels: Int[Tensor, " photos"],
    logits: Float[Tensor, "photos tuned"],
    p_wrong: Floats,
) -> tuple[SuspectLabel, ...]:
    tuned = np.asarray(setup.split.tuned)
    calibration = model.fitted.calibration.select(tuned)
    _, probabilities = calibration.apply(logits.double().numpy())
    paths = [item.path for item in items]
    splits = [split] * len(items)
    return rank_labels(paths, splits, labels.numpy(), probabilities, p_wrong, setup.tuned_names)
