"""A web server of files in memory that fails as it is told to, and counts the bytes it serves."""

import contextlib
import re
import threading
from collections import Counter, deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


class Server:
    """``faults``: what happens to the next GETs, in order: "503", "404", "reset", "truncate",
    "stall". ``ranges``, ``length``: whether it heeds ranges, and says how long a file is."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.served: dict[str, np.ndarray] = {}  # how often each byte was sent
        self.requests: Counter[str] = Counter()
        self.faults: deque[str] = deque()
        self.ranges, self.length, self.port = True, True, 0
        self.always = ""  # the fault of each GET
        self.over = threading.Event()

    def url(self, name: str, data: bytes) -> str:
        """Serve a file."""
        self.files[f"/{name}"] = data
        self.served[f"/{name}"] = np.zeros(len(data), np.int64)
        return f"http://127.0.0.1:{self.port}/{name}"

    def forget(self) -> None:
        """Count from here on."""
        for counts in self.served.values():
            counts[:] = 0
        self.requests.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms
    server_state: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        state, path = self.server_state, self.path.partition("?")[0]
        state.requests[self.command] += 1
        fault = (state.faults.popleft() if state.faults else state.always) if body else ""
        data = state.files.get(path)
        if fault == "reset":
            self.close_connection = True
            self.connection.shutdown(2)
            return
        if data is None or fault.isdigit():
            self.send_response(int(fault) if fault.isdigit() else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = 0, len(data)
        if asked and state.ranges:
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        else:
            self.send_response(200)
        if state.length:
            self.send_header("Content-Length", str(stop - start))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        if fault:
            stop = start + (stop - start) // 2
        if body:
            state.served[path][start:stop] += 1  # before a client can know that it is there
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data[start:stop] if body else b"")
        if fault == "stall":
            state.over.wait()
        if fault:
            self.close_connection = True


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server on this machine, in threads of this process."""
    state = Server()
    handler = type("Handler", (_Handler,), {"server_state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that has enough
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
