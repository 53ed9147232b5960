"""Four tasks whose right verdict is known because they were made so; does `compare` find it?

    python -m bench.planted [--tasks changing_facts ...] [--seeds 0 1 2] [--workspace DIRECTORY]

| task | made so that | right verdict |
|---|---|---|
| changing_facts | invented facts that stand in documents alone; they change after training | rag or rag+ft |
| house_form | answers follow from the question in a form that no document states | ft |
| facts_in_house_form | answers are facts of documents, in a form that no document states | rag+ft |
| known_already | the base model answers, and so do all others | base |

Every corpus, question and answer comes from a seed. Documents of training and test questions are distinct. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragtune_ray import config
from ragtune_ray.cluster.comparing import compare, read_comparison
from ragtune_ray.cluster.corpus import build_index

SPLITS = {"train": 192, "validation": 16, "test": 80}
"""Questions of each."""
SYLLABLES = [
    "bra",
    "cor",
    "dal",
    "el",
    "fen",
    "gar",
    "hul",
    "ist",
    "jor",
    "kal",
    "lum",
    "mor",
    "nev",
    "ost",
    "pra",
    "quil",
    "ras",
    "sul",
    "tar",
    "ulm",
    "ver",
    "wol",
    "yar",
    "zen",
]
SITES = ["depot", "harbour", "station", "quarry", "mill", "archive", "clinic", "airfield", "orchard", "foundry"]
DEVICES = ["printer", "scanner", "router", "laptop", "phone", "monitor", "projector", "keyboard", "camera", "server"]
URGENCIES = {"today": "A", "this week": "B", "this month": "C"}
ANIMALS = [
    "dog",
    "cat",
    "horse",
    "cow",
    "pig",
    "sheep",
    "goat",
    "lion",
    "tiger",
    "bear",
    "wolf",
    "fox",
    "rabbit",
    "deer",
    "elephant",
    "monkey",
    "mouse",
    "rat",
    "snake",
    "frog",
    "duck",
    "chicken",
    "goose",
    "eagle",
    "owl",
    "parrot",
    "penguin",
    "whale",
    "dolphin",
    "shark",
    "salmon",
    "turtle",
    "lizard",
    "crocodile",
    "giraffe",
    "zebra",
    "camel",
    "kangaroo",
    "koala",
    "panda",
]
COUNTRIES = [
    "France",
    "Germany",
    "Spain",
    "Italy",
    "Portugal",
    "Norway",
    "Sweden",
    "Finland",
    "Denmark",
    "Poland",
    "Austria",
    "Hungary",
    "Greece",
    "Turkey",
    "Egypt",
    "Morocco",
    "Kenya",
    "Nigeria",
    "Ghana",
    "Ethiopia",
    "India",
    "China",
    "Japan",
    "Thailand",
    "Vietnam",
    "Indonesia",
    "Australia",
    "Canada",
    "Mexico",
    "Brazil",
    "Argentina",
    "Chile",
    "Peru",
    "Colombia",
    "Cuba",
    "Iran",
    "Iraq",
    "Israel",
    "Ireland",
    "Iceland",
]

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A corpus and its questions."""

    documents: list[Row]
    questions: list[Row]
    right: tuple[str, ...]
    """Arms that are right."""
    overrides: tuple[str, ...] = ()
    changed_documents: tuple[Row, ...] = ()
    changed_questions: tuple[Row, ...] = ()


def changing_facts(seed: int) -> Task:
    """Codes of invented sites; after training, the codes of the sites that were trained on change."""
    source = random.Random(f"facts {seed}")
    documents, questions, changed_documents, changed_questions = [], [], [], []
    for split, number, name in _named(source):
        code, later = source.sample(range(1000, 10_000), 2)
        documents.append(_site(name, code, source))
        questions.append(_asked(split, number, f"What is the gate code of the {name}?", str(code), documents[-1]))
        if split == "train" and number < SPLITS["test"]:
            changed_documents.append(_site(name, later, source))
            changed_questions.append({**questions[-1], "answers": [str(later)], "split": "test"})
    return Task(documents, questions, ("rag", "rag+ft"), (), tuple(changed_documents), tuple(changed_questions))


def house_form(seed: int) -> Task:
    """Ticket tags that are put together from the question's own words."""
    source = random.Random(f"form {seed}")
    documents, questions = [], []
    for split, count in SPLITS.items():
        for number in range(count):
            device, floor = source.choice(DEVICES), source.randint(1, 9)
            urgency = source.choice(list(URGENCIES))
            text = f"A {device} on floor {floor} does not work. It is wanted {urgency}."
            documents.append(_document(f"incident {split} {number}", text))
            asked = f"Ticket tag for a broken {device} on floor {floor}, wanted {urgency}?"
            answer = f"HD/{device}/F{floor}/{URGENCIES[urgency]}"
            questions.append(_asked(split, number, asked, answer, documents[-1]))
    return Task(documents, questions, ("ft",))


