"""Links of the documentation lead somewhere, and its tables are made from the code.

`python -m tests.test_docs` writes the table of settings into docs/training.md.
"""

import re
from dataclasses import MISSING
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    missing = [str(page.relative_to(ROOT)) for page in PAGES]
    assert [name for name in missing if name not in navigation] == []


def settings_table() -> str:
    """Return the table of all settings: name, meaning, type, default."""
    from capt_train.config import settings

    lines = ["| setting | meaning | type | default |", "|---|---|---|---|"]
    for entry in settings().values():
        option = f"`{entry.option}`, " if entry.option else ""
        name = f"{option}`{entry.name}`" if "." in entry.name else f"`{entry.option or entry.name}`"
        text = entry.help.replace("|", "\\|")
        default = "required" if entry.default is MISSING else entry.default_text or "-"
        lines.append(f"| {name} | {text} | {entry.type_name} | {default} |")
    return "\n".join(lines)


def test_training_lists_every_setting() -> None:
    pytest.importorskip("torch")
    assert settings_table() in (ROOT / "docs" / "training.md").read_text()


if __name__ == "__main__":
    from benchmarks.record import write_docs

    write_docs(ROOT / "docs" / "training.md", "settings", settings_table())
