"""Load the example server as its clients would: a process of its own, real sockets, real photos.

    python -m benchmarks.server_load BUNDLE PHOTOS --name "…" --docs

Every answer is compared with the classifier's own. Clients and server share this machine, so the
server alone does better. Rows stay in benchmarks/results/server_load.json.
"""

import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.record import QUIET, add_cells, load_average, load_cells, write_docs
from capt_deploy.core.console import Command, PathInHome, print_json, say
from capt_deploy.core.errors import BackendError, ConfigError, DataError
from capt_deploy.data.images import IMAGE_SUFFIXES
from capt_deploy.serving.classifier import Classifier
from capt_deploy.serving.prediction import Prediction

_ROOT = Path(__file__).parents[1]
_START_SECONDS = 120  # for a backend that has to build an engine
_ANSWER_SECONDS = 60
DOCS = _ROOT / "docs" / "embedding.md"


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    host: str
    port: int
    log: Path

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=_ANSWER_SECONDS)


@contextmanager
def running_server(
    bundle: Path, *options: object, descriptors: int | None = None
) -> Iterator[Server]:
    """Start `python -m examples.server BUNDLE` at a free port; end it as an operator would.

    `descriptors` is how many files it may have open, where not as many as this process.

    Raises:
        BackendError: it ends instead of listening.
    """
    command = [sys.executable, "-m", "examples.server", str(bundle), "--port", "0", "--rate", "0"]
    if descriptors is not None:
        command = ["sh", "-c", f'ulimit -n {descriptors} && exec "$@"', "sh", *command]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*command, *map(str, options)], cwd=_ROOT, stdout=sink, stderr=sink
            )
        try:
            host, port = _wait_until_it_listens(process, log)
            yield Server(process, host, port, log)
        finally:
            process.terminate()
            try:
                process.wait(_ANSWER_SECONDS)
            finally:
                process.kill()


