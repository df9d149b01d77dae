"""Plain open_clip and the exported graph are measured doing the same thing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import latency
from benchmarks.exported import Exported
from benchmarks.plain_open_clip import PlainOpenClip, same_labels
from benchmarks.record import load_cells
from capt_deploy.bench.cases import Photos, Wanted
from capt_deploy.bench.compare import compare_rows
from capt_deploy.bench.images import synthetic_photos
from capt_deploy.bench.measure import BenchOptions
from capt_deploy.serving.classifier import Classifier
from capt_train.config import TrainConfig
from capt_train.pipeline import train
from export.writer import export_run

QUICK = BenchOptions(seconds=0.02, rounds=2, least=2, warm_up_seconds=0.02)


@pytest.fixture(scope="module")
def exported(
    tiny_model_dir: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """Return a tiny model with the hand-written prompt, as benchmarks/exported.py makes them."""
    folder = tmp_path_factory.mktemp("exported")
    config = TrainConfig(data=str(photos), model=f"local-dir:{tiny_model_dir}", method="zeroshot")
    train(config, folder / "run")
    return Exported(tiny_model_dir, export_run(folder / "run", folder / "tiny.capt"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_both_say_the_same_of_every_photo(exported: Exported) -> None:
    encoded = synthetic_photos(4)
    plain = PlainOpenClip(exported.model, exported.bundle, "cpu")
    own = Classifier.load(exported.bundle, "onnxruntime-cpu").predict(encoded)
    assert plain.label(encoded) == [prediction.label for prediction in own]
    # The bundle's confidences are calibrated, but in the same order.
    for row, prediction in zip(plain.probabilities(plain.load(encoded)), own, strict=True):
        assert row.argsort().tolist() == prediction.probabilities.argsort().tolist()


@pytest.mark.usefixtures("one_thread")
def test_rows_of_both_stand_in_one_table(exported: Exported) -> None:
    wanted = Wanted(("onnxruntime-cpu",), ("fp32",), (1, 3), ("host", "image_to_label"), threads=1)
    cell = latency.compare(exported, latency.Comparison(wanted, compiled=False), QUICK)
    rows = cell["rows"]
    assert [(row["backend"], row["scope"], row["batch"]) for row in rows] == [
        (backend, scope, batch)
        for backend in ("onnxruntime", "open_clip eager")
        for scope in wanted.scopes
        for batch in wanted.batches
    ]
    assert rows[-1]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert not compare_rows(rows, rows).regressed  # they have the form of capt-bench's
    by_key = {(row["backend"], row["scope"], row["batch"]): row for row in rows}
    assert len(cell["ratios"]) == len(rows)
    for one in cell["ratios"]:
        place = (one["scope"], one["batch"])
        own, plain = by_key[one["backend"], *place], by_key["open_clip eager", *place]
        assert one["ratio"] == pytest.approx(own["throughput_per_s"] / plain["throughput_per_s"])
    assert cell["same_labels"] == {"fp32": 1.0}
    assert cell["load_before"] is None  # only who began it knows
    loaded = latency.compare(exported, latency.Comparison(wanted, compiled=False), QUICK, 0.25)
    assert loaded["load_before"] == 0.25
    text = latency.text_of("tiny", cell)
    assert len(text.splitlines()) == 2 + len(rows) + 1


def test_a_row_is_divided_by_open_clip_in_its_own_precision() -> None:
    def row(backend: str, precision: str, speed: float, batch: int = 1) -> dict[str, Any]:
        own = {"scope": "host", "device": "d", "batch": batch, "throughput_per_s": speed}
        times = {"p50_ms": 1.0, "p99_ms": 1.0, "iterations": 100}
        return {"backend": backend, "precision": precision, **own, **times}

    rows = [
        row("tensorrt", "fp16", 60.0),
        row("tensorrt", "int8", 90.0),
        row("open_clip eager", "fp32", 10.0),
        row("open_clip eager", "fp16", 40.0),
        row("open_clip compiled", "fp16", 50.0),
        row("tensorrt", "fp16", 1.0, batch=8),
    ]
    found = [(one["ratio"], one["eager_precision"]) for one in latency.ratios(rows)]
    assert found == [(1.5, "fp16"), (9.0, "fp32"), (1.0, "fp32"), (1.0, "fp16"), (1.25, "fp16")]
    lines = latency.text_of("x", {"rows": rows, "ratios": latency.ratios(rows)}).splitlines()
    assert lines[2].endswith("1.50") and lines[-2].endswith("1.00")  # nothing to divide by


def test_labels_are_compared_of_what_was_measured(exported: Exported) -> None:
    photos = Photos(synthetic_photos(4), "x")
    both = (exported.model, exported.bundle, "cpu", photos)
    row = {"backend": "onnxruntime", "device": "cpu", "precision": "fp32"}
    rows = [row, row, {**row, "backend": "open_clip eager"}]
    assert same_labels(*both, rows) == {"fp32": 1.0}
    assert same_labels(*both, rows[2:]) == {}


def test_rows_of_few_runs_are_named() -> None:
    row = {"backend": "onnxruntime", "device": "cpu", "scope": "image_to_label", "p99_ms": 2.0}
    own = {"precision": "fp32", "p50_ms": 1.0, "throughput_per_s": 9.0}
    rows = [{**row, **own, "batch": n, "iterations": m} for n, m in ((1, 20), (32, 19))]
    text = latency.text_of("x", {"rows": rows, "ratios": []})
    assert text.endswith("; fewer than 20 runs: onnxruntime cpu fp32 32")
    assert "fewer" not in latency.text_of("x", {"rows": rows[:1], "ratios": []})


def ratio(precision: str, batch: int, value: float, **own: Any) -> dict[str, Any]:
    plain = {"backend": "onnxruntime", "scope": "image_to_label", "device": "cpu"}
    return {**plain, "precision": precision, "batch": batch, "ratio": value, **own}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([ratio("fp32", 1, 1.6), ratio("fp32", 32, 1.1)], ("reached (1.60", ": none")),
        ([ratio("fp32", 1, 1.2), ratio("int8", 1, 1.7)], ("reached (1.70", ": none")),
        ([ratio("fp32", 1, 1.4), ratio("fp32", 32, 0.9)], ("missed (1.40", ": fp32 batch 32")),
        ([ratio("fp32", 1, 9.0, backend="open_clip compiled")], ("missed (not", ": none")),
        ([ratio("fp32", 1, 9.0, scope="host")], ("missed (not measured)", ": none")),
    ],
)
def test_the_verdict_is_about_images_to_labels(
    found: list[dict[str, Any]], said: tuple[str, str]
) -> None:
    line = latency.verdict(found)
    assert all(part in line for part in said)


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