def facts_in_house_form(seed: int) -> Task:
    """Codes of invented sites, to be given in a form that stands nowhere."""
    source = random.Random(f"both {seed}")
    documents, questions = [], []
    for split, number, name in _named(source):
        code = source.randint(1000, 9999)
        documents.append(_site(name, code, source))
        questions.append(_asked(split, number, f"What is the gate code of the {name}?", f"GC/{code}/OK", documents[-1]))
    return Task(documents, questions, ("rag+ft",))


def known_already(seed: int) -> Task:
    """Questions that name the possible answers, of things that the smallest model knows."""
    source = random.Random(f"known {seed}")
    things = [(name, "animal") for name in ANIMALS] + [(name, "country") for name in COUNTRIES]
    documents = [_document(name, f"{name.capitalize()} is a well-known {kind}.") for name, kind in things]
    source.shuffle(things)
    questions = []
    shares = {"train": things[:30], "validation": things[30:36], "test": things[36:]}
    for split, part in shares.items():
        for number, (name, kind) in enumerate(part):
            document = next(row for row in documents if row["title"] == name)
            questions.append(_asked(split, number, f"Is {name} an animal or a country?", kind, document))
    return Task(documents, questions, ("base",), ("compare.metric=contains_answer", "compare.answers=1000"))


TASKS: dict[str, Callable[[int], Task]] = {
    "changing_facts": changing_facts,
    "house_form": house_form,
    "facts_in_house_form": facts_in_house_form,
    "known_already": known_already,
}


def _named(source: random.Random) -> Iterable[tuple[str, int, str]]:
    names = set[str]()
    for split, count in SPLITS.items():
        for number in range(count):
            while (name := _name(source)) in names:
                pass
            names.add(name)
            yield split, number, name


def _name(source: random.Random) -> str:
    return f"{''.join(source.sample(SYLLABLES, 2)).capitalize()} {source.choice(SITES)}"


def _site(name: str, code: int, source: random.Random) -> Row:
    people = source.randint(3, 90)
    return _document(
        name,
        f"The {name} has {people} workers. The gate code of the {name} is {code}. It opens at {source.randint(5, 9)}.",
    )


def _document(title: str, text: str) -> Row:
    return {"document_id": title.replace(" ", "-"), "title": title, "text": text}


def _asked(split: str, number: int, text: str, answer: str, document: Row) -> Row:
    return {
        "query_id": f"{split}-{number}",
        "text": text,
        "answers": [answer],
        "split": split,
        "document_ids": [document["document_id"]],
    }


def run(name: str, seed: int, workspace: Path) -> dict[str, Any]:
    """Make a task, compare the arms on it; the comparison, with what was right."""
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
    settings = config.Config().using(
        f"workspace={folder}",
        f"corpus.path={folder}/corpus.jsonl",
        f"queries.path={folder}/queries.jsonl",
        f"seed={seed}",
        "retrieval.top_k=1",
        "generator.max_new_tokens=16",
        "generator.stop=['\\n']",
        "training.batch_examples=4",
        "training.learning_rate=1e-4",
        "training.gold_left_out_share=0",
        "training.cite=false",
        "training.evaluate_steps=1000",
        "training.checkpoint_steps=1000",
        "compare.latency_queries=5",
        *(change.format(folder) for change in changes if task.changed_documents),
        *task.overrides,
    )
    started = time.monotonic()
    build_index(settings)
    found = read_comparison(compare(settings))
    return {**found, "right": task.right, "bench_seconds": time.monotonic() - started}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--workspace", type=Path, default=Path("workspace/planted"))
    options = parser.parse_args()
    lines = []
    for name in options.tasks:
        for seed in options.seeds:
            found = run(name, seed, options.workspace.resolve())
            lines.append(_line(name, seed, found))
            print(lines[-1], flush=True)
    print("\n" + f"{'task':<20}{'seed':>4}  {'verdict':<26}{'':<7}quality of base, rag, ft, rag+ft")
    print("\n".join(lines))


def _line(name: str, seed: int, found: dict[str, Any]) -> str:
    verdict, metric = found["verdict"], found["metric"]
    shown = f"{verdict['arm']} ({verdict['outcome']})"
    mark = "right" if verdict["arm"] in found["right"] and verdict["outcome"] != "too_few_questions" else "WRONG"
    scores = " ".join(f"{arm['quality'][metric]['value']:.2f}" for arm in found["arms"].values())
    changed = [arm["freshness"]["changed"] for arm in found["arms"].values()]
    after = "  changed " + " ".join(f"{each['value']:.2f}" for each in changed) if all(changed) else ""
    return f"{name:<20}{seed:>4}  {shown:<26}{mark:<7}{metric} {scores}{after}  {found['bench_seconds']:.0f} s"


if __name__ == "__main__":
    main()
