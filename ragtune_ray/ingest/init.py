"""Writes a first ragtune.yaml for a folder of documents, with comments that explain each line.

The settings follow from what `survey` finds, and the file runs unmodified: `ragtune index ragtune.yaml`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ragtune_ray import config
from ragtune_ray.config.extras import install_command
from ragtune_ray.ingest.survey import (
    CorpusSurvey,
    QuestionSurvey,
    find_questions,
    main_script,
    survey_corpus,
    survey_questions,
)
from ragtune_ray.storage import filesystem

_TOKENS_PER_WORD = 1.5
_COMMENT_COLUMN, _WIDTH = 34, 120


@dataclass(frozen=True, slots=True)
class InitResult:
    """The file that was written, and what it is based on."""

    path: str
    corpus: CorpusSurvey
    questions: QuestionSurvey | None
    warnings: tuple[str, ...]
    commands: tuple[str, ...]
    """Shell commands to run next, in order."""

    def facts(self) -> dict[str, Any]:
        """JSON values for `--json`."""
        return {**dataclasses.asdict(self), "num_files": self.corpus.num_files}

    def lines(self) -> Iterator[str]:
        """What was found and what to do next, for a person."""
        corpus, questions = self.corpus, self.questions
        yield f"{corpus.path}: {describe_corpus(corpus)}"
        if corpus.scripts:
            yield f"  scripts: {', '.join(f'{script} {share:.0%}' for script, share in corpus.scripts.items())}"
        for item in corpus.unread:
            yield f"  not read: {item.num_files} {item.suffix or 'without a suffix'} ({item.reason})"
        yield f"{questions.path}: {describe_questions(questions)}" if questions else "no questions found"
        yield from (f"warning: {text}" for text in self.warnings)
        model = config.Config().generator.model
        yield f"note: {model} is a demonstration model; set generator.model in {self.path}"
        yield f"wrote {self.path}; next:"
        yield from (f"  {command}" for command in self.commands)


def init(folder: str, questions: str = "", output: str = "ragtune.yaml", *, force: bool = False) -> InitResult:
    """Look at a folder of documents, and write a config for it.

    Args:
        folder: anything that `corpus.path` may name.
        questions: anything that `queries.path` may name. Empty: a file in or next to the folder, if one has a name with
            `question` or `queries`.
        output: the YAML file to write.
        force: overwrite the output.

    Raises:
        ConfigError: the output exists, and `force` is not set.
        InputError: the folder contains no document, or the questions cannot be read.
    """
    if Path(output).exists() and not force:
        raise config.ConfigError(f"{output} exists; add --force to overwrite it, or --output FILE to write another")
    corpus = survey_corpus(folder)
    path = questions or find_questions(folder)
    found = survey_questions(path) if path else None
    text = "\n".join(_yaml_lines(corpus, found, _workspace(folder)))
    filesystem.replace_text(output, f"{text}\n")
    return InitResult(output, corpus, found, tuple(_warnings(corpus, found)), tuple(_commands(output, corpus, found)))


def _workspace(folder: str) -> str:
    """`workspace`, or a hidden name if it would be in the corpus folder, where its files would be indexed."""
    inside = "://" not in folder and Path("workspace").absolute().is_relative_to(filesystem.absolute(folder))
    return ".ragtune" if inside else "workspace"


def describe_corpus(corpus: CorpusSurvey) -> str:
    """Number, size and types of the files, in one line."""
    kinds = ", ".join(f"{number:,} {suffix}" for suffix, number in corpus.kinds.items())
    return f"{_many(corpus.num_files, 'file')}, {_size(corpus.num_bytes)}" + (f": {kinds}" if kinds else "")


def describe_questions(questions: QuestionSurvey) -> str:
    """How many questions there are, and what is known of them, in one line."""
    parts = [_many(questions.num_questions, "question")]
    if questions.num_answered:
        length = "long" if questions.has_long_answers else "short"
        unit = "characters" if main_script(questions.scripts) == "CJK" else "words"
        parts.append(f"{questions.num_answered:,} with {length} answers (median {questions.median_words:g} {unit})")
    else:
        parts.append("without answers")
    if questions.num_unanswerable:
        parts.append(f"{questions.num_unanswerable:,} known to have no answer")
    parts.append(f"{questions.num_judged:,} with document_ids" if questions.num_judged else "without document_ids")
    splits = ", ".join(f"{name} {number:,}" for name, number in sorted(questions.splits.items()))
    parts.append(f"splits given ({splits})" if splits else "splits to be drawn")
    return ", ".join(parts)


def _warnings(corpus: CorpusSurvey, questions: QuestionSurvey | None) -> Iterator[str]:
    if questions is None:
        return
    if questions.num_rejects:
        yield f"{questions.path}: {_many(questions.num_rejects, 'row')} not usable, the first: {questions.first_reject}"
    root = filesystem.absolute(corpus.path)
    is_own_file = questions.path != corpus.path and not questions.path.lower().endswith(".json")
    if is_own_file and filesystem.absolute(questions.path).startswith(f"{root}/"):
        yield (
            f"{questions.path} is in the corpus folder, so `index` reads its rows as documents; move it out of "
            f"{corpus.path} and run init again"
        )


def _commands(output: str, corpus: CorpusSurvey, questions: QuestionSurvey | None) -> Iterator[str]:
    name = shlex.quote(output)
    if corpus.extras:
        yield install_command(*corpus.extras)
    yield f"ragtune index {name}"
    if questions is None:
        yield f'ragtune ask {name} "YOUR QUESTION"'
    elif questions.num_answered:
        yield f"ragtune evaluate {name}"
        yield f"ragtune compare {name}"
    else:
        if questions.num_judged:
            yield f"ragtune retrieve {name}"
        yield f"ragtune answer {name}"


def _yaml_lines(corpus: CorpusSurvey, questions: QuestionSurvey | None, workspace: str) -> Iterator[str]:
    """The lines of the YAML file; a section without settings is a comment, because YAML would read it as null."""
    yield f"# Settings for {' '.join(corpus.path.split())}, written by `ragtune init`. All settings: ragtune settings"
    yield "# Paths are relative to the directory in which ragtune runs; s3:// URLs work too."
    yield _setting(f"workspace: {_quoted(workspace)}", "index, models and runs are written here")
    yield ""
    yield "corpus:"
    yield _setting(f"  path: {_quoted(corpus.path)}", describe_corpus(corpus))
    yield _setting("  # strict: true", "stop at the first unreadable file, instead of listing it in rejects.jsonl")
    yield ""
    yield from _query_lines(questions, workspace)
    yield ""
    yield from _language_lines(corpus, questions)
    yield "# chunking:"
    yield _setting(
        "#   size_tokens: 256", "longest passage; longer ones contain more context, but fewer fit in a prompt"
    )
    yield "retrieval:"
    yield _setting("  top_k: 2", "passages in a prompt; 2 suit the demonstration model, 5 a larger one")
    yield from _generator_lines(corpus, questions)


def _query_lines(questions: QuestionSurvey | None, workspace: str) -> Iterator[str]:
    if questions is None:
        yield "# queries:                         # add questions to evaluate, compare and train"
        yield _setting(
            '#   path: "questions.jsonl"', 'a line: {"query_id": "1", "text": "Who ...?", "answers": ["..."]}'
        )
        return
    yield "queries:"
    yield _setting(f"  path: {_quoted(questions.path)}", describe_questions(questions))
    if not questions.splits:
        yield _setting("  split_by: document", "draws train, validation and test so that they share no document")
        record = _quoted(filesystem.join(workspace, "splits.json"))
        yield _setting(
            f"  split_record: {record}", "keeps the drawn splits: documents that you add later do not change them"
        )
    yield _setting("  # limit: 20", "use only the first questions, for a quick first run")


def _language_lines(corpus: CorpusSurvey, questions: QuestionSurvey | None) -> Iterator[str]:
    script = main_script((questions.scripts if questions else {}) or corpus.scripts)
    documents = main_script(corpus.scripts)
    scoring = []
    if script == "CJK":
        scoring.append(
            _setting("  language: zh", "compares answers by character, as Chinese and Japanese have no spaces")
        )
    if questions is not None and PurePosixPath(questions.path).suffix.lower() == ".json":
        scoring.append(_setting("  normalization: squad", "scores as SQuAD's script does; `strict` tells 4.5 from 45"))
    if scoring:
        yield "evaluate:"
        yield from scoring
    if documents == "other":
        yield "index:"
        yield _setting("  language: none", "no English stop words and stemming in the lexical index")
    elif documents == "Latin":
        yield "# index:"
        yield _setting("#   language: none", "if the documents are not English: no English stop words and stemming")
    yield "# encoder:"
    multilingual = documents not in ("Latin", None)
    model, why = (
        ("intfloat/multilingual-e5-small", "the default model knows only English; this one needs both prefixes below")
        if multilingual
        else ("BAAI/bge-small-en-v1.5", "a better retriever; index again after a change")
    )
    yield _setting(f"#   model: {model}", why)
    if multilingual:
        yield '#   query_prefix: "query: "'
        yield '#   passage_prefix: "passage: "'


def _generator_lines(corpus: CorpusSurvey, questions: QuestionSurvey | None) -> Iterator[str]:
    larger = _setting(
        "model: Qwen/Qwen2.5-1.5B-Instruct"
        if main_script(corpus.scripts) not in ("Latin", None)
        else "model: HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "a larger model reads better; the default is for demonstration",
    )
    if questions is None or not questions.has_long_answers:
        yield "generator:"
        yield f"  # {larger}"
        yield _setting('  stop: ["\\n"]', "the demonstration model does not stop by itself; a larger one does")
        yield _setting("  # max_new_tokens: 48", "longest answer, in tokens")
        return
    tokens = min(512, max(96, 32 * math.ceil(questions.long_words * _TOKENS_PER_WORD / 32)))
    yield "generator:"
    yield _setting(f"  max_new_tokens: {tokens}", "your answers are long; the default is 48")
    yield f"  # {larger}"
    yield "prompt:"
    yield "  # The default asks for a short phrase."
    yield "  system: >-"
    yield "    Answer the question from the passages and cite them like [1]."
    yield "    If the passages do not hold the answer, say: I don't know."


def _setting(line: str, comment: str) -> str:
    """A line with its comment, which goes on a line above if both do not fit on one."""
    text = " ".join(comment.split())
    joined = f"{line:<{_COMMENT_COLUMN}} # {text}"
    indent = line[: len(line) - len(line.lstrip())]
    return joined if len(joined) <= _WIDTH else f"{indent}# {text}\n{line}"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _size(num_bytes: int) -> str:
    """Bytes for a person.

    >>> _size(1_234_567)
    '1.2 MB'
    """
    if num_bytes < 1000:
        return f"{num_bytes} bytes"
    value, unit = num_bytes / 1000, "kB"
    for larger in ("MB", "GB"):
        if value >= 1000:
            value, unit = value / 1000, larger
    return f"{value:,.1f} {unit}"
