"""Everything that a report says, in whichever form."""

from dataclasses import dataclass

from capt_deploy.report.classes import (
    ClassRow,
    ConfusedPair,
    Joint,
    class_rows,
    confused_pairs,
    joint,
)
from capt_deploy.report.data import ReportData
from capt_deploy.report.gallery import Group, gallery
from capt_deploy.report.measure import Model, measure
from capt_deploy.report.promises import Promise, promises


@dataclass(frozen=True, eq=False)
class Contents:
    """What is found in the data; see the types."""

    models: list[Model]
    main: Model
    zero_shot: Model | None
    joint: Joint
    pairs: list[ConfusedPair]
    gallery: list[Group]
    classes: list[ClassRow]
    promises: list[Promise]


def find_contents(data: ReportData) -> Contents:
    """Measure all models, and pick the images and pairs to show."""
    models = {model.name: measure(data, model) for model in data.models}
    found = joint(data)
    return Contents(
        list(models.values()),
        models[data.main.name],
        None if data.zero_shot is None else models[data.zero_shot.name],
        found,
        confused_pairs(data, found),
        gallery(data, found),
        class_rows(data, found),
        promises(data),
    )
