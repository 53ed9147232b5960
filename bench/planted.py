"""Checks that `compare` finds the right verdict on four generated tasks whose right verdict is known.

    python -m bench.planted [section.field=value ...] [--kind short|long] [--tasks changing_facts ...] [--seeds 0 1 2]
        [--workspace DIRECTORY]

| task | what it contains | right verdict |
|---|---|---|
| changing_facts | invented facts that only the documents state; they change after training | rag or rag+ft |
| house_form | answers that follow from the question, in a form that no document states | ft |
| facts_in_house_form | answers that are facts of documents, in a form that no document states | rag+ft |
| known_already | capitals that the base model names, so every arm can answer; base is the cheapest | base |

With `--kind long` gold answers are sentences in several wordings (`bench/planted_long.py`), and the metric is the one that
`ragtune questions check` proposes.

Corpus, questions and answers are generated from a seed. Training and test questions are about different documents.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import planted_long
from bench.planted_world import CAPITALS, DEVICES, URGENCIES, Row, Task, document, named, question
from bench.planted_world import settings as settings_of_tasks
from ragtune_ray import schema
from ragtune_ray.answering import pipeline
from ragtune_ray.cluster.comparing.compare import compare, read_comparison
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.evaluation.questions import check as questions
from ragtune_ray.generation import generator
from ragtune_ray.models import weights

SPLITS = {"train": 192, "validation": 16, "test": 80}
"""Number of questions per split."""


def changing_facts(seed: int) -> Task:
    """Gate codes of invented sites; after training, the codes of sites in the training split change."""
    source = random.Random(f"facts {seed}")
    documents, questions, changed_documents, changed_questions = [], [], [], []
    for split, number, name in named(source, SPLITS):
        code, later = source.sample(range(1000, 10_000), 2)
        documents.append(_site(name, code, source))
        questions.append(question(split, number, f"What is the gate code of the {name}?", [str(code)], documents[-1]))
        if split == "train" and number < SPLITS["test"]:
            changed_documents.append(_site(name, later, source))
            changed_questions.append({**questions[-1], "answers": [str(later)], "split": "test"})
    return Task(documents, questions, ("rag", "rag+ft"), (), tuple(changed_documents), tuple(changed_questions))


def house_form(seed: int) -> Task:
    """Ticket tags that are composed of words of the question."""
    source = random.Random(f"form {seed}")
    documents, questions = [], []
    for split, count in SPLITS.items():
        for number in range(count):
            device, floor = source.choice(DEVICES), source.randint(1, 9)
            urgency = source.choice(list(URGENCIES))
            text = f"A {device} on floor {floor} does not work. It is wanted {urgency}."
            documents.append(document(f"incident {split} {number}", text))
            asked = f"Ticket tag for a broken {device} on floor {floor}, wanted {urgency}?"
            answer = f"HD/{device}/F{floor}/{URGENCIES[urgency]}"
            questions.append(question(split, number, asked, [answer], documents[-1]))
    # 80 questions show arms with equal scores to be as good within .035.
    return Task(documents, questions, ("ft",), ("compare.margin=0.05",))


def facts_in_house_form(seed: int) -> Task:
    """Gate codes of invented sites, in an answer form that no document states."""
    source = random.Random(f"both {seed}")
    documents, questions = [], []
    for split, number, name in named(source, SPLITS):
        code = source.randint(1000, 9999)
        documents.append(_site(name, code, source))
        questions.append(
            question(split, number, f"What is the gate code of the {name}?", [f"GC/{code}/OK"], documents[-1])
        )
    return Task(documents, questions, ("rag+ft",))


def known_already(seed: int) -> Task:
    """Capitals that the base model names both with and without a passage, found by asking it."""
    source = random.Random(f"known {seed}")
    documents = {country: _capital(country) for country in CAPITALS}
    known = list(_known_capitals())
    source.shuffle(known)
    shares = {"train": known[: len(known) // 3], "validation": known[len(known) // 3 :][:6]}
    shares["test"] = known[len(known) // 3 + 6 :]
    questions = [
        question(split, number, f"What is the capital of {country}?", [CAPITALS[country]], documents[country])
        for split, part in shares.items()
        for number, country in enumerate(part)
    ]
    # 23 questions show arms with equal scores to be as good within .119.
    overrides = ("compare.metric=contains_answer", "compare.answers=100", "compare.margin=0.15")
    return Task(list(documents.values()), questions, ("base",), overrides)


def _capital(country: str) -> Row:
    return document(country, f"{CAPITALS[country]} is the capital of {country}.")


@functools.cache
def _known_capitals() -> tuple[str, ...]:
    """Return the countries whose capital the base model names from memory and also from the document."""
    settings = settings_of_tasks()
    loaded = generator.load_generator(settings.generator, weights.resolve(settings.generator.model).directory)
    known = set(CAPITALS)
    for arm in ("base", "rag"):
        of_arm = settings.using(f"answer.arm={arm}")
        tasks = []
        for country in CAPITALS:
            row = _capital(country)
            passage = schema.Passage(
                f"{row['document_id']}#0", row["document_id"], row["text"], country, "", 0, len(row["text"])
            )
            shown = (passage,) if arm == "rag" else ()
            query = schema.Query(country, f"What is the capital of {country}?", None, (), (), "all")
            tasks.append(pipeline.Task(query, shown, (1.0,) * len(shown)))
        rows = pipeline.answer_tasks(tasks, loaded, of_arm, "")
        known &= {row.query_id for row in rows if CAPITALS[row.query_id].lower() in row.answer.lower()}
    return tuple(country for country in CAPITALS if country in known)


SHORT_TASKS: dict[str, Callable[[int], Task]] = {
    "changing_facts": changing_facts,
    "house_form": house_form,
    "facts_in_house_form": facts_in_house_form,
    "known_already": known_already,
}
TASKS = {**SHORT_TASKS, **planted_long.TASKS}


def _site(name: str, code: int, source: random.Random) -> Row:
    people = source.randint(3, 90)
    return document(
        name,
        f"The {name} has {people} workers. The gate code of the {name} is {code}. It opens at {source.randint(5, 9)}.",
    )


def run(name: str, seed: int, workspace: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Generate a task, compare the arms on it, and return the comparison with the right arms."""
    task = TASKS[name](seed)
    folder = workspace / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        "corpus": task.documents,
        "queries": task.questions,
        "changes": task.changed_documents,
        "changed": task.changed_questions,
    }
    for kind, rows in written.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{kind}.jsonl").write_text(text, encoding="utf-8")
    changes = ("compare.changes_path={0}/changes.jsonl", "compare.changed_queries_path={0}/changed.jsonl")
    settings = settings_of_tasks().using(
        f"workspace={folder}",
        f"corpus.path={folder}/corpus.jsonl",
        f"queries.path={folder}/queries.jsonl",
        f"seed={seed}",
        *(change.format(folder) for change in changes if task.changed_documents),
        *task.overrides,
        *overrides,
    )
    if name in planted_long.TASKS:
        settings = settings.using(f"compare.metric={questions.check(settings).proposal.metric}", *overrides)
    started = time.monotonic()
    build_index(settings)
    found = read_comparison(compare(settings))
    return {**found, "right": task.right, "bench_seconds": time.monotonic() - started}


