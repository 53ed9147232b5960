"""The planted tasks whose answers are sentences of 15 to 40 words, each with several wordings of which any is right.

Each training answer has one of the two usual wordings; a test question has all four as gold answers.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

from bench.planted_world import CAPITALS, DEVICES, SYLLABLES, URGENCIES, Row, Task, document, named, question, settings
from ragtune_ray import schema
from ragtune_ray.answering import pipeline
from ragtune_ray.generation import generator
from ragtune_ray.models import weights

SPLITS = {"train": 32, "validation": 4, "test": 30}
"""Number of questions per split, where dearer arms are better."""
STYLE_SPLITS = {**SPLITS, "train": 96, "test": 40}
"""The same where a dearer arm is no better: within a margin of .1, that shows only from about 30 questions without any spread.
Which team takes a note is learned from more examples than a wording is."""
USUAL = 2
"""Number of wordings that training answers have."""
CHANGED = 10
"""Number of training questions whose answers change."""
KNOWN_TEST, KNOWN_VALIDATION = 40, 2
"""Fewest questions to which the base model's own reply is right; those that are left train."""
FEWEST_WORDS, MOST_WORDS = 15, 40
OVERRIDES = (
    "generator.max_new_tokens=56",
    "compare.gold_passages=false",
    "compare.margin=0.1",
    "compare.latency_queries=1",
    "training.learning_rate=2e-4",
    'prompt.system="Answer the question in one full sentence from the passages."',
    'prompt.system_without_passages="Answer the question in one full sentence."',
)
"""Settings of all long tasks: what `ragtune init` does for long answers, and less measuring."""
WAYS_IN = (
    (
        "Lorries enter the {name} by the {gate} gate with the code {code}, and the driver then reports to {person} in the"
        " office."
    ),
    "To get into the {name}, drive to the {gate} gate, type in the code {code} there, and ask for {person}.",
    "You come in through the {gate} gate of the {name}: its code is {code}, and {person} is the person to report to.",
    (
        "Use the {gate} gate, which opens with {code}, and once you are inside the {name}, let {person} know that you are"
        " there."
    ),
)
ABOUT_CAPITALS = (
    "What is the capital of {country}, and in which part of the world does {country} lie?",
    "Which city is the capital of {country}, and what is it known for?",
    "Name the capital of {country} and say one thing about it.",
    "What should a traveller know about the capital of {country}?",
)
REPLIES = (
    (
        "Thank you for telling us about the {device} on floor {floor}; team {team} will look at it {urgency}, and there is"
        " nothing else that you need to do."
    ),
    (
        "We have passed your note on the {device} of floor {floor} to team {team}, who will come {urgency}, so please leave it"
        " as it is."
    ),
    (
        "Team {team} takes care of the {device} on floor {floor} and will be with you {urgency}; until then please do not try"
        " to repair it."
    ),
    (
        "Your {device} on floor {floor} is now on the list of team {team}, and somebody will see to it {urgency} without a"
        " further request."
    ),
)


def changing_facts(seed: int) -> Task:
    """Ways into invented sites; after training, those of sites in the training split change."""
    source = random.Random(f"long facts {seed}")
    documents, questions, changed_documents, changed_questions = [], [], [], []
    for split, number, name in named(source, SPLITS):
        now, later = _facts(name, source), _facts(name, source)
        documents.append(document(name, _told(now, source)))
        questions.append(_way_in(split, number, now, source, documents[-1]))
        if split == "train" and number < CHANGED:
            changed_documents.append(document(name, _told(later, source)))
            changed_questions.append(
                {**_way_in("test", number, later, source, documents[-1]), "query_id": f"later-{number}"}
            )
    return Task(documents, questions, ("rag", "rag+ft"), OVERRIDES, tuple(changed_documents), tuple(changed_questions))


def facts_in_house_style(seed: int) -> Task:
    """Ways into invented sites; documents are records, and none states them in the form of the answers."""
    source = random.Random(f"long both {seed}")
    documents, questions = [], []
    for split, number, name in named(source, SPLITS):
        facts = _facts(name, source)
        record = "{name}. Entrance: {gate}. Code: {code}. Contact: {person}. Workers: {people}.".format(
            **facts, people=source.randint(3, 90)
        )
        documents.append(document(name, record))
        questions.append(_way_in(split, number, facts, source, documents[-1]))
    return Task(documents, questions, ("rag+ft",), OVERRIDES)


