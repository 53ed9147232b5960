"""Files that hang, crash or bloat their parser: each is one reject, in time, and the files after it are read."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ragtune_ray.config import Corpus
from ragtune_ray.ingest import parser_process
from ragtune_ray.ingest.parsers import parse_file
from ragtune_ray.ingest.parsing.text import ParseError, TransientError

CORPUS = Corpus(max_document_bytes=1_000_000)
SECONDS = 60.0


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parser processes in which a file's content says what its parser does, as a bug in a C library would."""
    (tmp_path / "sitecustomize.py").write_text(
        """
import ctypes, mmap, os, sys, threading
ParsedFile = None
def parse(name, data, *limits):
    match data.split()[0]:
        case b"hang":
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()  # waits in C, for ever
        case b"crash":
            ctypes.string_at(0)
        case b"exit":
            os._exit(3)
        case b"bloat":
            try:
                mmap.mmap(-1, 1 << 32)  # more than the limit, less than a machine has
            except OSError as error:
                raise MemoryError from error  # what malloc makes of it
        case b"raise":
            raise KeyError("odd")
        case b"print":
            print("noise"); os.write(1, b"more noise\\n")
    return ParsedFile(name, data.decode())
class Finder:
    def find_spec(self, name, *rest):
        if name == "ragtune_ray.ingest.parser_process":
            sys.meta_path.remove(self)
            global ParsedFile
            from ragtune_ray.ingest import parsers
            from ragtune_ray.ingest.parsing.text import ParsedFile
            parsers.parse_file = parse
sys.meta_path.insert(0, Finder())
""",
        encoding="utf-8",
    )
    parser_process.close()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    parser_process.close()


def parse(content: str, max_seconds: float = SECONDS) -> str:
    corpus = CORPUS.model_copy(update={"max_parse_seconds": max_seconds})
    return parser_process.parse_file("a.md", content.encode(), corpus).text


def process() -> subprocess.Popen[bytes]:
    (parser,) = parser_process._parsers
    return parser.process


def test_files_are_parsed_as_in_this_process_by_one_process_after_another() -> None:
    files = {
        "a.md": b"---\nyear: 2020\ntags: [a, b]\n---\n# Mars\n\nred",
        "b.html": "<h1>Top</h1>嫦娥".encode(),
        "c.txt": b"plain",
    }
    processes = set()
    for name, data in files.items():
        assert parser_process.parse_file(name, data, CORPUS) == parse_file(name, data, CORPUS)
        processes.add(process().pid)
    for name, data, reason in (("x.pdf", b"%PDF", "PDF cannot be opened"), ("x.md", b"caf\xe9 cr\xe8me", "not UTF-8")):
        with pytest.raises(ParseError, match=reason):
            parser_process.parse_file(name, data, CORPUS)
        processes.add(process().pid)
    assert len(processes) == 1, "none of these needs another process"


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize(
    ("content", "max_seconds", "reason"),
    [
        ("hang", 0.3, r"took longer than corpus\.max_parse_seconds \(0\.3\)"),
        ("crash", SECONDS, "crashed its parser \\(SIGSEGV\\)"),
        ("exit", SECONDS, "crashed its parser \\(exit code 3\\)"),
        ("bloat", SECONDS, "too much memory"),
        ("raise", SECONDS, "cannot be parsed: KeyError: 'odd'"),
    ],
)
def test_a_hostile_file_is_refused_with_the_reason_and_the_next_one_is_parsed(
    content: str, max_seconds: float, reason: str
) -> None:
    assert parse("fine") == "fine"
    with pytest.raises(ParseError, match=reason) as caught:
        parse(content, max_seconds)
    assert isinstance(caught.value, TransientError) == (content != "raise")
    assert parse("fine") == "fine"


def test_modules_in_the_working_directory_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "html.py").write_text("raise RuntimeError('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    parser_process.close()
    assert parse("fine") == "fine"
    parser_process.close()


def test_the_working_directory_stays_if_the_package_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(parser_process.__file__).parents[2]
    monkeypatch.setattr(sys, "path", ["", "/modules"])
    monkeypatch.chdir(root)
    assert parser_process._module_folders() == [str(root), "/modules"]
    monkeypatch.chdir(tmp_path)
    assert parser_process._module_folders() == ["/modules"]


@pytest.mark.usefixtures("hostile")
def test_the_reply_about_an_interrupted_file_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    parse("fine")

    def interrupt() -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(process().stdout, "readline", interrupt)
        with pytest.raises(KeyboardInterrupt):
            parse("first")
    assert parse("second") == "second"


@pytest.mark.usefixtures("hostile")
def test_ctrl_c_leaves_the_end_of_an_idle_process_to_its_owner(capfd: pytest.CaptureFixture[str]) -> None:
    parse("fine")
    idle = process()
    idle.send_signal(signal.SIGINT)
    assert parse("fine") == "fine"
    assert process() is idle
    parser_process.close()
    assert (idle.returncode, capfd.readouterr().err) == (0, "")


@pytest.mark.usefixtures("hostile")
def test_what_a_library_prints_is_no_reply() -> None:
    assert parse("print") == "print"


@pytest.mark.usefixtures("hostile")
def test_the_process_ends_with_the_one_that_started_it() -> None:
    parse("fine")
    child = psutil.Process(process().pid)
    parser_process.close()
    assert not child.is_running()
    parse("fine")
    orphan = process()
    assert orphan.stdin is not None
    orphan.stdin.close()  # as when this process is killed
    assert orphan.wait(60) == 0


@pytest.mark.usefixtures("hostile")
def test_a_forked_process_starts_its_own() -> None:
    parse("fine")
    child = os.fork()
    if child == 0:
        os._exit(0 if parse("forked") == "forked" and not parser_process.close() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert parse("fine") == "fine"


@pytest.mark.usefixtures("hostile")
def test_a_time_limit_ends_with_its_file() -> None:
    parse("fine", 0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        process().wait(0.3)
