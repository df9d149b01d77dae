"""Export other classes than a run's own: fewer, in another order, or new ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from capt_deploy.core.errors import ConfigError, DataError
from capt_deploy.core.files import expand_home, read_json
from capt_deploy.data.class_names import distinct_names, plain_spelling
from capt_train.run.folder import TunedModel
from export.source.model import KnownImages, Photo, Source, distance_aware

_AT_ONCE = 256  # names


def read_class_list(path: str | Path) -> tuple[str, ...]:
    """Read names of classes: a JSON list, or a text file with one name a line.

    Raises:
        DataError: the file cannot be read, or its JSON is no list of texts.
    """
    path = expand_home(path)
    if path.suffix.lower() == ".json":
        names = read_json(path, DataError)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f'{path}: expected a JSON list such as ["otter", "beaver"]')
        return tuple(names)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise DataError(f"{path}: expected a UTF-8 file, one name a line ({cause})") from cause
    return tuple(line for line in lines if line.strip())


def with_classes(source: Source, models: Sequence[TunedModel], names: Sequence[str]) -> Source:
    """Return the source with the classes of a list, in its order.

    A class that the source knows keeps its row. Others get the learned prompts with their names
    and the weights π_out of classes that were not tuned on.

    Args:
        source: made of `models`.
        models: the run, or the runs that were merged.
        names: of at least two classes.

    Raises:
        ConfigError: too few names, an empty one, one that is there twice, or a class of the source
            in another spelling.
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
    tuned = (*source.tuned, *[False] * len(new))
    places = {row: place for place, row in enumerate(chosen)}
    listed = set(names)
    listed_source = replace(
        source,
        calibration=source.calibration.select(chosen),
        class_names=names,
        tuned=tuple(tuned[row] for row in chosen),
        rows=torch.cat([source.rows, untuned_rows(models, new)])[chosen],
        hand_written=torch.cat([source.hand_written, hand_written_rows(models, new)])[chosen],
        pairs=tuple(p for p in source.pairs if {p["true"], p["predicted"]} <= listed),
        gate_images=_relabelled(source.gate_images, places),
        training_images=_relabelled(source.training_images, places),
        validation=_known_again(source.validation, places, chosen),
    )
    return listed_source if source.tuned_texts is None else distance_aware(listed_source)


@torch.no_grad()
def untuned_rows(
    models: Sequence[TunedModel], names: Sequence[str]
) -> Float[Tensor, "classes dim"]:
    """Return Ŵ_c of classes that no run was tuned on: the mean over the runs of Σ_i π_out,i·t̃_i."""
    rows = [
        _untuned_rows(model, names[start : start + _AT_ONCE])
        for model in models
        for start in range(0, len(names), _AT_ONCE)
    ]
    if not rows:
        return models[0].text_embeddings[:0]
    return torch.cat(rows).view(len(models), len(names), -1).mean(dim=0)


def _untuned_rows(model: TunedModel, names: Sequence[str]) -> Float[Tensor, "classes dim"]:
    hand_written = model.backbone.class_embeddings(names, model.config.prompt.templates)
    learned = model.learner.texts_of(names, hand_written).embeddings
    embeddings = torch.cat([hand_written[None], learned])
    return model.fitted.mixture.rows(embeddings, [False] * len(names))


def hand_written_rows(
    models: Sequence[TunedModel], names: Sequence[str]
) -> Float[Tensor, "classes dim"]:
    """Return t⁰_c by all templates that one of the runs has."""
    if not names:
        return models[0].zero_shot[:0]
    templates = dict.fromkeys(text for model in models for text in model.config.prompt.templates)
    return models[0].backbone.class_embeddings(names, list(templates))


def _refuse_spellings(new: Sequence[str], known: Sequence[str]) -> None:
    own = {plain_spelling(name): name for name in known}
    for name in new:
        if (twin := own.get(plain_spelling(name))) is not None:
            raise ConfigError(
                f"class names: {name!r} is no class of the run, but {twin!r} is; write it so, for "
                f"its row to be the tuned one"
            )


def _known_again(
    known: KnownImages | None, places: Mapping[int, int], chosen: Sequence[int]
) -> KnownImages | None:
    if known is None:
        return None
    labels = torch.tensor([places.get(label, -1) for label in known.labels.tolist()])
    return replace(known, labels=labels, places=tuple(chosen))


def _relabelled(photos: tuple[Photo, ...], places: Mapping[int, int]) -> tuple[Photo, ...]:
    """Return the images with the places of their classes in the list, -1 where they are not."""
    return tuple(replace(photo, label=places.get(photo.label, -1)) for photo in photos)