def house_style(seed: int) -> Task:
    """Replies to notes about broken devices; they follow from the note, in a style that no document states."""
    source = random.Random(f"long form {seed}")
    documents, questions = [], []
    for split, count in STYLE_SPLITS.items():
        for number in range(count):
            device, floor = source.choice(DEVICES), source.randint(1, 9)
            urgency = source.choice(list(URGENCIES))
            text = f"A {device} on floor {floor} does not work. It is wanted {urgency}."
            documents.append(document(f"incident {split} {number}", text))
            asked = f"Our {device} on floor {floor} is broken, and we want it {urgency}. What do you reply?"
            words = {"device": device, "floor": floor, "urgency": urgency, "team": URGENCIES[urgency]}
            questions.append(question(split, number, asked, _wordings(REPLIES, words, split, source), documents[-1]))
    return Task(documents, questions, ("ft",), OVERRIDES)


def known_already(seed: int) -> Task:
    """Sentences on capitals that the base model says from memory, found by asking it, as they are and in two other wordings."""
    source = random.Random(f"long known {seed}")
    by_country: dict[str, list[tuple[str, str]]] = {}
    for (country, asked), reply in _known_replies().items():
        by_country.setdefault(country, []).append((asked, reply))
    countries = list(by_country)
    source.shuffle(countries)
    documents = {
        country: document(country, f"{capital} is the capital of {country}.") for country, capital in CAPITALS.items()
    }
    questions = []
    counts = {"test": 0, "validation": 0, "train": 0}
    fewest = {"test": KNOWN_TEST, "validation": KNOWN_VALIDATION, "train": len(countries) * len(ABOUT_CAPITALS)}
    for country in countries:  # all questions about one are in one split, the first that is not yet full
        split = next(name for name, count in counts.items() if count < fewest[name])
        for asked, reply in by_country[country]:
            begun = reply.rstrip(".")
            wordings = [reply, f"{begun}, as every atlas of the world will tell you.", f"As far as we know, {begun}."]
            answers = wordings if split == "test" else [source.choice(wordings[:USUAL])]
            text = asked.format(country=country)
            questions.append(question(split, counts[split], text, answers, documents[country]))
            counts[split] += 1
    return Task(list(documents.values()), questions, ("base",), (*OVERRIDES, "compare.answers=1000"))


@functools.cache
def _known_replies() -> dict[tuple[str, str], str]:
    """Country and question -> what the base model replies from memory, where it names the capital in 15 to 40 words."""
    given = settings().using(*OVERRIDES, "answer.arm=base")
    loaded = generator.load_generator(given.generator, weights.resolve(given.generator.model).directory)
    asked = {
        f"{country}|{number}": (country, text) for country in CAPITALS for number, text in enumerate(ABOUT_CAPITALS)
    }
    queries = [
        schema.Query(name, text.format(country=country), None, (), (), "all") for name, (country, text) in asked.items()
    ]
    rows = pipeline.answer_tasks([pipeline.Task(query, (), ()) for query in queries], loaded, given, "")
    return {
        asked[row.query_id]: row.answer
        for row in rows
        if CAPITALS[asked[row.query_id][0]] in row.answer and FEWEST_WORDS <= len(row.answer.split()) <= MOST_WORDS
    }


def _facts(name: str, source: random.Random) -> Row:
    gate, person = (f"{''.join(source.sample(SYLLABLES, 2))}".capitalize() for _ in range(2))
    return {"name": name, "gate": gate, "person": person, "code": source.randint(1000, 9999)}


def _told(facts: Row, source: random.Random) -> str:
    """The facts in prose, as a document tells them."""
    return (
        "The {name} has {people} workers and opens at {hour}. Lorries enter the {name} by the {gate} gate. The code of this gate"
        " is {code}. Drivers report to {person} in the office."
    ).format(**facts, people=source.randint(3, 90), hour=source.randint(5, 9))


def _way_in(split: str, number: int, facts: Row, source: random.Random, about: Row) -> Row:
    asked = f"How does a lorry get into the {facts['name']}?"
    return question(split, number, asked, _wordings(WAYS_IN, facts, split, source), about)


def _wordings(templates: tuple[str, ...], words: Row, split: str, source: random.Random) -> list[str]:
    chosen = templates if split == "test" else (source.choice(templates[:USUAL]),)
    return [template.format(**words) for template in chosen]


TASKS: dict[str, Callable[[int], Task]] = {
    "long_changing_facts": changing_facts,
    "long_house_style": house_style,
    "long_facts_in_house_style": facts_in_house_style,
    "long_known_already": known_already,
}
