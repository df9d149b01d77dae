"""What is exported: a row for each class over one visual side, and real images to prove it on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from capt_deploy.confidence.calibration import Calibration
from capt_deploy.confidence.distance_aware import TunedTexts
from capt_deploy.core.console import say
from capt_deploy.core.errors import DataError
from capt_deploy.core.files import expand_home, sha256_file, visible_files
from capt_deploy.core.version import __version__
from capt_deploy.data.datasets import SPLITS, Item, read_dataset
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.learner import Learner
from capt_train.run.folder import TunedModel
from export.source.fold import Head, folded

_LOOKED_INTO = 16  # images of a data set
# What a reader of the bundle may want to know; folders of the machine it came from are not in it.
_PROVENANCE = (
    *("method", "added", "without", "classes", "shots", "seed"),
    *("data_fingerprint", "model_sha256", "versions"),
)


@dataclass(frozen=True)
class Photo:
    """An image file, with its class where that is known."""

    path: Path
    label: int = -1  # index of its class; -1 where it is not known


@dataclass(frozen=True)
class KnownImages:
    """The run's validation images, for what is decided by them."""

    embeddings: Float[Tensor, "images dim"]  # as tuned, unit norm
    labels: Int[Tensor, " images"]  # among the classes exported; -1 where it is none of them
    tuned_logits: Float[Tensor, "images tuned"]  # z of the classes that the run was tuned on
    tuned_labels: Int[Tensor, " images"]  # among these
    places: tuple[int, ...]  # of the exported classes among the run's own; behind them: new ones


@dataclass(frozen=True)
class Source:
    """One model to export, whatever it was made from."""

    learner: Learner  # its visual side and its backbone, colours and strength set
    class_names: tuple[str, ...]
    tuned: tuple[bool, ...]
    rows: Float[Tensor, "classes dim"]  # Ŵ_c, never renormalised
    calibration: Calibration
    hand_written: Float[Tensor, "classes dim"]  # t⁰, unit norm
    zero_shot_temperature: float  # of the frozen model
    moves_images: bool  # whether the images' embeddings are not the frozen model's
    pairs: tuple[Mapping[str, Any], ...]  # who is mistaken for whom, worst first
    training: Mapping[str, Any]  # provenance
    gate_images: tuple[Photo, ...]
    training_images: tuple[Photo, ...]  # for the ranges of int8
    # With DAC: the classes tuned on, also those that are not exported
    tuned_texts: TunedTexts | None = None
    validation: KnownImages | None = None

    @property
    def temperature(self) -> float:
        """T of the tuned model."""
        return self.calibration.temperature

    @property
    def head(self) -> Head:
        """The folded text side, calibrated for float32."""
        return folded(self.learner.backbone, self.rows, self.calibration)

    @property
    def zero_shot_head(self) -> Head | None:
        """The same of the frozen model with the hand-written prompt."""
        if self.moves_images:
            return None
        calibration = Calibration(self.zero_shot_temperature)
        return folded(self.learner.backbone, self.hand_written, calibration)


def source_of(model: TunedModel, gate_data: str | Path | None = None) -> Source:
    """Return what a finished run exports.

    Args:
        model: the run, loaded.
        gate_data: the run's data set where it has moved, or other images to check on: a labelled
            data set, or any folder of images.

    Raises:
        DataError: none of the images is there.
    """
    names, split = model.class_names, model.split
    own = Path(model.config.data)
    train = photos_of(split.train, root_of(own))
    chosen = photos_of(split.val, root_of(own))
    if gate_data is not None:
        given = expand_home(gate_data)
        if is_the_data_set(split, root_of(given)):
            train, chosen = (photos_of(part, root_of(given)) for part in (split.train, split.val))
        else:
            chosen = other_photos(given, names)
    if not chosen:  # int8 must not be judged by what it was calibrated on
        say("note: no validation images; the export is checked on half of the training images")
        train, chosen = train[1::2] or train, train[::2]
    return Source(
        learner=model.learner,
        class_names=names,
        tuned=model.tuned,
        rows=model.text_embeddings,
        calibration=model.fitted.calibration,
        hand_written=model.zero_shot,
        zero_shot_temperature=model.fitted.zero_shot_temperature,
        moves_images=model.moves_images,
        pairs=mined_pairs([model]),
        training=provenance(model),
        gate_images=tuple(chosen),
        training_images=tuple(train),
        validation=_known_images(model),
    )


