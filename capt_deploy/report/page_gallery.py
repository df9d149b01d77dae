"""The section of the page that shows images."""

from capt_deploy.report.contents import Contents
from capt_deploy.report.gallery import SMALL, Bars, Card, Group
from capt_deploy.report.markup import Markup, element, given
from capt_deploy.report.texts import counted, percent


def gallery_section(contents: Contents) -> list[Markup]:
    """Return the groups of images, each with the most probable classes of both models."""
    text = (
        "The heading of an image is its true class, which ✓ marks among the bars. These are the "
        "three most probable of all classes, and the true one where it is none of them."
    )
    return [
        element("p", text),
        *(part for group in contents.gallery for part in _group(group)),
    ]


def _group(group: Group) -> list[Markup]:
    title = element("h3", f"{group.title}: {counted(group.images)}")
    if not group.cards:
        return [title, element("p", "None.", class_="soft")]
    return [
        title,
        element("p", group.what, class_="soft"),
        element("ul", *map(_card, group.cards), class_="cards"),
    ]


def _card(card: Card) -> Markup:
    return element(
        "li",
        element(
            "header",
            _picture(card),
            element(
                "div",
                element("b", given(card.true)),
                element("span", given(card.file)),
            ),
        ),
        *(part for name, bars in card.bars.items() for part in _bars(name, bars, card.true)),
        class_="card",
    )


def _picture(card: Card) -> Markup:
    if card.picture is None or card.size is None:
        return element("div", "cannot be read", class_="photo")
    tiny = " tiny" if max(card.size) <= SMALL else ""
    return element("img", src=card.picture, alt=f"{card.true}: {card.file}", class_=f"photo{tiny}")


def _bars(name: str, bars: Bars, true: str) -> list[Markup]:
    parts = []
    for label, share in bars:
        kind = " right" if label == true else ""
        mark = "✓ " if label == true else ""
        rect = element("rect", width=round(100 * share, 1), height=6)
        bar = element(
            "svg",
            rect,
            class_=f"bar{kind}",
            viewBox="0 0 100 6",
            preserveAspectRatio="none",
            aria_hidden="true",
        )
        parts += [
            element("dt", mark, given(label), class_=kind.strip() or None),
            element("dd", bar),
            element("dd", f"{percent(share)} %"),
        ]
    return [element("h4", given(name)), element("dl", *parts, class_="bars")]
