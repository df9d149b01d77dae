"""HTML out of Python values: whatever is not markup already gets escaped."""

from collections.abc import Iterable, Sequence
from html import escape


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


_VOID = ("img", "meta", "br")


def element(name: str, /, *content: str, **attributes: str | int | float | None) -> Markup:
    """Return an element; content is escaped unless it is markup, attributes always are.

    Args:
        name: of the element.
        content: its children, in their order.
        attributes: those that are None are left out. `class_` means `class`; underscores within
            names become hyphens.
    """
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{named}>" + ("" if name in _VOID else f"{join(content)}</{name}>"))


def join(content: "list[str] | tuple[str, ...]") -> Markup:
    """Return these one after the other, escaped unless they are markup."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in content))


def given(text: str) -> Markup:
    """Return a text of the user's, whose direction of writing does not touch what is around it."""
    return element("bdi", text)


def table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], numbers: set[str]
) -> Markup:
    """Return a table whose first column names the row."""
    kinds = ["number" if title in numbers else "name" for title in header]
    titles = [
        element("th", title, scope="col", class_=kind)
        for title, kind in zip(header, kinds, strict=True)
    ]
    lines = [
        element(
            "tr",
            element("th", given(row[0]), scope="row", class_="name"),
            *(
                element("td", given(text), class_=kind)
                for text, kind in zip(row[1:], kinds[1:], strict=True)
            ),
        )
        for row in rows
    ]
    head = element("thead", element("tr", *titles))
    return scroll(
        caption, element("table", element("caption", caption), head, element("tbody", *lines))
    )


def scroll(label: str, content: Markup) -> Markup:
    """Let what is too wide be scrolled, by keyboard as well."""
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)
