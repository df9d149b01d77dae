"""Attack the example server, and measure how soon it answers a legitimate client meanwhile.

    python -m benchmarks.server_attacks tests/golden/tiny.capt photo.png

The server may have 200 files open. Attacker and client have addresses of their own (127.0.0.1 and
127.0.0.2, which Linux has without set-up) and share this machine with the server.
"""

import getpass
import http.client
import multiprocessing
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.record import load_average
from benchmarks.server_load import Server, post_file, running_server
from capt_deploy.core.console import Command, PathInHome, print_json, say
from capt_deploy.core.errors import BackendError
from capt_deploy.core.files import write_bytes

PROXY = Path(__file__).parents[1] / "examples" / "server" / "nginx.conf"
_HEAD = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
_CLIENT = ("127.0.0.2", 0)
_SENDERS = 16  # of images, at once


def png_of_16_bits(side: int) -> bytes:
    """Return a PNG of black pixels, 16 bits each: 95 KB for a side of 7,000."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    rows = zlib.compress(bytes(1 + 2 * side) * side, 9)
    header = struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """Return a progressive JPEG whose scans, 10 to 100 bytes each, all pass over every block."""

    def segment(mark: int, content: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, mark, len(content) + 2) + content

    def packed(bits: str) -> bytes:
        bits += "1" * (-len(bits) % 8)
        return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    blocks, run = (-(-side // 8)) ** 2, 2**14
    one_code = bytes([1] + [0] * 15)  # a Huffman table whose only code is 0
    tables = segment(0xDB, b"\0" + b"\x10" * 64)
    tables += segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    tables += segment(0xC4, b"\x00" + one_code + b"\0")
    tables += segment(0xC4, b"\x10" + one_code + b"\xe0")  # the code ends 2^14 blocks
    first = segment(0xDA, b"\1\1\0\0\0\0") + packed("0" * blocks)
    other = segment(0xDA, b"\1\1\0\1\x3f\0") + packed(("0" + "0" * 14) * -(-blocks // run))
    return b"\xff\xd8" + tables + first + other * scans + b"\xff\xd9"


def hold(address: tuple[str, int], connections: int, begin: bytes, drip: bytes) -> None:
    """Keep connections open that send `begin`, then `drip` each second; replace those closed."""
    open_ones: list[socket.socket] = []
    while True:
        for _ in range(connections - len(open_ones)):
            with suppress(OSError):
                one = socket.create_connection(address, timeout=1)
                one.sendall(begin)
                one.setblocking(False)
                open_ones.append(one)
        time.sleep(0.2)
        for one in [*open_ones]:
            try:
                if one.recv(65536):  # an answer
                    continue
            except BlockingIOError:
                with suppress(OSError):
                    one.send(drip)
                continue
            except OSError:
                pass
            one.close()
            open_ones.remove(one)


def send_images(address: tuple[str, int], images: bytes, each: int) -> None:
    """Send requests of `each` copies of an image from 16 connections, again and again."""
    edge = "capt-edge"
    part = f'--{edge}\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'.encode()
    body = (part + images + b"\r\n") * each + f"--{edge}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={edge}"}

    def run() -> None:
        while True:
            with suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(*address, timeout=600)
                connection.request("POST", "/predict", body, headers)
                connection.getresponse().read()
                connection.close()
            time.sleep(0.05)

    for _ in range(_SENDERS - 1):
        threading.Thread(target=run, daemon=True).start()
    run()


def attacks(connections: int) -> dict[str, tuple[Callable[..., None], tuple[Any, ...]] | None]:
    """Return the function and the arguments of each attack, by name; None for no attack."""
    length = b"Content-Length: 100000\r\n\r\n{"
    scans, deep = jpeg_of_scans(7000, 2500), png_of_16_bits(7000)
    return {
        "none": None,
        "idle connections": (hold, (connections, b"", b"")),
        "half-sent heads": (hold, (connections, _HEAD + b"X-A: ", b"a")),
        "half-sent bodies": (hold, (connections, _HEAD + length, b" ")),
        "no HTTP": (hold, (connections, b"\0\r\n\r\n", b"")),
        "JPEG of 2,500 scans": (send_images, (scans, 16)),
        "PNG of 16 bits, 49 Mpx": (send_images, (deep, 16)),
    }


@contextmanager
def under_attack(
    address: tuple[str, int], attack: tuple[Callable[..., None], tuple[Any, ...]] | None
) -> Iterator[None]:
    """Run an attack in a process of its own until the block ends."""
    if attack is None:
        yield
        return
    function, arguments = attack
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=function, args=(address, *arguments), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


@contextmanager
def running_proxy(server: Server, nginx: str) -> Iterator[Server]:
    """Start nginx with examples/server/nginx.conf in front of a server, at a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = write_proxy_config(Path(folder), port, server.port)
        log = Path(folder) / "error.log"
        command = [nginx, "-p", folder, "-e", str(log), "-c", str(config)]
        process = subprocess.Popen([*command, "-g", "daemon off;"])
        try:
            deadline = time.monotonic() + 10
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            else:
                raise BackendError("nginx does not listen")
            yield replace(server, host="127.0.0.1", port=port, log=log)
        finally:
            process.terminate()
            process.wait(20)


