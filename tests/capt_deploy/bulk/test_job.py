"""A real local Ray: jobs are killed and continued, and failures of engines are told."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.ray_predict import Job, compare, finished_parts, kill_at, read_rows
from capt_deploy.bulk.job import label_on_ray
from capt_deploy.bulk.labeller import Labeller, LabelOptions
from capt_deploy.bulk.parts import find_parts
from capt_deploy.bulk.pool import Engines, label_parts
from capt_deploy.bulk.results import Results
from capt_deploy.cli.predict import main
from capt_deploy.core.errors import ConfigError

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
DISTINCT, PHOTOS = 64, 2048
OPTIONS = LabelOptions()


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
    golden: Path, many_photos: Path, tmp_path: Path, cluster: None
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
    done = CliRunner().invoke(main, [str(golden), str(many_photos), "--ray", "--out", str(out)])
    assert done.exit_code == 1, done.output  # for the photo that was cut off
    assert "2,048 images in" in done.stderr and "32 errors" in done.stderr
    assert {name: finished_parts(out)[name] for name in before} == before
    assert not [file for file in out.iterdir() if file.name.endswith(".tmp")]
    single = CliRunner().invoke(main, [str(golden), str(many_photos), "--json"])
    counts = compare(read_rows(out), json.loads(single.stdout))
    assert counts == {"missing": 0, "twice": 0, "different": 0, "errors": PHOTOS // DISTINCT}
    # Nothing is left to do, so that neither an engine nor a cluster is needed.
    assert label_on_ray(golden, parts, str(out), OPTIONS, "nowhere:1").errors == 32
    with pytest.raises(ConfigError, match="changed: photos"):
        label_on_ray(golden, parts[:-1], str(out), OPTIONS)
    with pytest.raises(ConfigError, match="changed: bundle"):
        label_on_ray(golden.with_name("open.capt"), parts, str(out), OPTIONS)


def test_engines_that_fail_or_die_are_told(
    golden: Path, photos: Path, tmp_path: Path, cluster: None
) -> None:
    parts = find_parts([str(photos)])
    results = Results(str(tmp_path / "out"))
    lost = Labeller(tmp_path / "gone.capt", OPTIONS, results, 1)
    (outcome,) = label_parts(parts, lost, Engines(1, 1, 0))
    assert (
        outcome.error == f"{tmp_path / 'gone.capt'}: no such bundle; expected a folder or zip "
        "from capt-export"
    )
