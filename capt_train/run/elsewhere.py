"""A tuned model on other classes than those of its data set, given by name."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from capt_deploy.core.errors import ConfigError
from capt_train.method.class_rows import ClassRows, joined
from capt_train.run.folder import TunedModel


@torch.no_grad()
def untuned_rows(model: TunedModel, names: Sequence[str]) -> Float[Tensor, "classes dim"]:
    """Return Ŵ_c of classes outside training: Σ_i π_out,i·t̃_i, set beside the tuned ones."""
    hand_written = model.backbone.class_embeddings(names, model.config.prompt.templates)
    learned = model.learner.texts_of(names, hand_written).embeddings
    embeddings = torch.cat([hand_written[None], learned])
    return model.outside_rows(model.fitted.mixture.rows(embeddings, [False] * len(names)))


def for_classes(model: TunedModel, names: Sequence[str], template: str | None = None) -> TunedModel:
    """Return the model for other classes; one that the run knows by the same name keeps its row.

    Args:
        model: the run.
        names: of at least two classes.
        template: hand-written prompt of the new ones; by default that of the run.

    Raises:
        ConfigError: the text side of the run is no constant row for each class.
    """
    if (reason := model.learner.obstacle) is not None:
        raise ConfigError(
            f"--method {model.config.method}: not measured on other classes: {reason}"
        )
    if template is not None:
        model = replace(model, config=model.config.with_settings({"prompt.templates": (template,)}))
    known = {name: place for place, name in enumerate(model.class_names)}
    new = [name for name in names if name not in known]
    places = known | {name: len(known) + number for number, name in enumerate(new)}
    chosen = [places[name] for name in names]
    rows = model.class_rows
    zero_shot = model.zero_shot
    if new:
        rows = joined(rows, ClassRows.from_texts(untuned_rows(model, new)))
        hand_written = model.backbone.class_embeddings(new, model.config.prompt.templates)
        zero_shot = torch.cat([zero_shot, hand_written.to(zero_shot)])
    tuned = {model.class_names[index] for index in model.split.tuned}
    flags = tuple(index for index, name in enumerate(names) if name in tuned)
    fitted = model.fitted
    calibration = fitted.calibration.select(chosen)
    return replace(
        model,
        split=replace(model.split, class_names=tuple(names), tuned=flags),
        class_rows=rows.subset(chosen),
        zero_shot=zero_shot[chosen],
        fitted=replace(fitted, pairs={}, calibration=calibration),
    )
