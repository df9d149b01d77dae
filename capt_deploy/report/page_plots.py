"""The sections of the page that hold plots."""

from base64 import b64encode

import numpy as np

from capt_deploy.report.classes import confusion_counts
from capt_deploy.report.contents import Contents
from capt_deploy.report.data import ReportData
from capt_deploy.report.markup import Markup, element, given, scroll, table
from capt_deploy.report.measure import Model
from capt_deploy.report.order import confused_order
from capt_deploy.report.plots import (
    FEW,
    MOST_CLASSES,
    draw_confusions,
    draw_reliability,
    draw_risks,
)
from capt_deploy.report.texts import SCOPE_NAMES, pair_table, percent


def reliability_section(contents: Contents) -> list[Markup]:
    """Return a diagram for each scope, of the zero-shot model and of the main one."""
    figures = [
        _reliability_figure(model, scope)
        for model in filter(None, (contents.zero_shot, contents.main))
        for scope in model.after
    ]
    text = (
        "A model whose confidence can be believed lies on the diagonal: of its predictions with "
        "confidence 0.8, 80 of 100 are right. Below the diagonal it is too sure of itself. Drawn "
        "before and after calibration. Whiskers are 95 % intervals; small marks without a line "
        f"stand for fewer than {FEW} images. Beneath: how many images have which confidence."
    )
    return [element("p", text), element("div", *figures, class_="plots")]


def _reliability_figure(model: Model, scope: str) -> Markup:
    before = model.report["uncalibrated"][scope]["ece_15"]
    after, chance = model.report[scope]["ece_15"], model.chance[scope][0]
    text = (
        f", {SCOPE_NAMES[scope]} classes: ECE {percent(after)} %, before calibration "
        f"{percent(before)} %; chance alone {percent(chance)} %"
    )
    svg = draw_reliability(model.before[scope], model.after[scope])
    return _figure(model.name, text, svg, "Reliability diagram.")


def _figure(name: str, text: str, svg: bytes, kind: str) -> Markup:
    return element(
        "figure",
        element("figcaption", element("b", given(name)), text),
        _plot(svg, f"{kind} {name}{text}"),
    )


def _plot(svg: bytes, alt: str) -> Markup:
    url = f"data:image/svg+xml;base64,{b64encode(svg).decode()}"
    return element("img", src=url, alt=alt, class_="plot")


def risk_section(contents: Contents) -> list[Markup]:
    """Return curves of all models, a plot for each scope."""
    figures = []
    for scope in contents.main.after:
        areas = {model.name: model.report[scope]["aurc"] for model in contents.models}
        svg = draw_risks({model.name: model.risks[scope] for model in contents.models}, areas)
        listed = ", ".join(f"{name} {area:.3f}" for name, area in areas.items())
        title = f"{SCOPE_NAMES[scope].capitalize()} classes"
        figures.append(_figure(title, "", svg, f"Risk over coverage. AURC: {listed}."))
    text = (
        "Who answers only where the model is most confident makes fewer mistakes: to the left few "
        "images are answered, at the right all of them. Lower is better; the number before a name "
        "is the area under its curve (AURC)."
    )
    return [element("p", text), element("div", *figures, class_="plots")]


def confusion_section(data: ReportData, contents: Contents) -> list[Markup]:
    """Return the matrix of the main model, and the pairs that it confuses most."""
    name, classes = contents.main.name, len(data.class_names)
    if not contents.pairs:
        return [element("p", f"{name} takes no image for another class.")]
    counts = confusion_counts(contents.joint.labels, contents.joint.main)
    order = confused_order(counts, MOST_CLASSES)
    mined = np.zeros(counts.shape, bool)
    for true, taken in data.pairs:
        mined[true, taken] = True
    inside = np.ix_(order, order)
    # The shares are of all images of a class, also of those taken for a class that is not shown.
    svg = draw_confusions(
        counts[inside],
        counts.sum(axis=1)[order],
        [data.class_names[i] for i in order],
        mined[inside],
    )
    which = "" if len(order) == classes else f" The {len(order)} most confused of {classes:,}."
    text = (
        f"What {name} takes the images of each class for, among all classes; the more contrast, "
        "the larger the share of the class. Classes that are confused often stand together."
        f"{which}"
        + (" Pairs that were mined from the training images are framed." if data.pairs else "")
    )
    header, rows = pair_table(contents)
    caption = f"The pairs that {name} confuses most, in images."
    return [
        element("p", text),
        scroll(
            "Confusion matrix",
            _plot(svg, f"Confusion matrix of {name}, see the table below"),
        ),
        table(caption, header, rows, {"zero-shot", name}),
    ]
