"""`make demo`: tune, export, evaluate and predict on the embedded pictograms, offline.

Each step is the command that a person would type; it is printed before it runs.
"""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from examples.demo.vocabulary import natural_name
from examples.demo.world import NAMES, write_world

ROOT = Path(__file__).parents[2]
MODEL = "local-dir:examples/demo/model"
OUT = Path("demo")
DATA, RUN, BUNDLE = OUT / "pictograms", OUT / "run", OUT / "pictograms.capt"


def main() -> None:
    """Run all commands in order; stop at the first that fails, with its exit code."""
    for previous in (RUN, BUNDLE, OUT / "report"):
        shutil.rmtree(ROOT / previous, ignore_errors=True)
    print(f"drawing pictograms into {DATA}", flush=True)
    write_world(ROOT / DATA)
    data = ("--data", DATA, "--class-names", DATA / NAMES)
    _run("capt-train", *data, "--model", MODEL, "--classes", "base", "--out", RUN)
    _run("capt-export", RUN, "--out", BUNDLE, "--fp16")
    _run("capt-eval", RUN, "--data", DATA, "--exported", BUNDLE, "--report", OUT / "report")
    _run("capt-confusions", RUN, "--top", 8)
    pictures = [
        path.relative_to(ROOT) for path in sorted((ROOT / DATA / "test").glob("*/0001.png"))
    ]
    _show_three(json.loads(_run("capt-predict", BUNDLE, *pictures, "--json", output=True)))
    print(f"\nThe report: {OUT / 'report' / 'report.html'}")
    print(f"The bundle: {BUNDLE}. Label more images: capt-predict {BUNDLE} FOLDER")


def _run(name: str, *arguments: object, output: bool = False) -> str:
    """Run a command in the repository's root; return its standard output if `output`."""
    words = [name, *map(str, arguments)]
    shown = words if len(words) < 20 else [*words[:3], "…", *words[-1:]]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    done = subprocess.run(
        [Path(sys.executable).with_name(name), *words[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE if output else None,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def _show_three(rows: list[dict[str, object]]) -> None:
    """Print two right predictions and a wrong one with their true labels."""
    verdicts: dict[bool, list[str]] = {True: [], False: []}
    for row in rows:
        folder = Path(str(row["path"])).parent.name
        true = natural_name(folder.replace("_", " "))
        right = row["label"] == true
        text = f"{row['path']}: {row['label']} ({row['confidence']:.0%})"
        verdicts[right].append(f"{text}, right" if right else f"{text}, wrong: it is a {true}")
    print(f"{len(verdicts[True])} of {len(rows)} pictures are labelled right, for example")
    print("\n".join(f"  {line}" for line in (*verdicts[True][:2], *verdicts[False][:1])))


if __name__ == "__main__":
    main()
