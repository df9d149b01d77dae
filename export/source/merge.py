"""Several tuned runs over one backbone as one model: the CoCoA mixture over their domains.

CoCoA-Mix (arXiv 2506.07484) weights prompts by class: π_in in the domain that a prompt was tuned
on, π_out elsewhere. What follows is ours. Each run rules its own classes: one that a single run was
tuned on has that run's row, one that several were tuned on the mean of their rows. One that none
was tuned on has the mean of all runs' rows with the weights π_out, for there each of them is as
much a stranger as the others.
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
from capt_deploy.core.files import expand_home
from capt_deploy.core.version import __version__
from capt_deploy.data.class_names import distinct_names
from capt_deploy.data.datasets import Dataset, Item
from capt_train.calibrate.temperature import fit_temperature
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import embed
from capt_train.run.folder import TunedModel
from export.source.classes import hand_written_rows, untuned_rows
from export.source.model import (
    Photo,
    Source,
    is_the_data_set,
    mined_pairs,
    other_photos,
    provenance,
    root_of,
)


def merged(models: Sequence[TunedModel], gate_data: str | Path | None = None) -> Source:
    """Return one model made of several runs, with one temperature fitted for all classes together.

    Args:
        models: at least two, loaded; class names are those of the first, then what the second
            adds, and so on. The same name means the same class.
        gate_data: where the runs' data set lies now, if it has moved; or other images, which serve
            for the temperature too where the runs' own are gone, as far as their classes are known.

    Raises:
        ConfigError: runs that do not fit together: one is there twice, their models differ, the
            visual side of one is tuned, or one class is spelled in two ways.
        DataError: none of the validation images is there.
    """
    _refuse_misfits(models)
    names = tuple(dict.fromkeys(name for model in models for name in model.class_names))
    try:
        distinct_names(names)
    except ConfigError as cause:
        raise ConfigError(f"merging: {cause}, for all runs alike, with --class-names") from cause
    own = {n for m in models for n, flag in zip(m.class_names, m.tuned, strict=True) if flag}
    tuned = tuple(name in own for name in names)
    rows, hand_written = _rows(models, names), _hand_written(models, names)
    given = None if gate_data is None else expand_home(gate_data)
    moved = given is not None and all(is_the_data_set(m.split, root_of(given)) for m in models)
    train, val = (
        _listed(models, names, part, given if moved else None) for part in ("train", "val")
    )
    shown = val or train[::2]
    if given is not None and not moved:
        shown = tuple(other_photos(given, names))
        if not any(photo.path.is_file() for photo in val):
            val = shown
    temperatures = _temperatures(models, val, names, tuned, (rows, hand_written))
    return Source(
        learner=models[0].learner,
        class_names=names,
        tuned=tuned,
        rows=rows,
        calibration=Calibration(temperatures[0]),
        hand_written=hand_written,
        zero_shot_temperature=temperatures[1],
        moves_images=False,
        pairs=mined_pairs(models),
        training=_provenance(models),
        gate_images=shown,
        training_images=train if val else train[1::2],
    )


def _refuse_misfits(models: Sequence[TunedModel]) -> None:
    if len(models) < 2:
        raise ConfigError(f"merging: expected at least two runs, came {len(models)}")
    shas = {str(model.provenance["model_sha256"])[:12]: model.config.model for model in models}
    if len(shas) > 1:
        found = ", ".join(f"{name} ({sha}…)" for sha, name in shas.items())
        raise ConfigError(f"merging: expected runs of one model and preprocessing, came {found}")
    for number, model in enumerate(models, start=1):
        if model.moves_images:
            raise ConfigError(
                f"merging: run {number} ({model.config.data}) has tuned its visual side, and one "
                f"graph has one visual side; tune it with --without visual,colours"
            )
    for (a, one), (b, other) in combinations(enumerate(models, start=1), 2):
        if one.class_names == other.class_names and torch.equal(
            one.text_embeddings, other.text_embeddings
        ):
            raise ConfigError(f"merging: runs {a} and {b} are the same one; give each once")


def _rows(models: Sequence[TunedModel], names: Sequence[str]) -> Float[Tensor, "classes dim"]:
    tuned: dict[str, list[Tensor]] = {}
    for model in models:
        for row in model.split.tuned:
            tuned.setdefault(model.class_names[row], []).append(model.text_embeddings[row])
    rows = {name: torch.stack(own).mean(dim=0) for name, own in tuned.items()}
    others = [name for name in names if name not in rows]
    rows |= dict(zip(others, untuned_rows(models, others), strict=True))
    return torch.stack([rows[name] for name in names])


def _hand_written(
    models: Sequence[TunedModel], names: Sequence[str]
) -> Float[Tensor, "classes dim"]:
    if len({model.config.prompt.templates for model in models}) > 1:
        return hand_written_rows(models, names)
    known = {n: row for m in models for n, row in zip(m.class_names, m.zero_shot, strict=True)}
    return torch.stack([known[name] for name in names])


def _listed(
    models: Sequence[TunedModel], names: Sequence[str], split: str, data: Path | None
) -> tuple[Photo, ...]:
    """Return the images of all runs' `train` or `val`, each once, with their labels in `names`."""
    place = {name: index for index, name in enumerate(names)}
    found: dict[Photo, None] = {}
    for model in models:
        root = root_of(Path(model.config.data) if data is None else data)
        for item in getattr(model.split, split):
            label = place[model.class_names[item.label]]
            found[Photo(root / item.path, label)] = None
    return tuple(found)


def _temperatures(
    models: Sequence[TunedModel],
    photos: Sequence[Photo],
    names: tuple[str, ...],
    tuned: Sequence[bool],
    texts: Sequence[Float[Tensor, "classes dim"]],
) -> list[float]:
    """Return one temperature for each set of rows, fitted on the images of classes tuned on.

    Where there are none, the geometric mean of what the runs have.
    """
    items = [Item(str(p.path), p.label) for p in photos if p.label >= 0 and tuned[p.label]]
    if not items:
        say("note: no validation images; each temperature is the geometric mean of the runs' own")
        own = [(m.fitted.temperature, m.fitted.zero_shot_temperature) for m in models]
        return [exp(fmean(map(log, values))) for values in zip(*own, strict=True)]
    backbone, sha256 = models[0].backbone, str(models[0].provenance["model_sha256"])
    dataset = Dataset(Path(), names, {})  # the paths are whole ones
    with closing(EmbeddingCache(sha256, backbone.device.type)) as cache:
        features = embed(backbone, cache, dataset, items, "validation images")
    if not len(features):
        raise DataError(
            f"the temperature of merged runs is fitted on their validation images, but none of "
            f"{len(items)} can be read (first: {items[0].path}); pass their folder with --gate-data"
        )
    columns = [row for row, own in enumerate(tuned) if own]
    labels = features.labels_among(columns)
    # The bias of a sigmoid model is the same for all classes, so that softmax does not see it.
    logits = [backbone.scale * features.embeddings @ rows[columns].cpu().T for rows in texts]
    return [fit_temperature(own, labels) for own in logits]


def _provenance(models: Sequence[TunedModel]) -> dict[str, Any]:
    runs = [provenance(model) for model in models]
    common = {key: runs[0][key] for key in ("model", "pretrained", "model_sha256")}
    return {"capt": __version__, **common, "runs": runs}
