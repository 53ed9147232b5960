"""An S3 server on this machine, which can fail as real ones do."""

import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import werkzeug.serving
from moto.moto_server.threaded_moto_server import MotoRequestHandler
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app


class Faults:
    """Answers a share of the requests with an error, or so late that the client has given up.

    Args:
        seed: of the choice.
        errors: share of the requests that get a status of 500 or 503.
        stalls: share of the requests that get no answer for `stall_seconds`.
        stall_seconds: longer than a client waits.
    """

    def __init__(self, seed: int, errors: float, stalls: float = 0.0, stall_seconds: float = 0.0) -> None:
        self.num_failed = 0
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._errors, self._stalls, self._stall_seconds = errors, stalls, stall_seconds

    def wrap(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """The application with these faults; a request that fails changes nothing, one that stalls is carried out."""

        def failing(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            with self._lock:
                drawn = self._random.random()
                self.num_failed += drawn < self._errors + self._stalls
            if drawn < self._errors:
                status, code = ("500 Internal Server Error", "InternalError"), ("503 Slow Down", "SlowDown")
                name, reason = status if drawn < self._errors / 2 else code
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start(name, [("Content-Type", "application/xml")])
                return [f"<Error><Code>{reason}</Code><Message>injected</Message></Error>".encode()]
            if drawn < self._errors + self._stalls:
                time.sleep(self._stall_seconds)
            return app(environ, start)

        return failing


class _Quiet(MotoRequestHandler):
    def log_request(self, *_: Any) -> None:
        """Say nothing."""


class S3Server:
    """The server, in threads of this process; those of one process share their buckets."""

    def __init__(self, host: str, faults: Faults | None = None) -> None:
        app = DomainDispatcherApplication(create_backend_app)
        served = faults.wrap(app) if faults else app
        self._server = werkzeug.serving.make_server(host, 0, served, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def stop(self) -> None:
        """End it."""
        self._server.shutdown()
        self._thread.join()