def _wait_until_it_listens(process: subprocess.Popen[bytes], log: Path) -> tuple[str, int]:
    mark, deadline = "listening on http://", time.monotonic() + _START_SECONDS
    while mark not in (text := log.read_text()) or not text.endswith("\n"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise BackendError(f"the server does not listen: {text}")
        time.sleep(0.05)
    host, _, port = text.split(mark)[1].split()[0].rpartition(":")
    return host, int(port)


def post_file(connection: http.client.HTTPConnection, image: bytes) -> tuple[int, Any]:
    """Send one image as a form, as a browser does; return status and JSON."""
    edge = "capt-edge-8f3b1c"
    head = (
        f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="photo"\r\n'
        f"Content-Type: application/octet-stream\r\n\r\n"
    )
    body = head.encode() + image + f"\r\n--{edge}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={edge}"}
    connection.request("POST", "/predict?top_k=1000", body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def tolerance(precision: str) -> float:
    """Return by how much a probability may differ: other batch sizes round differently."""
    return 1e-5 if precision == "fp32" else 1e-3


def is_right(status: int, answer: Any, expected: Prediction, most: float) -> bool:
    """Tell whether an answer equals the classifier's prediction, within `most`."""
    if status != 200 or len(answer["predictions"]) != 1:
        return False
    (came,) = answer["predictions"]
    shares = {row["label"]: row["probability"] for row in came["top"]}
    exact = dict(expected.top(1000))
    close = exact.keys() == shares.keys() and all(
        abs(exact[label] - share) <= most for label, share in shares.items()
    )
    # Either of two classes that are level may be the best one.
    return close and exact[came["label"]] >= expected.confidence - 2 * most


@dataclass(frozen=True)
class Task:
    """Encoded photos, and the classifier's prediction for each."""

    photos: Sequence[bytes]
    expected: Sequence[Prediction]
    most: float  # by which a probability may differ

    @classmethod
    def from_photos(cls, photos: Sequence[bytes], classifier: Classifier) -> "Task":
        return cls(photos, classifier.predict(photos), tolerance(classifier.precision))


@dataclass
class _Tally:
    latencies_ms: list[float]
    lost: int = 0
    wrong: int = 0


def load(server: Server, task: Task, clients: int, each: int) -> dict[str, Any]:
    """Let `clients` at once send `each` requests, one after the other; return a row of figures."""
    tallies = [_Tally([]) for _ in range(clients)]
    ready = threading.Barrier(clients + 1)

    def run(client: int) -> None:
        tally, connection = tallies[client], server.connect()
        ready.wait()
        for number in range(each):
            which = (client * each + number) % len(task.photos)
            start = time.perf_counter()
            try:
                status, answer = post_file(connection, task.photos[which])
            except (OSError, http.client.HTTPException, ValueError):
                tally.lost += 1
                connection.close()  # the next request connects anew
                continue
            tally.latencies_ms.append((time.perf_counter() - start) * 1000)
            tally.wrong += not is_right(status, answer, task.expected[which], task.most)
        connection.close()

    threads = [threading.Thread(target=run, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return _row(tallies, clients * each, clients, time.perf_counter() - start)


def _row(tallies: Sequence[_Tally], requests: int, clients: int, seconds: float) -> dict[str, Any]:
    latencies = [latency for tally in tallies for latency in tally.latencies_ms]
    p50, p99 = np.percentile(latencies, (50, 99)) if latencies else (np.nan, np.nan)
    return {
        "clients": clients,
        "requests": requests,
        "lost": sum(tally.lost for tally in tallies),
        "wrong": sum(tally.wrong for tally in tallies),
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "max_ms": round(max(latencies, default=0.0), 2),
        "throughput_per_s": round(len(latencies) / seconds, 1),
    }


def markdown(cells: Mapping[str, Any]) -> str:
    """Return the table of the docs."""
    head = "| model, backend | clients | requests | lost | wrong | p50 ms | p99 ms | images/s |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for name, cell in cells.items():
        for row in cell["rows"]:
            figures = ("clients", "requests", "lost", "wrong", "p50_ms", "p99_ms")
            shown = " | ".join(str(row[key]) for key in (*figures, "throughput_per_s"))
            lines.append(f"| {name}, {cell['backend']} | {shown} |")
    return "\n".join(lines)


@click.command(cls=Command)
@click.argument("bundle", type=PathInHome())
@click.argument("photos", type=PathInHome())
@click.option("--name", required=True, help="Of the model, in the results.")
@click.option("--clients", default="1,8,32,200", show_default=True, help="At once; several rows.")
@click.option("--requests", default=2000, show_default=True, help="Of all clients of a row.")
@click.option("--most-photos", default=500, show_default=True, type=click.IntRange(1))
@click.option("--docs", is_flag=True, help="Write the table into docs/embedding.md as well.")
def main(
    bundle: Path, photos: Path, name: str, clients: str, requests: int, most_photos: int, docs: bool
) -> None:
    """Load a server of BUNDLE with the PHOTOS of a folder, and print the latencies.

    \b
    Example:
      python -m benchmarks.server_load demo/pictograms.capt demo/pictograms/test --name demo
    """
    load_before, rows = load_average() or 0.0, []
    if docs and load_before > QUIET:
        raise ConfigError(
            f"--docs expects a quiet machine, a load of at most {QUIET}; came {load_before:.2f}: "
            f"wait until nothing else runs, or leave --docs out"
        )
    encoded = _read(photos, most_photos)
    with Classifier.load(bundle) as classifier:
        task = Task.from_photos(encoded, classifier)
        engine = classifier.backend
        backend = f"{engine.name} on {engine.device}, {classifier.precision}"
    with running_server(bundle) as server:
        load(server, task, 8, 10)  # until everything is warm
        for number in map(int, clients.split(",")):
            rows.append(load(server, task, number, max(1, requests // number)))
            say(json.dumps(rows[-1]))
    cell = {"backend": backend, "photos": len(encoded), "load_before": round(load_before, 1)}
    cell |= {"rows": rows}
    add_cells("server_load", {name: cell})
    if docs:
        write_docs(DOCS, "server load", markdown(load_cells("server_load")))
    print_json(cell)


def _read(folder: Path, most: int) -> list[bytes]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{folder}: expected images, found none")
    return [path.read_bytes() for path in files[:: -(-len(files) // most)]]  # of all classes


if __name__ == "__main__":
    main()
