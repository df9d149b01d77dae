"""Merge several tuned runs over one backbone into one model: the CoCoA mixture over their domains.

CoCoA-Mix (arXiv 2506.07484) weights prompts by class: π_in in the domain that a prompt was tuned
on, π_out elsewhere. The rule for several runs is ours: a class that one run was tuned on has that
run's row, a class that several were tuned on has the mean of their rows, and a class that none was
tuned on has the mean of all runs' rows with the weights π_out.
"""

from collections.abc import Sequence
from contextlib import closing
from itertools import combinations
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from capt_deploy.confidence.calibration import Calibration
from capt_deploy.core.console import say
from capt_deploy.core.errors import ConfigError, DataError
from capt_deploy.core.version import __version__
from capt_deploy.data.class_names import distinct_names
from capt_deploy.data.datasets import Dataset, Item
from capt_train.calibrate.temperature import fit_temperature
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import embed
from capt_train.method.class_rows import ClassRows
from capt_train.run.folder import TunedModel
from export.source.classes import hand_written_rows, untuned_rows
from export.source.model import (
    Source,
    confidence_outside_fitted,
    confusion_pairs,
    provenance,
    refuse_unfoldable,
)
from export.source.photos import Photo, choose_photos


def source_from_runs(models: Sequence[TunedModel], gate_data: str | Path | None = None) -> Source:
    """Return one model made of several runs, with one temperature for all classes together.

    Args:
        models: at least two, loaded; class names are those of the first, then those that the second
            adds, and so on. The same name means the same class.
        gate_data: where the runs' data set lies now, if it has moved; or other images. If the runs'
            own are gone, the temperature is fitted on these, as far as their classes are known.

    Raises:
        ConfigError: the runs cannot be merged: one is given twice, their models differ, the visual
            side of one is tuned, or one class is spelled in two ways.
        DataError: none of the validation images can be read.
    """
    _refuse_misfits(models)
    names = tuple(dict.fromkeys(name for model in models for name in model.class_names))
    try:
        distinct_names(names)
    except ConfigError as cause:
        raise ConfigError(f"merging: {cause}, for all runs alike, with --class-names") from cause
    tuned_names = {m.class_names[row] for m in models for row in m.split.tuned}
    tuned = tuple(name in tuned_names for name in names)
    rows, hand_written = _rows(models, names), _hand_written(models, names)
    photos = choose_photos(models, names, gate_data)
    temperature, zero_shot_temperature = _temperatures(
        models, photos.validation, names, tuned, (rows, ClassRows.from_texts(hand_written))
    )
    return Source(
        learner=models[0].learner,
        class_names=names,
        tuned=tuned,
        rows=rows,
        calibration=Calibration(temperature),
        hand_written=hand_written,
        zero_shot_temperature=zero_shot_temperature,
        moves_images=False,
        pairs=confusion_pairs(models),
        training=_provenance(models),
        photos=photos,
        outside_fitted=any(map(confidence_outside_fitted, models)),
    )


def _refuse_misfits(models: Sequence[TunedModel]) -> None:
    if len(models) < 2:
        raise ConfigError(f"merging: expected at least two runs, came {len(models)}")
    hashes = {str(model.provenance["model_sha256"])[:12]: model.config.model for model in models}
    if len(hashes) > 1:
        names = ", ".join(f"{name} ({sha256}…)" for sha256, name in hashes.items())
        raise ConfigError(f"merging: expected runs of one model and preprocessing, came {names}")
    for number, model in enumerate(models, start=1):
        refuse_unfoldable(model)
        if model.moves_images:
            raise ConfigError(
                f"merging: run {number} ({model.config.data}) has a tuned visual side, and runs "
                f"share one; tune it with --without visual,colours"
            )
    for (a, first), (b, second) in combinations(enumerate(models, start=1), 2):
        if first.class_names == second.class_names and torch.equal(
            first.class_rows.rows, second.class_rows.rows
        ):
            raise ConfigError(f"merging: runs {a} and {b} are the same; give each once")


def _rows(models: Sequence[TunedModel], names: Sequence[str]) -> ClassRows:
    parts: dict[str, list[ClassRows]] = {}
    for model in models:
        for row in model.split.tuned:
            parts.setdefault(model.class_names[row], []).append(model.class_rows.subset([row]))
    untuned = [name for name in names if name not in parts]
    new = ClassRows.from_texts(untuned_rows(models, untuned))
    parts |= {name: [new.subset([place])] for place, name in enumerate(untuned)}
    weights = [torch.cat([part.rows for part in parts[name]]).mean(dim=0) for name in names]
    biases = [torch.cat([part.biases for part in parts[name]]).mean() for name in names]
    return ClassRows(torch.stack(weights), torch.stack(biases))


def _hand_written(
    models: Sequence[TunedModel], names: Sequence[str]
) -> Float[Tensor, "classes dim"]:
    if len({model.config.prompt.templates for model in models}) > 1:
        return hand_written_rows(models, names)
    known = {n: row for m in models for n, row in zip(m.class_names, m.zero_shot, strict=True)}
    return torch.stack([known[name] for name in names])


def _temperatures(
    models: Sequence[TunedModel],
    photos: Sequence[Photo],
    names: tuple[str, ...],
    tuned: Sequence[bool],
    sets: Sequence[ClassRows],
) -> list[float]:
    """Return a temperature for each set of rows, fitted on images of the tuned classes.

    Without images it is the geometric mean of the runs' temperatures.
    """
    items = [Item(str(p.path), p.label) for p in photos if p.label >= 0 and tuned[p.label]]
    if not items:
        say("note: no validation images; temperatures are the geometric means of the runs'")
        fitted = [(m.fitted.temperature, m.fitted.zero_shot_temperature) for m in models]
        return [exp(fmean(map(log, values))) for values in zip(*fitted, strict=True)]
    backbone, sha256 = models[0].backbone, str(models[0].provenance["model_sha256"])
    dataset = Dataset(Path(), names, {})  # the paths are whole ones
    with closing(EmbeddingCache(sha256, backbone.device.type)) as cache:
        features = embed(backbone, cache, dataset, items, "validation images")
    if not len(features):
        raise DataError(
            f"the temperature of merged runs is fitted on their validation images, but none of "
            f"{len(items)} can be read (first: {items[0].path}); pass their folder with --gate-data"
        )
    columns = [column for column, flag in enumerate(tuned) if flag]
    labels = features.labels_among(columns)
    # Softmax does not change with the bias of a sigmoid model, which is the same for all classes.
    logits = [
        rows.cpu().subset(columns).logits(features.embeddings, backbone.scale) for rows in sets
    ]
    return [fit_temperature(part, labels) for part in logits]


def _provenance(models: Sequence[TunedModel]) -> dict[str, Any]:
    runs = [provenance(model) for model in models]
    common = {key: runs[0][key] for key in ("model", "pretrained", "model_sha256")}
    return {"capt": __version__, **common, "runs": runs}