def main() -> None:
    """Run every task with every seed and print the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings such as cluster.gpus_per_worker=1")
    parser.add_argument("--kind", default="short", choices=["short", "long"], help="of the answers, without --tasks")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--workspace", type=Path, default=Path("workspace/planted"))
    options = parser.parse_args()
    lines = []
    for name in options.tasks or (planted_long.TASKS if options.kind == "long" else SHORT_TASKS):
        for seed in options.seeds:
            found = run(name, seed, options.workspace.resolve(), options.overrides)
            lines.append(_line(name, seed, found))
            print(lines[-1], flush=True)
    print("\n" + f"{'task':<26}{'seed':>4}  {'verdict':<26}{'':<7}quality of base, rag, ft, rag+ft")
    print("\n".join(lines))


def _line(name: str, seed: int, found: dict[str, Any]) -> str:
    verdict, metric = found["verdict"], found["metric"]
    shown = f"{verdict['arm']} ({verdict['outcome']})"
    mark = "right" if verdict["arm"] in found["right"] and verdict["outcome"] != "too_few_questions" else "WRONG"
    scores = " ".join(f"{arm['quality'][metric]['value']:.2f}" for arm in found["arms"].values())
    changed = [arm["freshness"]["changed"] for arm in found["arms"].values()]
    after = "  changed " + " ".join(f"{each['value']:.2f}" for each in changed) if all(changed) else ""
    return f"{name:<26}{seed:>4}  {shown:<26}{mark:<7}{metric} {scores}{after}  {found['bench_seconds']:.0f} s"


if __name__ == "__main__":
    main()
