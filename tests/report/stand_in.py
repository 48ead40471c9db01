"""Stand-ins for a tracker: one in memory, and a package ``mlflow`` with a server that may hang, die or refuse.

The package has what ``qvtune.report.trackers.mlflow`` uses of the real one, and sends JSON over HTTP. The server is of
this process, so that a test sees what has arrived.
"""

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from qvtune.report.trackers.tracker import Point, Tracked

_PACKAGE = """
import json, os, urllib.request
from types import SimpleNamespace


class MlflowClient:
    def _call(self, name, *arguments):
        request = urllib.request.Request(os.environ["MLFLOW_TRACKING_URI"], json.dumps([name, *arguments]).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=self._call("experiment", name))

    def search_runs(self, places, query):
        return [SimpleNamespace(info=SimpleNamespace(run_id=one)) for one in self._call("search", query)]

    def create_run(self, place, tags, run_name):
        return SimpleNamespace(info=SimpleNamespace(run_id=self._call("create", tags, run_name)))

    def update_run(self, run, status):
        self._call("status", run, status)

    def set_terminated(self, run, status):
        self._call("status", run, status)

    def log_batch(self, run, metrics=(), params=()):
        self._call("log", run, [vars(one) for one in metrics], [vars(one) for one in params])
"""
_ENTITIES = """
class Metric:
    def __init__(self, key, value, timestamp, step):
        self.key, self.value, self.timestamp, self.step = key, value, timestamp, step


class Param:
    def __init__(self, key, value):
        self.key, self.value = key, value
"""


def write_package(folder: Path) -> Path:
    """The package ``mlflow`` in ``folder``, which is to be in PYTHONPATH."""
    (folder / "mlflow").mkdir(parents=True)
    (folder / "mlflow" / "__init__.py").write_text(_PACKAGE)
    (folder / "mlflow" / "entities.py").write_text(_ENTITIES)
    return folder


class Server:
    """What has arrived, and what the server does: ``answers``, ``hangs``, or ``dies`` in the middle of an answer."""

    def __init__(self, uri: str) -> None:
        self.uri, self.mode = uri, "answers"
        self.runs: dict[str, str] = {}  # query that finds it -> run
        self.metrics: list[tuple[str, int, float]] = []  # name, step, value, in the order of arrival
        self.params: dict[str, str] = {}
        self.status = ""
        self.num_requests = 0

    def points(self, name: str) -> list[tuple[int, float]]:
        """Step and value of a metric."""
        return [(step, value) for key, step, value in self.metrics if key == name]

    def call(self, name: str, *arguments: Any) -> Any:
        """The answer to a request."""
        if name == "experiment":
            return "1"
        if name == "search":
            return [run for query, run in self.runs.items() if query == arguments[0]]
        if name == "create":
            ((key, value),) = arguments[0].items()
            return self.runs.setdefault(f"tags.`{key}` = '{value}'", f"run-{len(self.runs)}")
        if name == "status":
            self.status = arguments[1]
            return None
        _, metrics, params = arguments
        self.metrics += [(one["key"], one["step"], one["value"]) for one in metrics]
        self.params |= {one["key"]: one["value"] for one in params}
        return None


@contextmanager
def serving() -> Iterator[Server]:
    """A server until the end of the block."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            server.num_requests += 1
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.mode == "hangs":
                released.wait()
            if server.mode == "dies":
                self.connection.shutdown(socket.SHUT_RDWR)
            if server.mode != "answers":
                return
            body = json.dumps(server.call(*request)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server = Server(f"http://127.0.0.1:{http.server_address[1]}")
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            released.set()
            http.shutdown()


class Memory:
    """A tracker in this process. ``fails_after``: so many points are taken, then ``log`` raises."""

    def __init__(self, *, confirms: bool = True, forgets: bool = False) -> None:
        self.confirms, self.forgets = confirms, forgets
        self.points: list[Point] = []
        self.opened: list[Tracked] = []
        self.forgotten: list[int] = []
        self.closed: list[str | None] = []
        self.fails_after: int | None = None

    def open(self, name: str, run: Tracked) -> "Memory":
        """Takes the place of ``open_tracker``."""
        self.opened.append(run)
        return self

    def log(self, points: Sequence[Point]) -> None:
        if self.fails_after is not None and len(self.points) + len(points) > self.fails_after:
            raise ConnectionError("no route to the tracker\nsecond line")
        self.points += points

    def forget_after(self, step: int) -> None:
        self.forgotten.append(step)

    def close(self, reason: str | None) -> None:
        self.closed.append(reason)
