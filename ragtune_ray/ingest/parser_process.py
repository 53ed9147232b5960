"""Parses files in a process of its own, so that a file that hangs, crashes or bloats its parser costs only itself.

The parsers of PDF, DOCX and HTML are C libraries, and no exception can interrupt them. The process is started once and parses
one file after another; the system ends it at the time limit, and the next file starts another. The two processes exchange a line
of JSON and the file's bytes, nothing that can contain code.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path, PurePosixPath
from typing import IO, Any

import ragtune_ray
from ragtune_ray.config import Corpus
from ragtune_ray.ingest import parsers
from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, TransientError

IN_THIS_PROCESS = (".txt",)
"""Files of these types are only decoded."""
MEMORY_FACTOR = 64
"""A parser may use this many times `max_document_bytes`, and `BASE_BYTES` more."""
BASE_BYTES = 2**30

# A terminal sends Ctrl-C to this process, too; the one that started it decides when it ends.
_COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from ragtune_ray.ingest import parser_process; parser_process.serve()"
)


def parse_file(name: str, data: bytes, corpus: Corpus) -> ParsedFile:
    """As `parsers.parse_file`, within limits of time (`corpus.max_parse_seconds`) and memory (`MEMORY_FACTOR`).

    Raises:
        TransientError: the parser crashed, reached a limit or lacks a library.
        ParseError: the file cannot be parsed.
    """
    if PurePosixPath(name).suffix.lower() in IN_THIS_PROCESS:
        return parsers.parse_file(name, data, corpus)
    with _lock:
        if not _parsers or not _parsers[0].is_usable:
            close()
            _parsers.append(_Parser())
        return _parsers[0].parse(name, data, corpus)


class _Parser:
    """The parser process, as seen from this one."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_module_folders())}
        command = [sys.executable, "-P", "-c", _COMMAND]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    @property
    def is_usable(self) -> bool:
        """Whether it runs and belongs to this process, not to the one that this one was forked from."""
        return self._owner == os.getpid() and self.process.poll() is None

    def parse(self, name: str, data: bytes, corpus: Corpus) -> ParsedFile:
        """Let the process parse a file."""
        try:
            parsed = self._reply(name, data, corpus)
        except BaseException:
            # The process may still reply about this file, which would be taken for the text of the next one.
            self.process.kill()
            self.process.wait()
            raise
        if "error" in parsed:
            raise (TransientError if parsed["is_transient"] else ParseError)(parsed["error"])
        return ParsedFile(**{**parsed, "page_starts": tuple(parsed["page_starts"])})

    def _reply(self, name: str, data: bytes, corpus: Corpus) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        header = json.dumps({"name": name, "num_bytes": len(data), "corpus": corpus.model_dump(mode="json")})
        with contextlib.suppress(BrokenPipeError):  # what is read next tells why it ended
            self.process.stdin.write(f"{header}\n".encode() + data)
            self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply.endswith(b"\n"):
            raise TransientError(self._why_ended(corpus.max_parse_seconds))
        parsed: dict[str, Any] = json.loads(reply)
        return parsed

    def _why_ended(self, max_seconds: float) -> str:
        code = self.process.wait()
        if code == -signal.SIGALRM:
            return (
                f"parsing took longer than corpus.max_parse_seconds ({max_seconds:g}); convert the file to plain text"
            )
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the file crashed its parser ({reason}); convert the file to plain text"

    def close(self) -> None:
        """End the process, if it is this one's."""
        if self._owner != os.getpid():
            return
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.process.wait()


def _module_folders() -> list[str]:
    """Where this process finds modules, which only it may know, as in a Ray job; without the working directory.

    A file there, such as a user's own html.py, would replace a module of Python. It stays if it contains this package.
    """
    here, package = Path.cwd().resolve(), Path(ragtune_ray.__file__).resolve().parent.parent
    folders = [os.path.abspath(folder) for folder in sys.path]  # noqa: PTH100  # "" is the working directory
    return [folder for folder in folders if here == package or Path(folder).resolve() != here]


_lock = threading.Lock()
_parsers: list[_Parser] = []
"""At most one."""


@atexit.register
def close() -> None:
    """End the parser process; the next file starts another one."""
    while _parsers:
        _parsers.pop().close()


def serve() -> None:
    """Parse the files that arrive on stdin until it ends: what the parser process runs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the system itself ends the process, even inside C code
    requests = sys.stdin.buffer
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries may print
        while line := requests.readline():
            asked = json.loads(line)
            data = requests.read(asked["num_bytes"])
            corpus = Corpus.model_validate(asked["corpus"])
            _limit_memory(BASE_BYTES + MEMORY_FACTOR * corpus.max_document_bytes)
            signal.setitimer(signal.ITIMER_REAL, corpus.max_parse_seconds)
            reply = _parsed(asked["name"], data, corpus)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(replies, reply)


def _parsed(name: str, data: bytes, corpus: Corpus) -> dict[str, Any]:
    try:
        return dataclasses.asdict(parsers.parse_file(name, data, corpus))
    except ParseError as error:
        return _failed(str(error), is_transient=isinstance(error, TransientError))
    except MemoryError:
        reason = "parsing needs too much memory; split the file, or raise corpus.max_document_bytes"
        return _failed(reason, is_transient=True)
    except Exception as error:  # noqa: BLE001  # a parser may raise anything on a broken file, and others must be parsed
        return _failed(f"cannot be parsed: {type(error).__name__}: {error}", is_transient=False)


def _failed(reason: str, *, is_transient: bool) -> dict[str, Any]:
    return {"error": reason, "is_transient": is_transient}


def _send(replies: IO[bytes], reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()


def _limit_memory(num_bytes: int) -> None:
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError, OSError):  # some systems do not support it, others have a lower limit already
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, most))
