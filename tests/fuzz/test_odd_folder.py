"""A thousand photos with every oddity that was met: each has its row, and nothing else ends."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner

from capt_deploy.cli.predict import main

BUNDLE = Path(__file__).parents[1] / "golden" / "tiny.capt"
CORPUS = Path(__file__).with_name("corpus") / "images"
PHOTOS = 1000


@pytest.mark.skipif(os.name != "posix", reason="links, pipes and names that are no text need POSIX")
def test_each_photo_of_an_odd_folder_has_its_row(tmp_path: Path) -> None:
    unreadable = [*(CORPUS / "unreadable").iterdir()]
    elsewhere, folder = tmp_path / "archive", tmp_path / "photos"
    for place in (elsewhere, folder / "@eaDir" / "a.jpg", folder / "run"):
        place.mkdir(parents=True)
    odd = [*(CORPUS / "readable").iterdir(), *unreadable]
    for file in odd:
        shutil.copy(file, folder)
    names = ["line\nbreak.png", unicodedata.normalize("NFD", "é.png"), os.fsdecode(b"caf\xe9.png")]
    for name in names:
        shutil.copy(CORPUS / "readable" / "deep.png", folder / name)
    photo = CORPUS / "readable" / "turned.jpg"
    shutil.copy(photo, folder / "@eaDir" / "a.jpg" / "thumbnail.jpg")
    for name in ("config.json", "split.json", "confusions.png"):
        shutil.copy(photo, folder / "run" / name)
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "self").symlink_to(".")
    (folder / "notes.txt").touch()
    (folder / "day").symlink_to(elsewhere)
    for number in range(PHOTOS - len(odd) - len(names)):
        shutil.copy(photo, elsewhere / f"{number}.jpg")
    done = CliRunner().invoke(main, [str(BUNDLE), str(folder), "--json"])
    assert done.exit_code == 1, done.stderr  # some have errors
    rows = json.loads(done.stdout)
    assert len(rows) == len({row["path"] for row in rows}) == PHOTOS
    failed = {Path(row["path"]).name: row["error"] for row in rows if "error" in row}
    assert set(failed) == {file.name for file in unreadable}
    assert "HEIC" in failed["phone.jpg"] and "format that is known" in failed["postscript.png"]
    for name in ("pipe.png", "gone.png", "self", "@eaDir", "run", ".txt (1)"):
        assert name in done.stderr
