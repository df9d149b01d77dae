"""The example configuration of nginx: what it says, that nginx takes it, and that it works."""

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.server_attacks import PROXY, running_proxy, write_proxy_config
from benchmarks.server_load import Server, post_file, running_server
from examples.server.__main__ import main
from examples.server.limits import Limits
from tests.examples.clients import FORM, form, get, picture, send

TEXT = re.sub(r"#.*", "", PROXY.read_text())
GOOD = picture(0)


def setting(name: str) -> str:
    """Return the value of a setting that occurs once."""
    (value,) = re.findall(rf"^\s*{name}\s+([^;]+);", TEXT, re.MULTILINE)
    return str(value)


@pytest.fixture(scope="module")
def nginx() -> str:
    if (found := shutil.which("nginx")) is None:
        pytest.skip("nginx is not installed")
    return found


@pytest.fixture(scope="module")
def proxied(server_extra: None, golden: Path, nginx: str) -> Iterator[Server]:
    options = ("--rate", 20, "--proxy", "127.0.0.1")
    with running_server(golden, *options) as server, running_proxy(server, nginx) as proxy:
        yield proxy


def test_it_agrees_with_the_servers_own_limits() -> None:
    limits = Limits()
    assert setting("client_max_body_size") == f"{limits.body_bytes // 2**20}m"
    assert f"rate={limits.rate:g}r/s" in setting("limit_req_zone")
    assert setting("limit_req") == f"zone=capt_requests burst={limits.burst} nodelay"
    assert setting("limit_conn") == f"capt_connections {limits.requests_of_a_client}"
    port = next(option.default for option in main.params if option.name == "port")
    assert re.findall(r"server ([\d.:]+);", TEXT) == [f"127.0.0.1:{port}"]


def test_it_bounds_time_log_and_what_clients_say_of_themselves() -> None:
    for name in ("client_header_timeout", "client_body_timeout", "send_timeout"):
        assert int(setting(name).removesuffix("s")) <= Limits().seconds
    assert setting("access_log") == "off"
    assert setting("error_log").endswith(" crit")
    forwarded = re.findall(r"proxy_set_header X-Forwarded-For ([^;]+);", TEXT)
    assert forwarded == ["$remote_addr"] * len(re.findall(r"proxy_pass ", TEXT))
    assert TEXT.count("{") == TEXT.count("}")


def test_nginx_takes_it(nginx: str, tmp_path: Path) -> None:
    config = write_proxy_config(tmp_path, 8080, 8000)
    command = [nginx, "-t", "-p", str(tmp_path), "-e", str(tmp_path / "log"), "-c", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr


def test_behind_it_photos_are_answered_and_the_rest_refused(proxied: Server) -> None:
    assert post_file(proxied.connect(), GOOD)[0] == 200
    status, answer, _ = send(proxied, form(b"x" * 11 * 2**20), FORM)
    assert (status, answer["error"]) == (413, "expected a body of at most 10 MiB")
    assert get(proxied, "/healthz")[0] == 200
    burst = [post_file(proxied.connect(), GOOD)[0] for _ in range(60)]
    assert {*burst} <= {200, 429}
    assert burst[:20] == [200] * 20


def test_it_sends_half_sent_heads_away(proxied: Server) -> None:
    client = socket.create_connection((proxied.host, proxied.port), timeout=20)
    client.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\n")
    start = time.monotonic()
    with suppress(ConnectionResetError):
        assert client.recv(4096) == b""
    assert 8 < time.monotonic() - start < 15
    client.close()
