"""What the tasks of `bench.planted` are made of: invented names, capitals, documents and questions."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ragtune_ray import config

SYLLABLES = [
    "bra", "cor", "dal", "el", "fen", "gar", "hul", "ist", "jor", "kal", "lum", "mor", "nev", "ost", "pra", "quil",
    "ras", "sul", "tar", "ulm", "ver", "wol", "yar", "zen",
]  # fmt: skip
SITES = ["depot", "harbour", "station", "quarry", "mill", "archive", "clinic", "airfield", "orchard", "foundry"]
DEVICES = ["printer", "scanner", "router", "laptop", "phone", "monitor", "projector", "keyboard", "camera", "server"]
URGENCIES = {"today": "A", "this week": "B", "this month": "C"}
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome", "Portugal": "Lisbon",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Poland": "Warsaw",
    "Austria": "Vienna", "Hungary": "Budapest", "Greece": "Athens", "Turkey": "Ankara", "Egypt": "Cairo",
    "Morocco": "Rabat", "Kenya": "Nairobi", "Nigeria": "Abuja", "Ghana": "Accra", "Ethiopia": "Addis Ababa",
    "India": "New Delhi", "China": "Beijing", "Japan": "Tokyo", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Indonesia": "Jakarta", "Australia": "Canberra", "Canada": "Ottawa", "Mexico": "Mexico City",
    "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Chile": "Santiago", "Peru": "Lima", "Colombia": "Bogota",
    "Cuba": "Havana", "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin", "Iceland": "Reykjavik",
    "Russia": "Moscow", "Ukraine": "Kyiv", "Romania": "Bucharest", "Bulgaria": "Sofia", "Serbia": "Belgrade",
    "Croatia": "Zagreb", "Slovenia": "Ljubljana", "Slovakia": "Bratislava", "Czechia": "Prague",
    "Belgium": "Brussels", "the Netherlands": "Amsterdam", "Switzerland": "Bern", "Luxembourg": "Luxembourg",
    "Estonia": "Tallinn", "Latvia": "Riga", "Lithuania": "Vilnius", "Belarus": "Minsk", "Albania": "Tirana",
    "Malta": "Valletta", "Cyprus": "Nicosia", "Lebanon": "Beirut", "Syria": "Damascus", "Jordan": "Amman",
    "Saudi Arabia": "Riyadh", "Qatar": "Doha", "Kuwait": "Kuwait City", "Oman": "Muscat", "Yemen": "Sanaa",
    "Pakistan": "Islamabad", "Afghanistan": "Kabul", "Bangladesh": "Dhaka", "Nepal": "Kathmandu", "Bhutan": "Thimphu",
    "Sri Lanka": "Colombo", "Myanmar": "Naypyidaw", "Cambodia": "Phnom Penh", "Laos": "Vientiane",
    "Malaysia": "Kuala Lumpur", "Singapore": "Singapore", "the Philippines": "Manila", "South Korea": "Seoul",
    "North Korea": "Pyongyang", "Mongolia": "Ulaanbaatar", "New Zealand": "Wellington", "Fiji": "Suva",
    "Tunisia": "Tunis", "Algeria": "Algiers", "Libya": "Tripoli", "Sudan": "Khartoum", "Somalia": "Mogadishu",
    "Uganda": "Kampala", "Rwanda": "Kigali", "Zambia": "Lusaka", "Zimbabwe": "Harare", "Angola": "Luanda",
    "Senegal": "Dakar", "Mali": "Bamako", "Cameroon": "Yaounde", "Namibia": "Windhoek", "Botswana": "Gaborone",
    "Venezuela": "Caracas", "Ecuador": "Quito", "Paraguay": "Asuncion", "Uruguay": "Montevideo",
    "Panama": "Panama City", "Costa Rica": "San Jose", "Nicaragua": "Managua", "Honduras": "Tegucigalpa",
    "Guatemala": "Guatemala City", "Jamaica": "Kingston", "Haiti": "Port-au-Prince",
    "the Dominican Republic": "Santo Domingo", "Armenia": "Yerevan", "Georgia": "Tbilisi", "Azerbaijan": "Baku",
    "Kazakhstan": "Astana", "Uzbekistan": "Tashkent",
}  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A corpus and its questions."""

    documents: list[Row]
    questions: list[Row]
    right: tuple[str, ...]
    """Arms that are a right verdict."""
    overrides: tuple[str, ...] = ()
    changed_documents: tuple[Row, ...] = ()
    changed_questions: tuple[Row, ...] = ()


def named(source: random.Random, splits: Mapping[str, int]) -> Iterable[tuple[str, int, str]]:
    """Split, number in it and an invented name of a site, for every question; no name occurs twice."""
    names = set[str]()
    for split, count in splits.items():
        for number in range(count):
            while (name := _name(source)) in names:
                pass
            names.add(name)
            yield split, number, name


def _name(source: random.Random) -> str:
    return f"{''.join(source.sample(SYLLABLES, 2)).capitalize()} {source.choice(SITES)}"


def document(title: str, text: str) -> Row:
    """A row of the corpus."""
    return {"document_id": title.replace(" ", "-"), "title": title, "text": text}


def question(split: str, number: int, text: str, answers: Sequence[str], about: Row) -> Row:
    """A question about a document, with its gold answers."""
    return {
        "query_id": f"{split}-{number}",
        "text": text,
        "answers": list(answers),
        "split": split,
        "document_ids": [about["document_id"]],
    }


def settings() -> config.Config:
    """The settings of all tasks."""
    return config.Config().using(
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
    )
