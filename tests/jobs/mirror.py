"""A mirror on this machine that fails in every way, a data set in MNIST's format for it, and what its tests look at."""

import contextlib
import gzip
import hashlib
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from diffusion.data.mnist import MNIST

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]

_SIZES = replace(MNIST, name="small", count={"train": 1500, "test": 100}, last_resort=None)
_DIGITS = bytes(i % 10 for i in range(256))
_CONTENT = {name: random.Random(name).randbytes(_SIZES.size(name)).translate(_DIGITS) for name in MNIST.sha256}
SMALL = replace(_SIZES, sha256={name: hashlib.sha256(content).hexdigest() for name, content in _CONTENT.items()})
"""A data set in MNIST's files, of so few images that it is fetched and checked in no time."""
PACKED = {name: gzip.compress(content, 1) for name, content in _CONTENT.items()}


def say_nothing(message: str) -> None: ...


def names_in(root: Path) -> list[str]:
    (folder,) = root.glob("*/raw")
    return sorted(path.name for path in folder.iterdir())


def raises_sentence(kind: type[Exception], *parts: str) -> contextlib.AbstractContextManager[object]:
    """Expects an error of exactly one line that holds all the parts, in this order."""
    return pytest.raises(kind, match=r"\A" + "".join(f"[^\n]*{re.escape(part)}" for part in parts) + r"[^\n]*\Z")


def good(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(packed)))
    request.end_headers()
    request.wfile.write(packed)


def without_length(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    request.send_response(200)
    request.end_headers()
    request.wfile.write(packed)


def broken_off(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(packed)))
    request.end_headers()
    request.wfile.write(packed[: len(packed) // 2])


def cut(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    good(request, packed[: len(packed) // 2])


def altered(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    content = bytearray(gzip.decompress(packed))
    content[-1] ^= 1
    good(request, gzip.compress(content, 1))


def log_in_page(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    good(request, b"<html>Welcome to the guest network</html>")


def too_long(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    without_length(request, packed + b"\0" * 50_000_000)


def unpacks_too_long(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    good(request, packed + gzip.compress(bytes(100_000)))  # gzip joins its members


def not_found(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    request.send_error(404)


def dripping(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(packed)))
    request.end_headers()
    for byte in packed[:400]:
        request.wfile.write(bytes([byte]))
        time.sleep(0.05)


def no_http(request: BaseHTTPRequestHandler, packed: bytes) -> None:
    request.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


class Mirror:
    """A web server that has the packed files, and gives `answer` to each request, or first `answers[name]`."""

    def __init__(self, packed: dict[str, bytes] = PACKED, answer: Answer = good, **answers: Answer) -> None:
        self.requests: list[str] = []
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.strip("/").removesuffix(".gz")
                mirror.requests.append(name)
                with contextlib.suppress(ConnectionError):
                    answers.get(name.replace("-", "_"), answer)(self, packed[name])

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def __enter__(self) -> "Mirror":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.socket.close()
