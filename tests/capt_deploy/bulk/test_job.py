"""A real local Ray: jobs are killed and continued, and failures of engines are told."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.ray_predict import Job, compare, finished_parts, kill_at, read_rows
from capt_deploy.bulk import job as job_module
from capt_deploy.bulk.job import label_on_ray
from capt_deploy.bulk.labeller import Labeller, LabelOptions
from capt_deploy.bulk.parts import Part, find_parts
from capt_deploy.bulk.pool import Engines, Outcome, label_parts
from capt_deploy.bulk.results import Results
from capt_deploy.cli.predict import main
from capt_deploy.core.errors import BackendError, ConfigError, DataError

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
DISTINCT, PHOTOS = 64, 2048
BACKEND = "onnxruntime-cpu"  # so that floats are the same in all processes
OPTIONS = LabelOptions(BACKEND)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Run a small Ray, as a program does that calls capt from its own."""
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=2**27)
    yield
    ray.shutdown()


@pytest.fixture
def many_photos(tmp_path: Path) -> Path:
    """Return a folder of some photos under many names, one of them cut off."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(DISTINCT):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    (folder / "0007.png").write_bytes((folder / "0007.png").read_bytes()[:100])
    for number in range(DISTINCT, PHOTOS):
        (folder / f"{number:04d}.png").hardlink_to(folder / f"{number % DISTINCT:04d}.png")
    return folder


def test_a_job_that_was_killed_continues_without_losing_or_redoing_a_row(
    golden: Path, many_photos: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    job = Job(golden, many_photos, out, log)
    try:
        kill_at(job, out, 1)
    finally:
        job.kill()
    assert job.processes() == []
    before, parts = finished_parts(out), find_parts([str(many_photos)])
    assert 0 < len(before) < len(parts) == 8, log.read_text()
    request.getfixturevalue("cluster")  # not before, for two of them take longer to start
    asked = [str(golden), str(many_photos), "--backend", BACKEND, "--json"]
    command = [*asked, "--ray", "--out", str(out)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1, done.output  # for the photo that was cut off
    assert json.loads(done.stdout) == {"out": str(out), "images": PHOTOS, "errors": 32}
    assert {name: finished_parts(out)[name] for name in before} == before
    assert not [file for file in out.iterdir() if file.name.endswith(".tmp")]
    single = CliRunner().invoke(main, asked)
    counts = compare(read_rows(out), json.loads(single.stdout))
    assert counts == {"missing": 0, "twice": 0, "different": 0, "errors": PHOTOS // DISTINCT}
    # Nothing is left to do, so that neither an engine nor a cluster is needed.
    assert label_on_ray(golden, parts, str(out), OPTIONS, "nowhere:1").errors == 32
    with pytest.raises(ConfigError, match="changed: photos"):
        label_on_ray(golden, parts[:-1], str(out), OPTIONS)
    with pytest.raises(ConfigError, match="changed: bundle"):
        label_on_ray(golden.with_name("open.capt"), parts, str(out), OPTIONS)


def test_engines_that_fail_or_die_cost_their_part_alone(
    golden: Path, many_photos: Path, tmp_path: Path, cluster: None
) -> None:
    class Trouble(Labeller):  # pickled with its code, as it is local
        def label(self, part: Part) -> None:
            if part.number == 0:
                os._exit(1)
            if part.number == 1:
                raise DataError("no such table")
            super().label(part)

    parts = find_parts([str(many_photos)])[:3]
    labeller = Trouble(golden, OPTIONS, Results(str(tmp_path / "out")), 1)
    dead, failed, good = sorted(label_parts(parts, labeller, Engines(1, 1, 0)))
    assert dead.lost and not dead.error
    assert failed.error == "no such table" and not failed.lost
    assert good.running_on.startswith("onnxruntime on ") and not good.error
    assert [*finished_parts(tmp_path / "out")] == ["part-00002.parquet"]


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (Outcome(0, error="disk full"), "disk full; the same command continues"),
        (Outcome(0, lost=True), r"1 part of at most 4 images killed .*a\.png;.*the same command"),
    ],
)
def test_what_was_not_done_is_told(
    golden: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cluster: None,
    outcome: Outcome,
    message: str,
) -> None:
    monkeypatch.setattr(job_module, "label_parts", lambda *_: iter([outcome]))
    with pytest.raises(BackendError, match=message):
        label_on_ray(golden, find_parts([str(photos)]), str(tmp_path / "out"), OPTIONS)


def test_a_cluster_that_cannot_be_reached_is_told(
    golden: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("127.0.0.1:1", "nowhere:x", "[::1]:99999"):
        with pytest.raises(BackendError, match="expected HOST:PORT of a cluster"):
            label_on_ray(golden, find_parts([str(photos)]), str(tmp_path / "out"), OPTIONS, address)
