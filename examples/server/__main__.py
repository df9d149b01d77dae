"""Start the server: `python -m examples.server BUNDLE`."""

import socket
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import click

from capt_deploy.core.console import Command, PathInHome, say, warn
from capt_deploy.core.errors import ConfigError
from capt_deploy.core.install import install_hint

_NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
_STOP_SECONDS = 60  # for requests under way, once the server has been told to end


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=PathInHome())
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: any network.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--backend", default="auto", show_default=True, help="As for capt-predict.")
@click.option("--coverage", type=float, help="Coverage of prediction sets, 0-1; 0.9 by default.")
@click.option("--accuracy", type=float, help="Reject what is too unsure for this accuracy, 0-1.")
@click.option("--max-bytes", default=10 * 2**20, show_default=True, help="Largest request.")
@click.option(
    "--max-seconds", default=30.0, show_default=True, help="Longest wait for a head or body."
)
@click.option("--max-pixels", default=50_000_000, show_default=True, help="Largest image.")
@click.option("--max-images", default=16, show_default=True, help="In one request.")
@click.option("--max-requests", default=256, show_default=True, help="At once; 1/8 per client.")
@click.option("--rate", default=20.0, show_default=True, help="Requests/s of a client; 0: any.")
@click.option("--burst", default=40, show_default=True, help="Requests of a client at once.")
@click.option("--max-batch", default=32, show_default=True, help="Images run at once.")
@click.option("--max-wait-ms", default=2.0, show_default=True, help="For a batch to fill.")
@click.option("--max-waiting", default=256, show_default=True, help="Images that may wait.")
@click.option("--proxy", help="Address of a proxy whose X-Forwarded-For is believed.")
def main(
    bundle: Path,
    host: str,
    port: int,
    backend: str,
    coverage: float | None,
    accuracy: float | None,
    max_bytes: int,
    max_seconds: float,
    max_pixels: int,
    max_images: int,
    max_requests: int,
    rate: float,
    burst: int,
    max_batch: int,
    max_wait_ms: float,
    max_waiting: int,
    proxy: str | None,
) -> None:
    """Classify photos over HTTP with a BUNDLE. Ctrl-C or SIGTERM ends the server.

    There is no login and no TLS: put a proxy in front of it wherever others can reach it.

    \b
    Example:
      python -m examples.server pets.capt --port 8000
      curl -F image=@dog.jpg http://127.0.0.1:8000/predict
    """
    _check_installed()
    import numpy as np

    from capt_deploy.confidence.decisions import DecisionOptions
    from capt_deploy.serving.batcher import BatcherOptions
    from capt_deploy.serving.classifier import Classifier
    from examples.server.app import make_app
    from examples.server.connections import IdleConnections, Server, file_descriptors, room
    from examples.server.limits import Limits
    from examples.server.logs import bound_log

    limits = Limits(
        max_bytes, max_seconds, max_pixels, max_images, max_requests, rate=rate, burst=burst
    )
    descriptors = file_descriptors()
    connections, requests = room(max_requests, descriptors)
    if requests < max_requests:
        limits = replace(limits, requests=requests)
        warn(
            f"{requests} requests at once, not {max_requests}: only {descriptors} files may be "
            f"open; raise the limit, with `ulimit -n` for example"
        )
    batcher = BatcherOptions(max_batch, max_wait_ms, max_waiting)
    decisions = DecisionOptions.from_given(coverage=coverage, accuracy=accuracy)
    listener = _bind(host, port)  # before an engine is built, which can take minutes
    with (
        listener,
        Classifier.load(bundle, backend, batcher=batcher, decisions=decisions) as classifier,
    ):
        classifier(np.zeros((8, 8, 3), np.uint8))  # a backend's first run is its slowest
        app = make_app(classifier, limits)
        server = Server(
            app,
            IdleConnections(connections, limits.seconds),
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=proxy is not None,
            forwarded_allow_ips=proxy,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        bound_log()
        say(f"{classifier.backend.name} on {classifier.backend.device}")
        listener.listen()
        shown = f"[{host}]" if ":" in host else host
        say(f"listening on http://{shown}:{listener.getsockname()[1]}")
        with suppress(KeyboardInterrupt):  # uvicorn repeats the signal that it has obeyed
            server.run(sockets=[listener])
    cut_off = app.state.door.cut_off  # by a second Ctrl-C, or after _STOP_SECONDS
    left = f"left without an answer: {cut_off}" if cut_off else "all that waited has been answered"
    say(f"ended; {left}")


def _check_installed() -> None:
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError(f"needs {', '.join(missing)}: {install_hint('server')}")


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as cause:
        raise ConfigError(f"cannot listen on {host} port {port}: {cause}; choose others") from cause
    return listener


if __name__ == "__main__":
    main()
