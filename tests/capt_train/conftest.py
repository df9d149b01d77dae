"""Configurations and arguments of the tiny run, one that is finished, and an LLM to ask."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from capt_train.config import TrainConfig
from capt_train.pipeline import train
from tests.configs import train_config


@pytest.fixture(scope="session")
def configure(photos: Path, tiny_model_dir: Path) -> Callable[..., TrainConfig]:
    """Return a function that makes the configuration of a run of a second, of prompts alone."""

    def configure(**settings: Any) -> TrainConfig:
        tiny = {
            "shots": 3,
            "tuning_epochs": 3,
            "tuning_warmup_epochs": 1,
            "visual_epochs": 2,
            "device": "cpu",
        }
        own: dict[str, Any] = {"data": str(photos), "model": f"local-dir:{tiny_model_dir}"}
        return train_config(**{"method": "prompt", **own, **tiny, **settings})

    return configure


@pytest.fixture(scope="session")
def finished(
    configure: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a finished run of prompts alone, on the base classes; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(configure(classes="base"), folder)
    return folder


@pytest.fixture(scope="session")
def default_run(
    configure: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Path]:
    """Return settings and folder of a run that held-out photos have chosen; its prompt is pinned.

    Tests only read it.
    """
    config = configure(method="capt", shots=None, classes="base", added=("prompt",))
    run = tmp_path_factory.mktemp("runs") / "default"
    train(config, run)
    return config, run


@pytest.fixture
def inputs(photos: Path, tiny_model_dir: Path) -> list[str]:
    """Return the arguments of a run of a second, of a prompt alone, all but --shots and --out."""
    arguments = ["--data", str(photos), "--model", f"local-dir:{tiny_model_dir}"]
    arguments += ["--method", "coop"]
    few = ["--epochs", "2", "--set", "visual.epochs=1", "--set", "visual.views=2"]
    return [*arguments, "--device", "cpu", *few]


@pytest.fixture
def base(inputs: list[str]) -> list[str]:
    """Return the arguments of a run of a second, all but --out."""
    return [*inputs, "--shots", "3"]


class LlmServer:
    """Answers POSTs with the given replies in turn, then as usual; remembers what was asked.

    A reply is `(code, body, headers)`, with _ for - in the names of headers, or a function that
    gets the handler.
    """

    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.usual: Any = (404, "", {})
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.title(): value for name, value in self.headers.items()}
                server.requests.append((self.path, headers, body))
                self.reply(server.replies.pop(0) if server.replies else server.usual)

            def do_GET(self) -> None:
                server.requests.append((self.path, dict(self.headers), {}))
                self.reply(server.usual)

            def reply(self, reply: Any) -> None:
                if callable(reply):
                    reply(self)
                    return
                code, body, headers = reply
                self.send_response(code)
                for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def llm_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LlmServer]:
    """Return a real HTTP server on this machine that stands for an LLM's endpoint."""
    monkeypatch.setenv("NO_PROXY", "*")
    running = LlmServer()
    yield running
    running.close()
