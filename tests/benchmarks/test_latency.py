"""Plain open_clip and the exported graph are measured doing the same thing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import latency
from benchmarks.exported import Exported
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
    cell = latency.compare(exported, latency.Comparison(request, compiled=False), QUICK)
    rows = cell["rows"]
    assert [(row["backend"], row["scope"], row["batch"]) for row in rows] == [
        (backend, scope, batch)
        for backend in ("onnxruntime", "open_clip eager")
        for scope in request.scopes
        for batch in request.batches
    ]
    assert rows[-1]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert not compare_rows(rows, rows).failed  # they have the form of capt-bench's
    by_key = {(row["backend"], row["scope"], row["batch"]): row for row in rows}
    assert len(cell["ratios"]) == len(rows)
    for one in cell["ratios"]:
        place = (one["scope"], one["batch"])
        own, plain = (by_key[(name, *place)] for name in (one["backend"], "open_clip eager"))
        assert one["ratio"] == pytest.approx(own["throughput_per_s"] / plain["throughput_per_s"])
    assert cell["same_labels"] == {"fp32": 1.0}
    assert cell["load_before"] is None  # only who began it knows
    loaded = latency.compare(exported, latency.Comparison(request, compiled=False), QUICK, 0.25)
    assert loaded["load_before"] == 0.25
    text = latency.text_of("tiny", cell)
    assert len(text.splitlines()) == 2 + len(rows) + 1


def test_the_readme_shows_what_was_measured() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name, measured in load_cells(latency.NAME).items():
        own = {(one["backend"], one["precision"], one["batch"]): one for one in measured["rows"]}
        factors = {
            (one["backend"], one["precision"], one["batch"]): one["ratio"]
            for one in measured["ratios"]
        }
        figures = []
        for batch in (1, 32):
            key = ("onnxruntime", "fp32", batch)
            figures += [f"{own[key]['throughput_per_s']:.1f}", f"{factors[key]:.2f}"]
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| {name}, ")]
        assert [text.strip() for text in line.strip("|").split("|")][1:] == figures