@torch.no_grad()
def _known_images(model: TunedModel) -> KnownImages | None:
    known = model.validation
    if known is None:
        return None
    tuned = list(model.split.tuned)
    return KnownImages(
        known.embeddings,
        known.labels,
        model.raw_logits(known.embeddings)[:, tuned].cpu(),
        torch.searchsorted(torch.tensor(tuned), known.labels),
        tuple(range(len(model.class_names))),
    )


def distance_aware(source: Source) -> Source:
    """Return the source with DAC factors for all of its classes (METHOD 8).

    Distances are measured to the tuned classes of the first call, so that it can be called again
    once other classes are chosen.
    """
    tuned = torch.tensor(source.tuned)
    rows, hand_written = (t.detach().cpu() for t in (source.rows, source.hand_written))
    texts = source.tuned_texts
    if texts is None:
        texts = TunedTexts(rows[tuned].numpy(), hand_written[tuned].numpy())
    factors = np.ones(len(rows), np.float32)
    factors[~tuned.numpy()] = texts.factors(rows[~tuned].numpy(), hand_written[~tuned].numpy())
    calibration = replace(source.calibration, factors=tuple(factors.tolist()))
    return replace(source, calibration=calibration, tuned_texts=texts)


def root_of(data: Path) -> Path:
    """Return the folder that paths of a data set start from."""
    return data if data.is_dir() else data.parent


def photos_of(items: Sequence[Item], root: Path) -> list[Photo]:
    """Return images of a run where its data set lies."""
    return [Photo(root / item.path, item.label) for item in items]


def is_the_data_set(split: FewShotSplit, root: Path) -> bool:
    """Tell whether a folder holds the images of a run: all by name, some looked into."""
    items = [*split.train, *split.val]
    if not all((root / item.path).is_file() for item in items):
        return False
    looked_into = items[:: max(1, len(items) // _LOOKED_INTO)]
    return all(sha256_file(root / i.path) == split.sha256[i.path] for i in looked_into)


def other_photos(root: Path, class_names: tuple[str, ...]) -> list[Photo]:
    """Return the images of another data set; without labels where its classes are others."""
    try:
        dataset = read_dataset(root, known_classes=class_names)
        items = next(of for name in ("val", "test", *SPLITS) if (of := dataset.splits[name]))
        say(f"note: checked on {len(items)} labelled images of another data set, {root}")
        return [Photo(dataset.path(item), item.label) for item in items]
    except DataError:
        files = visible_files(root) if root.is_dir() else []
    if not files:
        raise DataError(f"{root}: holds no images to check the export on; expected a data set")
    say(f"note: checked on {len(files)} images without known classes, below {root}")
    return [Photo(file) for file in files]


def mined_pairs(models: Sequence[TunedModel]) -> tuple[dict[str, Any], ...]:
    """Return who is mistaken for whom in all of some runs together, worst first."""
    counts: dict[tuple[str, str], int] = {}
    for model in models:
        for (true, taken), count in model.fitted.pairs.items():
            key = (model.class_names[true], model.class_names[taken])
            counts[key] = counts.get(key, 0) + count
    worst = sorted(counts.items(), key=lambda pair: -pair[1])
    return tuple({"true": a, "predicted": b, "count": count} for (a, b), count in worst)


def provenance(model: TunedModel) -> dict[str, Any]:
    """Return where a run came from, as a bundle tells it."""
    spec = model.config.model
    if spec.startswith("local-dir:"):
        spec = f"local-dir:{Path(spec.removeprefix('local-dir:')).name}"
    return {
        "capt": __version__,
        "model": spec,
        "pretrained": model.config.pretrained and Path(model.config.pretrained).name,
        **{key: model.provenance[key] for key in _PROVENANCE},
        "templates": list(model.config.prompt.templates),
        "context_init": model.config.prompt.words,
        "parts": sorted(model.learner.parts(model.config)),
        "strength": model.fitted.strength,
    }


def spread(photos: tuple[Photo, ...], most: int) -> list[Photo]:
    """Return at most so many, spread over the list, which is sorted by class."""
    places = torch.linspace(0, len(photos) - 1, min(len(photos), most)).round().long()
    return [photos[int(place)] for place in places]
