"""Choose the classes of a bundle: fewer than the run has, in another order, or new ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from capt_deploy.core.errors import ConfigError, DataError
from capt_deploy.core.files import expand_home, read_json, read_text
from capt_deploy.data.class_names import distinct_names, plain_spelling
from capt_train.method.class_rows import ClassRows, joined
from capt_train.run import elsewhere
from capt_train.run.folder import TunedModel
from export.source.model import Source, distance_aware
from export.source.photos import Photo

_BATCH = 256  # names


def read_class_list(path: str | Path) -> tuple[str, ...]:
    """Read class names from a JSON list or from a text file with one name a line.

    Raises:
        DataError: the file cannot be read, or its JSON is not a list of strings.
    """
    path = expand_home(path)
    if path.suffix.lower() == ".json":
        names = read_json(path, DataError)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f'{path}: expected a JSON list such as ["otter", "beaver"]')
        return tuple(names)
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise DataError(f"{path}: expected a UTF-8 file, one name a line ({cause})") from cause
    return tuple(line for line in lines if line.strip())


def with_classes(source: Source, models: Sequence[TunedModel], names: Sequence[str]) -> Source:
    """Return the source with the classes of a list, in its order.

    A class that the source has keeps its row. A new one gets the learned prompts with its name and
    the weights π_out of classes outside training.

    Args:
        source: made of `models`.
        models: the run, or the runs that were merged.
        names: of at least two classes.

    Raises:
        ConfigError: there are too few names, one is empty or given twice, or a class of the source
            is spelled in another way.
        ModelError: a name is too long for the text tower.
    """
    names = distinct_names(names)
    if len(names) < 2:
        raise ConfigError(f"class names: expected at least two, came {len(names)}")
    known = {name: row for row, name in enumerate(source.class_names)}
    new = [name for name in names if name not in known]
    _refuse_spellings(new, source.class_names)
    known |= {name: len(source.class_names) + place for place, name in enumerate(new)}
    chosen = [known[name] for name in names]
    places = {row: place for place, row in enumerate(chosen)}
    tuned = (*source.tuned, *[False] * len(new))
    photos, validation = source.photos, source.validation
    if validation is not None:
        labels = [places.get(label, -1) for label in validation.labels.tolist()]
        validation = replace(validation, labels=torch.tensor(labels), places=tuple(chosen))
    selected = replace(
        source,
        calibration=source.calibration.select(chosen),
        class_names=names,
        tuned=tuple(tuned[row] for row in chosen),
        rows=joined(source.rows, ClassRows.from_texts(untuned_rows(models, new))).subset(chosen),
        hand_written=torch.cat([source.hand_written, hand_written_rows(models, new)])[chosen],
        pairs=tuple(p for p in source.pairs if {p["true"], p["predicted"]} <= {*names}),
        photos=replace(
            photos,
            gate=_relabel(photos.gate, places),
            training=_relabel(photos.training, places),
        ),
        validation=validation,
    )
    return selected if source.tuned_texts is None else distance_aware(selected)


@torch.no_grad()
def untuned_rows(
    models: Sequence[TunedModel], names: Sequence[str]
) -> Float[Tensor, "classes dim"]:
    """Return Ŵ_c of classes outside training: the mean over the runs of Σ_i π_out,i·t̃_i."""
    rows = [
        elsewhere.untuned_rows(model, names[start : start + _BATCH])
        for model in models
        for start in range(0, len(names), _BATCH)
    ]
    if not rows:
        return models[0].zero_shot[:0]
    return torch.cat(rows).view(len(models), len(names), -1).mean(dim=0)


def hand_written_rows(
    models: Sequence[TunedModel], names: Sequence[str]
) -> Float[Tensor, "classes dim"]:
    """Return t⁰_c, unit norm, by the templates of all runs."""
    if not names:
        return models[0].zero_shot[:0]
    templates = dict.fromkeys(text for model in models for text in model.config.prompt.templates)
    return models[0].backbone.class_embeddings(names, list(templates))


def _refuse_spellings(new: Sequence[str], known: Sequence[str]) -> None:
    spellings = {plain_spelling(name): name for name in known}
    for name in new:
        if (twin := spellings.get(plain_spelling(name))) is not None:
            raise ConfigError(
                f"class names: {name!r} is not a class of the run, but {twin!r} is; spell it so to "
                f"get the tuned row"
            )


def _relabel(photos: tuple[Photo, ...], places: Mapping[int, int]) -> tuple[Photo, ...]:
    """Return photos with labels among the chosen classes; -1 for any other class."""
    return tuple(replace(photo, label=places.get(photo.label, -1)) for photo in photos)
