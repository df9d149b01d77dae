"""What docs/export.md shows is what was measured, and the gate's own limits."""

from typing import Any

import pytest

from benchmarks import export_matrix

DOCS = export_matrix.DOCS.read_text()


def row(family: str, precision: str, **changes: Any) -> dict[str, Any]:
    gate = {
        "top1_agreement": 0.984375,
        "images": 64,
        "max_logit_difference": 0.02,
        "embedding_cosine": 0.99999,
        "passed": True,
    }
    engines = {"75": {"built": False, "reason": "no"}, "80": {"built": True, "bytes": 1}}
    own = {
        "family": family,
        "precision": precision,
        "gate": gate,
        "graph": {"nodes": 100, "weight_bytes": 172e6},
        "engines": engines,
        "seconds": 50.2,
        "peak_bytes": 2.2e9,
        "weight_bytes_float32": 0.6e9,
    }
    return {**own, **changes}


def test_a_row_tells_what_was_proved_and_what_was_built() -> None:
    rows = {
        "b": row("ViT-B/32", "fp16"),
        "a": row("ViT-B/32", "fp32", gate={**row("", "")["gate"], "passed": False}),
    }
    *_, first, second = export_matrix.markdown(rows).splitlines()
    cells = [cell.strip() for cell in second.strip("|").split("|")]
    assert cells == [
        *("ViT-B/32", "fp16", "98.4 % of 64", "2.0e-02", "0.99999", "passed", "100"),
        *("172", "50", "3.7", "80"),
    ]
    assert "| fp32 |" in first and "FAILED" in first


@pytest.mark.parametrize(
    "text", [export_matrix.markdown(export_matrix.load()), export_matrix.limits()]
)
def test_the_docs_show_it(text: str) -> None:
    assert text in DOCS


def test_what_failed_its_gate_is_said_to_be_refused() -> None:
    rows = export_matrix.load()
    assert rows and {row["family"] for row in rows.values()} <= set(export_matrix.FAMILIES)
    for row in rows.values():
        said = f"{row['precision']} of {row['family']}" in DOCS
        assert row["gate"]["passed"] != said
