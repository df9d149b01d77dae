"""The model that is exported: a row for each class over one visual side, and images to check it."""

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
from capt_deploy.core.errors import ConfigError
from capt_deploy.core.version import __version__
from capt_train.method.class_rows import UNCHANGED, ClassRows, GaussianRows
from capt_train.method.learner import Learner
from capt_train.run.folder import TunedModel
from export.source.fold import FoldedHead, fold
from export.source.photos import ExportPhotos, choose_photos

# Folders of the machine that tuned the model are left out.
_PROVENANCE = (
    *("method", "added", "without", "classes", "shots", "seed"),
    *("data_fingerprint", "model_sha256", "versions"),
)


@dataclass(frozen=True)
class ValidationImages:
    """Embeddings and labels of the run's held-out images, for prediction sets and rejection."""

    embeddings: Float[Tensor, "images dim"]  # of the tuned model, unit norm
    labels: Int[Tensor, " images"]  # among the exported classes; -1 for any other class
    tuned_logits: Float[Tensor, "images tuned"]  # z of the classes that the run was tuned on
    # Mean z of these classes by the run's own model, less that of `tuned_logits`: models of other
    # folds differ in what they add to all logits of an image, and the energy depends on it
    shift: Float[Tensor, " images"]
    tuned_labels: Int[Tensor, " images"]  # among these
    tuned: tuple[int, ...]  # these, among the run's classes
    places: tuple[int, ...]  # of the exported classes among the run's; new classes come after them


@dataclass(frozen=True)
class Source:
    """A model to export, made from one run or several."""

    learner: Learner  # its visual side and its backbone, colours and strength set
    class_names: tuple[str, ...]
    tuned: tuple[bool, ...]
    rows: ClassRows  # Ŵ_c, never renormalised, and b_c
    calibration: Calibration
    hand_written: Float[Tensor, "classes dim"]  # t⁰, unit norm
    zero_shot_temperature: float  # of the frozen model
    moves_images: bool  # whether embeddings of images differ from the frozen model's
    pairs: tuple[Mapping[str, Any], ...]  # confusions, most frequent first
    training: Mapping[str, Any]  # provenance
    photos: ExportPhotos
    # With DAC: the tuned classes, also those that are not exported
    tuned_texts: TunedTexts | None = None
    validation: ValidationImages | None = None
    outside_fitted: bool = False  # whether confidences of untuned classes are fitted already

    @property
    def temperature(self) -> float:
        """Return T of the tuned model."""
        return self.calibration.temperature

    @property
    def head(self) -> FoldedHead:
        """Return the folded text side, calibrated for float32."""
        return fold(self.learner.backbone, self.rows, self.calibration)

    @property
    def zero_shot_head(self) -> FoldedHead | None:
        """Return the folded hand-written prompt; None if images have other embeddings."""
        if self.moves_images:
            return None
        calibration = Calibration(self.zero_shot_temperature)
        return fold(self.learner.backbone, ClassRows.from_texts(self.hand_written), calibration)


def source_from_run(model: TunedModel, gate_data: str | Path | None = None) -> Source:
    """Return the model of a finished run.

    Args:
        model: the run, loaded.
        gate_data: the run's data set where it has moved, or other images to check on: a labelled
            data set, or any folder of images.

    Raises:
        ConfigError: the text side of the run cannot be folded.
        DataError: `gate_data` holds no images.
    """
    refuse_unfoldable(model)
    return Source(
        learner=model.learner,
        class_names=model.class_names,
        tuned=model.tuned,
        rows=model.class_rows,
        calibration=model.fitted.calibration,
        hand_written=model.zero_shot,
        zero_shot_temperature=model.fitted.zero_shot_temperature,
        moves_images=model.moves_images,
        pairs=confusion_pairs([model]),
        training=provenance(model),
        photos=choose_photos([model], model.class_names, gate_data),
        validation=_validation_images(model),
        outside_fitted=confidence_outside_fitted(model),
    )


def refuse_unfoldable(model: TunedModel) -> None:
    """Raise a ConfigError for a run whose text side is no constant row for each class."""
    if (reason := model.learner.obstacle) is not None:
        raise ConfigError(
            f"--method {model.config.method} cannot be exported: {reason}; expected a run of a "
            "method that folds, such as the default"
        )


def confidence_outside_fitted(model: TunedModel) -> bool:
    """Tell whether held-out classes have fitted the confidence of classes without photos."""
    return model.fitted.outside != UNCHANGED or isinstance(model.learner.rows, GaussianRows)


@torch.no_grad()
def _validation_images(model: TunedModel) -> ValidationImages | None:
    images = model.validation
    if images is None:
        return None
    tuned = list(model.split.tuned)
    whole = model.raw_logits(images.embeddings)[:, tuned].cpu()
    logits = whole if images.logits is None else images.logits
    return ValidationImages(
        images.embeddings,
        images.labels,
        logits,
        whole.mean(dim=1) - logits.mean(dim=1),
        torch.searchsorted(torch.tensor(tuned), images.labels),
        tuple(tuned),
        tuple(range(len(model.class_names))),
    )


def distance_aware(source: Source) -> Source:
    """Return the source with DAC factors for all of its classes (METHOD 8).

    Distances are measured to the tuned classes of the first call, so that it can be called again
    once other classes are chosen.

    Raises:
        ConfigError: the run has a calibration of its own for classes without photos.
    """
    if source.outside_fitted:
        raise ConfigError(
            "--dac: the run's confidences for classes without photos are fitted on held-out "
            "classes already; leave --dac out"
        )
    tuned = torch.tensor(source.tuned)
    rows, hand_written = source.rows.cpu().rows, source.hand_written.detach().cpu()
    texts = source.tuned_texts
    if texts is None:
        texts = TunedTexts(rows[tuned].numpy(), hand_written[tuned].numpy())
    factors = np.ones(len(rows), np.float32)
    factors[~tuned.numpy()] = texts.factors(rows[~tuned].numpy(), hand_written[~tuned].numpy())
    calibration = replace(source.calibration, factors=tuple(factors.tolist()))
    return replace(source, calibration=calibration, tuned_texts=texts)


def confusion_pairs(models: Sequence[TunedModel]) -> tuple[dict[str, Any], ...]:
    """Return how often which class was taken for which, in all runs together, worst first."""
    counts: dict[tuple[str, str], int] = {}
    for model in models:
        for (true, taken), count in model.fitted.pairs.items():
            key = (model.class_names[true], model.class_names[taken])
            counts[key] = counts.get(key, 0) + count
    worst = sorted(counts.items(), key=lambda pair: -pair[1])
    return tuple({"true": a, "predicted": b, "count": count} for (a, b), count in worst)


def provenance(model: TunedModel) -> dict[str, Any]:
    """Return the settings, data and versions behind a run, for the manifest of a bundle."""
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
        "choice": model.provenance["choice"],
    }
