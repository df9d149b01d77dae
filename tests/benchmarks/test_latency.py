"""Plain open_clip and the exported graph are measured doing the same thing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import latency
from benchmarks.exported import Exported
from benchmarks.latency_tables import docs_table, readme_line, text_of
from benchmarks.record import load_cells
from capt_deploy.bench.cases import BenchRequest
from capt_deploy.bench.compare import compare_rows
from capt_deploy.bench.measure import BenchOptions
from capt_train.pipeline import train
from export.writer import export_run
from tests.configs import train_config

QUICK = BenchOptions(seconds=0.02, rounds=2, min_runs=2, warm_up_seconds=0.02)


@pytest.fixture(scope="module")
def exported(
    tiny_model_dir: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """Return a tiny model with the hand-written prompt, as benchmarks/exported.py makes them."""
    folder = tmp_path_factory.mktemp("exported")
    config = train_config(data=str(photos), model=f"local-dir:{tiny_model_dir}", method="zeroshot")
    train(config, folder / "run")
    return Exported(tiny_model_dir, export_run(folder / "run", folder / "tiny.capt"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_rows_of_both_stand_in_one_table(exported: Exported) -> None:
    scopes = ("host", "image_to_label")
    request = BenchRequest(("onnxruntime-cpu",), ("fp32",), (1, 3), scopes, threads=1)
    plain = latency.Comparison(request, plain_precisions=("fp32", latency.AUTOCAST), compiled=False)
    cell = latency.compare(exported, plain, QUICK)
    rows = cell["rows"]
    assert [(row["backend"], row["precision"], row["scope"], row["batch"]) for row in rows] == [
        (backend, precision, scope, batch)
        for backend, precision in (
            *(("onnxruntime", "fp32"), ("open_clip eager", "fp32")),
            ("open_clip eager", latency.AUTOCAST),
        )
        for scope in request.scopes
        for batch in request.batches
    ]
    assert rows[-1]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert not compare_rows(rows, rows).failed  # they have the form of capt-bench's
    by_key = {(row["backend"], row["precision"], row["scope"], row["batch"]): row for row in rows}
    assert len(cell["ratios"]) == len(rows)
    for one in cell["ratios"]:
        place = (one["scope"], one["batch"])
        own = by_key[(one["backend"], one["precision"], *place)]
        plain = by_key[("open_clip eager", "fp32", *place)]
        assert one["ratio"] == pytest.approx(own["throughput_per_s"] / plain["throughput_per_s"])
    assert cell["same_labels"] == {"onnxruntime-cpu fp32": 1.0}
    assert cell["auto"]["precision"] == "fp32" and cell["auto"]["gate"] == {"fp32": True}
    assert cell["load_before"] is None  # only who began it knows
    loaded = latency.compare(exported, latency.Comparison(request, compiled=False), QUICK, 0.25)
    assert loaded["load_before"] == 0.25
    text = text_of("tiny", cell)
    assert "fp32 batch 1: 1.5" in text and "auto takes " in text


def test_the_docs_show_what_was_measured() -> None:
    cells = load_cells(latency.NAME)
    assert docs_table(cells) in latency.DOCS.read_text()
    assert readme_line(cells["ViT-B/16"]) in latency.README.read_text()
