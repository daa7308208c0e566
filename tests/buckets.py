"""Object stores on this machine: servers of GCS and S3 with an empty bucket, behind a proxy that injects faults.

`PYTHONPATH=. python tests/buckets.py gs COMMAND ...` runs a command with such a bucket, gs://bucket.

The proxy counts requests. A fault is a function of (method, path, body) that returns what happens instead of, or with,
the answer: `error(503)`, `reset`, `slow(seconds)`, `cut`; None for nothing.
"""

import http.client
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from processes import free_port

# gcsfs reads it when it is imported, and would ask Google for the bucket's type.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
BUCKET = "bucket"
SERVERS = {
    "gs": (
        "from gcp_storage_emulator.server import create_server; import threading;"
        f"create_server('127.0.0.1', {{port}}, in_memory=True, default_bucket='{BUCKET}').start();"
        "threading.Event().wait()"
    ),
    "s3": (
        "from moto.server import ThreadedMotoServer; import threading;"
        "ThreadedMotoServer(ip_address='127.0.0.1', port={port}, verbose=False).start(); threading.Event().wait()"
    ),
}
PACKAGES = {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto.server")}
Fault = Callable[[str, str, bytes], Any]


class Bucket:
    """A bucket: its URL, the environment that leads to it, and the proxy's faults."""

    def __init__(self, scheme: str, proxy: "Proxy"):
        self.url, self.proxy = f"{scheme}://{BUCKET}", proxy
        here = f"http://127.0.0.1:{proxy.port}"
        self.env = {
            "gs": {
                "STORAGE_EMULATOR_HOST": here,
                "NO_GCE_CHECK": "true",
                "GOOGLE_CLOUD_PROJECT": "test",
            },
            "s3": {
                "AWS_ENDPOINT_URL": here,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        }[scheme]

    @contextmanager
    def faulty(self, fault: Fault) -> Iterator[None]:
        """Injects a fault during the block."""
        self.proxy.fault = fault
        try:
            yield
        finally:
            self.proxy.fault = None


@contextmanager
def bucket(scheme: str) -> Iterator[Bucket]:
    """Runs the server of a scheme, with an empty bucket. Skips the test where its packages are missing."""
    for package in PACKAGES[scheme]:
        pytest.importorskip(package)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVERS[scheme].format(port=port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(port, process)
        proxy = Proxy(port)
        with proxy.running(), pytest.MonkeyPatch.context() as patch:
            found = Bucket(scheme, proxy)
            for name, value in found.env.items():
                patch.setenv(name, value)
            _forget_connections()
            if scheme == "s3":
                import fsspec

                fsspec.filesystem("s3").mkdir(BUCKET)
            yield found
    finally:
        process.kill()
        process.wait()
        _forget_connections()


class Proxy:
    """Passes requests on to a server on this machine."""

    def __init__(self, server: int):
        self.server, self.port = server, free_port()
        self.fault: Fault | None = None
        self.requests: list[str] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serves during the block."""
        with _Server(("127.0.0.1", self.port), type("Handler", (_Handler,), {"proxy": self})) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            try:
                yield
            finally:
                server.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing: clients may be killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def _pass_on(self) -> None:
        body = self._body()
        self.proxy.requests.append(f"{self.command} {self.path}")
        happens = self.proxy.fault(self.command, self.path, body) if self.proxy.fault else None
        if happens and not happens(self):
            self.close_connection = True
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.server)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        # gcsfs ends the parts of an upload with \n alone. The server would take data's last \r for a part of that.
        body = re.sub(rb"\n--==0==--$", b"\r\n--==0==--", body)
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "server", "date"):
                self.send_header(name, value.replace(f":{self.proxy.server}", f":{self.proxy.port}"))
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if happens is cut else data)
        self.close_connection = happens is cut
        connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *arguments: Any) -> None:
        """Prints nothing."""


def error(code: int) -> Callable[[_Handler], bool]:
    """Answers with an HTTP error."""

    def answer(handler: _Handler) -> bool:
        handler.send_response(code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return False

    return answer


def reset(handler: _Handler) -> bool:
    """Resets the connection."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.wfile = handler.rfile  # nothing more is sent
    return False


def slow(seconds: float) -> Callable[[_Handler], bool]:
    """Answers late."""

    def wait(handler: _Handler) -> bool:
        time.sleep(seconds)
        return True

    return wait


def cut(handler: _Handler) -> bool:
    """Sends half of the answer."""
    return True


def _wait_for(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the server has not started")


def _forget_connections() -> None:
    """Clears the file systems that fsspec keeps: they know the address of an earlier server."""
    import fsspec

    for name in ("gcs", "s3"):
        if name in fsspec.registry:
            fsspec.get_filesystem_class(name).clear_instance_cache()


if __name__ == "__main__":
    with bucket(sys.argv[1]):
        sys.exit(subprocess.call(sys.argv[2:]))
