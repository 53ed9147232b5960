"""Surveys a corpus and its questions: types and sizes of files, scripts, unreadable files, answers and qrels.

Every file is listed, but only a sample of documents is read. Questions are read completely.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import regex  # type: ignore[import-untyped]  # the library has no stubs

from ragtune_ray.config import Corpus
from ragtune_ray.ingest import inputs, parsers
from ragtune_ray.ingest.chunking import word_spans
from ragtune_ray.ingest.input_units import Unit
from ragtune_ray.ingest.listing import list_files
from ragtune_ray.ingest.parsing.text import ParseError
from ragtune_ray.ingest.queries import read_queries
from ragtune_ray.ingest.readers import read_documents
from ragtune_ray.schema import Document, Reject
from ragtune_ray.storage import filesystem

Script = Literal["Latin", "CJK", "other"]
"""CJK is Han, hiragana and katakana: scripts without spaces between words. Hangul counts as other."""

SAMPLE_FILES, SAMPLE_ROWS = 40, 25
"""Limits on the files of a corpus that are read, and on the documents of each."""
LONG_ANSWER_WORDS, LONG_ANSWER_CHARACTERS = 12, 30
"""Answers whose median length is above this many words, or CJK characters, are long."""
_SCRIPTS = regex.compile(
    r"(?P<Latin>\p{Latin}+)|(?P<CJK>[\p{Han}\p{Hiragana}\p{Katakana}]+)|(?P<other>\p{L}+)", regex.V1
)
_QUESTION_SUFFIXES = (".jsonl", ".parquet", ".json")
_QUESTION_NAMES = ("question", "queries", "query")


@dataclass(frozen=True, slots=True)
class Unread:
    """Files of one type that cannot be read, or not completely."""

    suffix: str
    num_files: int
    reason: str
    """Why the first of them cannot be read."""
    extra: str = ""
    """The extra of this package that reads them; empty if none does."""


@dataclass(frozen=True, slots=True)
class CorpusSurvey:
    """The contents of a corpus."""

    path: str
    kinds: dict[str, int]
    """Suffix -> number of files that can be read."""
    num_bytes: int
    """Size of these files."""
    unread: tuple[Unread, ...]
    scripts: dict[Script, float]
    """Share of the letters in the sampled documents."""

    @property
    def num_files(self) -> int:
        """Files that can be read."""
        return sum(self.kinds.values())

    @property
    def extras(self) -> tuple[str, ...]:
        """The extras to install before all files can be read."""
        return tuple(sorted({item.extra for item in self.unread if item.extra}))


@dataclass(frozen=True, slots=True)
class QuestionSurvey:
    """The contents of a file of questions."""

    path: str
    num_questions: int
    num_answered: int
    """Questions with a gold answer."""
    num_unanswerable: int
    """Questions known to have no answer."""
    num_judged: int
    """Questions that name the documents relevant to them."""
    splits: dict[str, int]
    """Split -> number of questions, for the questions that name one."""
    median_words: float
    """Length of the first gold answers: words, or characters in unspaced scripts. 0 without answers."""
    long_words: float
    """95 of 100 first gold answers are no longer than this."""
    scripts: dict[Script, float]
    num_rejects: int
    first_reject: str
    """Place and reason; empty without rejects."""

    @property
    def has_long_answers(self) -> bool:
        """Whether answers are sentences rather than phrases."""
        limit = LONG_ANSWER_CHARACTERS if main_script(self.scripts) == "CJK" else LONG_ANSWER_WORDS
        return self.median_words > limit


def main_script(scripts: dict[Script, float]) -> Script | None:
    """The script with the largest share of letters; None if there are no letters."""
    return max(scripts, key=lambda script: scripts[script], default=None)


def survey_corpus(path: str) -> CorpusSurvey:
    """List the files of a corpus (`corpus.path`) and read a sample of its documents.

    Raises:
        InputError: the path is missing, or contains nothing that can be read, even with every extra installed.
    """
    files, refused = list_files(path)
    kinds: Counter[str] = Counter()
    readable: list[str] = []
    failures = [(_suffix(item.place), item.reason, "") for item in refused]
    num_bytes = 0
    for name, size_bytes in zip(files.names(), files.sizes.tolist(), strict=True):
        suffix = _suffix(name)
        try:
            inputs.format_of(name)
        except ParseError as error:
            failures.append((suffix, inputs.why_unreadable(error), ""))
        except inputs.InputError as error:
            failures.append((suffix, str(error).removeprefix(f"{name}: "), parsers.missing_extra(suffix) or ""))
        else:
            if not size_bytes:
                failures.append((suffix, "the file is empty (0 bytes)", ""))
                continue
            readable.append(name)
            kinds[suffix] += 1
            num_bytes += size_bytes
    texts: list[str] = []
    step = max(1, len(readable) // SAMPLE_FILES)
    for name in readable[::step][:SAMPLE_FILES]:
        items = list(_sample(files.folder, name))
        texts += [item.text for item in items if isinstance(item, Document)]
        rejects = [item for item in items if isinstance(item, Reject)]
        if rejects:
            first = rejects[0]
            rows = f"{len(rejects)} of {len(items)} sampled rows; the first, {first.place}: "
            failures.append((_suffix(name), (rows if first.kind == "row" else "") + first.reason, ""))
    unread = _grouped(failures)
    if not texts and not any(item.extra for item in unread):
        reasons = "; ".join(f"{item.num_files} {item.suffix or 'file'}: {item.reason}" for item in unread[:3])
        raise inputs.InputError(f"{path}: nothing readable ({reasons or 'it is empty'}); accepted: {inputs.ACCEPTED}")
    return CorpusSurvey(path, dict(kinds.most_common()), num_bytes, unread, _scripts_of(texts))


def find_questions(path: str) -> str | None:
    """A file of questions in the corpus folder, or next to it; None if there is none.

    A BEIR folder contains its own questions, and a SQuAD file is both corpus and questions.
    """
    store, inner = inputs.locate(path)
    if not store.isdir(inner):
        return path if _suffix(path) == ".json" else None
    if store.exists(filesystem.join(inner, "queries.jsonl")) and store.exists(filesystem.join(inner, "corpus.jsonl")):
        return path
    folders = [path.rstrip("/") or path]
    if "://" not in path:
        folders.append(str(PurePosixPath(path).parent) if PurePosixPath(path).name else "..")
    for folder in folders:
        for name in filesystem.list_names(folder):
            if _suffix(name) in _QUESTION_SUFFIXES and any(part in name.lower() for part in _QUESTION_NAMES):
                return name if folder == "." else filesystem.join(folder, name)
    squad = [name for name in filesystem.list_names(folders[0]) if _suffix(name) == ".json"]
    return filesystem.join(folders[0], squad[0]) if len(squad) == 1 else None


def survey_questions(path: str) -> QuestionSurvey:
    """Read all questions of a file (`queries.path`).

    Raises:
        InputError: the file is missing or unreadable, or contains no questions.
    """
    counts: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    lengths: list[int] = []
    texts: list[str] = []
    first_reject = ""
    for row in read_queries(path):
        if isinstance(row, Reject):
            counts["rejects"] += 1
            first_reject = first_reject or f"{row.place}: {row.reason}"
            continue
        counts["questions"] += 1
        counts["judged"] += bool(row.document_ids)
        counts["unanswerable"] += row.answers == ()
        if row.split != "all":
            splits[row.split] += 1
        if row.answers:
            lengths.append(len(word_spans([row.answers[0]])[0]))
        if len(texts) < SAMPLE_FILES * SAMPLE_ROWS:
            texts += [row.text, *(row.answers or ())[:1]]
    if not counts["questions"]:
        found = f" (the first of {counts['rejects']} rejected rows: {first_reject})" if first_reject else ""
        raise inputs.InputError(f"{path}: contains no questions{found}; see docs/data-formats.md for their columns")
    return QuestionSurvey(
        path=path,
        num_questions=counts["questions"],
        num_answered=len(lengths),
        num_unanswerable=counts["unanswerable"],
        num_judged=counts["judged"],
        splits=dict(splits),
        median_words=float(np.median(lengths)) if lengths else 0.0,
        long_words=float(np.percentile(lengths, 95)) if lengths else 0.0,
        scripts=_scripts_of(texts),
        num_rejects=counts["rejects"],
        first_reject=first_reject,
    )


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _sample(folder: str, name: str) -> Iterator[Document | Reject]:
    """The first documents of a file, and the rejects among them."""
    place = filesystem.join(folder, name)
    unit = Unit(0, inputs.format_of(name), (place,), 0, sys.maxsize, folder)
    try:
        yield from itertools.islice(read_documents(unit, Corpus()), SAMPLE_ROWS)
    except OSError as error:
        yield Reject(place, inputs.why_unreadable(error), "file")


def _grouped(failures: Iterable[tuple[str, str, str]]) -> tuple[Unread, ...]:
    """Group failures (suffix, reason, extra) by suffix and extra, sorted."""
    groups: dict[tuple[str, str], list[str]] = {}
    for suffix, reason, extra in failures:
        groups.setdefault((suffix, extra), []).append(reason)
    return tuple(Unread(suffix, len(reasons), reasons[0], extra) for (suffix, extra), reasons in sorted(groups.items()))


def _scripts_of(texts: Sequence[str]) -> dict[Script, float]:
    letters: Counter[Script] = Counter()
    for text in texts:
        for match in _SCRIPTS.finditer(text[:100_000]):
            letters[match.lastgroup] += len(match[0])
    total = sum(letters.values())
    return {script: count / total for script, count in letters.most_common()}