def write_proxy_config(folder: Path, port: int, server_port: int) -> Path:
    """Write the example's configuration, for other ports and inside `http`; return the file."""
    text = PROXY.read_text().replace("listen 80 default_server;", f"listen 127.0.0.1:{port};")
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{server_port}")
    text = text.replace("/var/log/nginx/capt.log", str(folder / "error.log"))
    paths = "\n".join(
        f"{kind}_temp_path {folder / kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    head = f"pid {folder / 'pid'};\nevents {{ worker_connections 1024; }}\n"
    if getpass.getuser() == "root":  # else nginx takes another user, who cannot write there
        head += "user root;\n"
    write_bytes(config, f"{head}http {{\n{paths}\n{text}\n}}\n".encode())
    return config


def measure(server: Server, photo: bytes, seconds: float) -> dict[str, Any]:
    """Post a photo every 0.1 s, each time on a new connection; return a row of figures."""
    latencies, failed, end = [], 0, time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        try:
            connection = http.client.HTTPConnection(
                server.host, server.port, timeout=10, source_address=_CLIENT
            )
            failed += post_file(connection, photo)[0] != 200
            connection.close()
        except (OSError, http.client.HTTPException, ValueError):
            failed += 1
        latencies.append((time.perf_counter() - start) * 1000)
        time.sleep(0.1)
    p50, p99 = np.percentile(latencies, (50, 99))
    return {
        "requests": len(latencies),
        "failed": failed,
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "max_ms": round(max(latencies), 1),
    }


def peak_memory_mb(process: int) -> int | None:
    """Return the most memory that a process has held so far; None where unknown."""
    with suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        if found := re.search(r"VmHWM:\s+(\d+)", status):
            return int(found[1]) // 1024
    return None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    head = "| " + " | ".join(rows[0]) + " |"
    lines = ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *lines])


@click.command(cls=Command)
@click.argument("bundle", type=PathInHome())
@click.argument("photo", type=PathInHome())
@click.option("--only", multiple=True, help="Names of attacks; all by default.")
@click.option("--connections", default=260, show_default=True, help="Of the attacker.")
@click.option("--descriptors", default=200, show_default=True, help="Of the server.")
@click.option("--seconds", default=15.0, show_default=True, help="For each attack.")
def main(
    bundle: Path,
    photo: Path,
    only: tuple[str, ...],
    connections: int,
    descriptors: int,
    seconds: float,
) -> None:
    """Attack a server of BUNDLE, alone and behind nginx, while a client posts PHOTO."""
    say(f"load before: {load_average()}")
    image, rows, nginx = photo.read_bytes(), [], shutil.which("nginx")
    if nginx is None:
        say("behind the proxy: left out, as nginx is not installed")
    options = ("--rate", 20, "--proxy", "127.0.0.1")
    for name, attack in attacks(connections).items():
        if only and name not in only:
            continue
        for proxied in (False, True) if nginx else (False,):
            with running_server(bundle, *options, descriptors=descriptors) as server:
                before = server.log.stat().st_size
                with _entrance(server, nginx if proxied else None) as entrance:
                    with under_attack((entrance.host, entrance.port), attack):
                        time.sleep(2)  # until it is under way
                        figures = measure(entrance, image, seconds)
                    logged = server.log.stat().st_size - before
                    logged += entrance.log.stat().st_size if proxied else 0
                row = {"attack": name, "proxy": "nginx" if proxied else "none", **figures}
                row |= {"log_bytes": logged, "peak_mb": peak_memory_mb(server.process.pid)}
                server.process.kill()  # it would first answer what the attacker has sent
            rows.append(row)
            say(str(row))
    print(table(rows))
    print_json({"rows": rows})


@contextmanager
def _entrance(server: Server, nginx: str | None) -> Iterator[Server]:
    if nginx is None:
        yield server
    else:
        with running_proxy(server, nginx) as proxy:
            yield proxy


if __name__ == "__main__":
    main()
