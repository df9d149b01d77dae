"""All that a report says, measured once for its page, its Markdown and its JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from capt_deploy.core.errors import DataError
from capt_deploy.core.text import printable
from capt_deploy.evaluation.evaluate import Evaluation
from capt_deploy.report.confusions import ClassRow, ConfusedPair, class_rows, confused_pairs
from capt_deploy.report.gallery import CardGroup, make_gallery
from capt_deploy.report.measure import (
    ZERO_SHOT,
    MeasuredModel,
    Predictions,
    measure_models,
    predict,
)
from capt_deploy.report.promises import Promise, promises


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Results:
    """Everything that a report says."""

    title: str
    evaluation: Evaluation
    models: list[MeasuredModel]  # the zero-shot one first, if there is one; then the main one
    predictions: Predictions
    pairs: list[ConfusedPair]
    gallery: list[CardGroup]
    classes: list[ClassRow]
    promises: list[Promise]

    @property
    def zero_shot(self) -> MeasuredModel | None:
        """Return the zero-shot model, if there is one."""
        return self.models[0] if self.models[0].name == ZERO_SHOT else None

    @property
    def main(self) -> MeasuredModel:
        """Return the model that the report is about."""
        return self.models[0 if self.zero_shot is None else 1]


def find_results(evaluation: Evaluation, title: str) -> Results:
    """Measure all models, and choose the photos and pairs to show.

    Raises:
        DataError: logits are not finite.
    """
    evaluation = _checked(evaluation)
    models = measure_models(evaluation)  # before the large arrays of the predictions exist
    predictions = predict(evaluation)
    return Results(
        printable(title),
        evaluation,
        models,
        predictions,
        confused_pairs(evaluation, predictions),
        make_gallery(evaluation, predictions),
        class_rows(evaluation, predictions),
        promises(evaluation, predictions),
    )


def _checked(evaluation: Evaluation) -> Evaluation:
    """Return the evaluation with names that can be printed anywhere."""
    frozen = evaluation.main.zero_shot_alone
    for name, scores in {**evaluation.scores, **({ZERO_SHOT: frozen} if frozen else {})}.items():
        wrong = int((~np.isfinite(scores.tuned)).any(axis=1).sum())
        if wrong:
            raise DataError(
                f"{name}: expected finite logits, came NaN or infinity for {wrong} of "
                f"{len(scores.labels)} images; a model in half precision that overflows does so: "
                "export it as fp32"
            )
    return replace(
        evaluation,
        class_names=[printable(name) for name in evaluation.class_names],
        scores={printable(name): scores for name, scores in evaluation.scores.items()},
        provenance=_printable_values(evaluation.provenance),
        notes=[printable(note) for note in evaluation.notes],
    )


def _printable_values(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): _printable_values(inner) for key, inner in value.items()}
    return [_printable_values(item) for item in value] if isinstance(value, list | tuple) else value
