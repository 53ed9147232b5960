"""One Ray for all tests of the cluster floor, a corpus whose facts are known, and models small enough to be instant."""

import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ragtune_ray.cluster.environment import SERVE_ENVIRONMENT
from tests.support.corpora import write_corpus, write_queries

# Before any test module imports Ray, which reads these once.
os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_BACKEND_LOG_LEVEL": "fatal"})
os.environ.update(SERVE_ENVIRONMENT)
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # else each training ends two seconds late


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents, one JSON line each."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_corpus(path, 60)
    return path


@pytest.fixture(scope="session")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 queries on the first 40 documents."""
    path = tmp_path_factory.mktemp("queries") / "queries.jsonl"
    write_queries(path, 40)
    return path


@pytest.fixture(scope="session")
def settings_for(corpus: Path, queries: Path, generator_directory: Path):
    """A function from a workspace to a config that is quick to run."""
    from ragtune_ray import config

    def build(workspace: Path, *overrides: str) -> config.Config:
        return config.Config().using(
            f"workspace={workspace}",
            f"corpus.path={corpus}",
            f"queries.path={queries}",
            "encoder.model=hashing-64",
            "encoder.unit_passages=16",
            "chunking.size_tokens=32",
            "chunking.overlap_tokens=4",
            f"generator.model={generator_directory}",
            "generator.precision=float32",
            "generator.max_new_tokens=4",
            "prompt.max_tokens=1500",
            "answer.unit_queries=8",
            "evaluate.resamples=200",
            "cluster.encoder_workers=2",
            "cluster.generator_workers=2",
            *overrides,
        )

    return build


@pytest.fixture(scope="session")
def shared_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray on this machine, started once, in a temporary directory of its own, and stopped by its own handle.

    A session is open, so that the actors of one verb live on for the next one, whichever test calls it.
    """
    import ray
    import ray.data

    from ragtune_ray import config
    from ragtune_ray.cluster import session

    # Paths of Ray's sockets must stay short, so pytest's own long temporary directories will not do.
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = False
    with session.ray_session(config.Cluster()):
        yield
    ray.shutdown()


@pytest.fixture(scope="session")
def nan_encoder(encoder_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder with one poisoned token: any text with a question mark gets a NaN vector."""
    from safetensors.torch import load_file, save_file

    directory = tmp_path_factory.mktemp("nan") / "encoder"
    shutil.copytree(encoder_directory, directory)
    weights = load_file(directory / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("word_embeddings.weight"))
    tokens = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    weights[name][tokens["?"]] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


class StubServer:
    """An OpenAI-compatible server on this machine whose every answer is "forty-two [1]", or that of `reply`, or an error."""

    def __init__(self) -> None:
        self.status = 200
        self.num_requests = 0
        self.reply: Callable[[str], str] = lambda _: "forty-two [1]"
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                stub.num_requests += 1
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = stub.reply(asked["messages"][-1]["content"])
                message = {"role": "assistant", "content": text}
                body = json.dumps(
                    {
                        "id": "1",
                        "object": "chat.completion",
                        "created": 0,
                        "model": "stub",
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
                    }
                ).encode()
                self.send_response(stub.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()


@pytest.fixture
def openai_stub() -> Iterator[StubServer]:
    server = StubServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def eventually_up():
    """A function that waits until something answers at an address."""
    import time
    import urllib.error
    import urllib.request

    def wait(address: str) -> None:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(address, timeout=2)
            except urllib.error.HTTPError:
                return
            except OSError:
                assert time.monotonic() < deadline, f"nothing answers at {address}"
                time.sleep(0.05)
            else:
                return

    return wait
