"""`make demo`: tune, export, evaluate and predict on the embedded pictograms, offline.

Each step is the command that a person would type; it is printed before it runs.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from examples.demo.world import write_world

ROOT = Path(__file__).parents[2]
MODEL = "local-dir:examples/demo/model"
OUT = Path("demo")
DATA, RUN, BUNDLE = OUT / "pictograms", OUT / "run", OUT / "pictograms.capt"


def main() -> None:
    """Run the whole path; the last command that fails decides the exit code."""
    for made_by_last_demo in (RUN, BUNDLE):
        shutil.rmtree(ROOT / made_by_last_demo, ignore_errors=True)
    print(f"rendering pictograms into {DATA}", flush=True)
    write_world(ROOT / DATA)
    photos = sorted((ROOT / DATA / "test").glob("*/0001.png"))[::13]
    pictures = [photo.relative_to(ROOT) for photo in photos]
    _command("capt-train", "--data", DATA, "--model", MODEL, "--classes", "base", "--out", RUN)
    _command("capt-export", RUN, "--out", BUNDLE, "--fp16")
    _command(*("capt-eval", RUN, "--data", DATA, "--exported", BUNDLE, "--report", OUT / "report"))
    _command("capt-confusions", RUN, "--top", 8)
    _command("capt-predict", BUNDLE, *pictures, "--top-k", 3)
    print(f"\nAll of it on one page: {OUT / 'report' / 'report.html'}")
    print(f"The bundle lies in {BUNDLE}. Label more images: capt-predict {BUNDLE} FOLDER")


def _command(name: str, *arguments: object) -> None:
    """Run one of the project's commands in the repository's root; stop where it fails."""
    words = [name, *map(str, arguments)]
    print(f"\n$ {shlex.join(words)}", flush=True)
    executable = Path(sys.executable).with_name(name)
    done = subprocess.run([executable, *words[1:]], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
