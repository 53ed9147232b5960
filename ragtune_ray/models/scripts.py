"""Measures which scripts an encoder knows: can it tell a passage from its neighbours by one sentence of it?

An encoder that was trained on English maps all Chinese texts to nearly the same vector, and nothing in its files says so.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypedDict

import numpy as np

from ragtune_ray.models.encoder import Encoder

PROBED_PASSAGES = 24
"""Passages of one script whose sentences are encoded, per unit of an index build."""
FEWEST_PASSAGES = 8
"""A script with fewer passages in a unit is not measured there."""
FEWEST_JUDGED = 16
"""A script is judged on at least this many passages of the index."""
NEAREST = 3
"""A passage is found if it is among this many nearest to its sentence: several passages may be about the same thing."""
KNOWN_SHARE = 0.75
"""An encoder knows a script if it finds at least this share of the passages. With MiniLM it is .88 to 1.00 in two English corpora
and .54 in a Chinese one."""
READ_CHARACTERS = 400
"""The script of a text is that of most letters among this many first characters."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？؟।])")


class ScriptFacts(TypedDict):
    """What was measured for one script."""

    passages: int
    """Passages that were looked for."""
    found: int
    """Of these, how many were among the `NEAREST` to their sentence, or a passage with the same text was."""


def script_of(text: str) -> str:
    """Return the script of most letters, as in their Unicode names; "" if there are no letters.

    >>> script_of("What is BM25?"), script_of("BM25 是什么算法?"), script_of("42")
    ('LATIN', 'CJK', '')
    """
    counts = Counter(_script(character) for character in text[:READ_CHARACTERS] if character.isalpha())
    return max(sorted(counts), key=counts.__getitem__, default="")


@cache
def _script(character: str) -> str:
    return unicodedata.name(unicodedata.normalize("NFKC", character)[0], "").partition(" ")[0]


def probe(encoder: Encoder, texts: Sequence[str], vectors: np.ndarray) -> dict[str, ScriptFacts]:
    """Look for some passages by one of their sentences, among all passages of the same script.

    Args:
        encoder: encodes the sentences as queries.
        texts: of neighbouring passages.
        vectors: (num_texts, dimension) of the passages.

    Returns:
        Script -> what was found, for each script with at least `FEWEST_PASSAGES` passages.
    """
    scripts = np.array([script_of(text) for text in texts], dtype=object)
    found: dict[str, ScriptFacts] = {}
    for script in sorted(set(scripts) - {""}):
        places = np.flatnonzero(scripts == script)
        if len(places) < FEWEST_PASSAGES:
            continue
        chosen = np.unique(np.linspace(0, len(places) - 1, min(PROBED_PASSAGES, len(places))).astype(int))
        sentences = encoder.encode_queries([_sentence(texts[places[place]]) for place in chosen])
        # Equal scores do not count: an encoder may map all texts of a script to one vector.
        nearest = np.argsort(-(sentences @ vectors[places].T), axis=1, kind="stable")[:, :NEAREST]
        are_found = (
            texts[place] in {texts[other] for other in others}  # a passage with the same text is as good
            for place, others in zip(places[chosen], places[nearest], strict=True)
        )
        found[script] = {"passages": len(chosen), "found": sum(are_found)}
    return found


def _sentence(text: str) -> str:
    """Return the longest sentence of a text, or the first half of a text that is one sentence.

    A short sentence often says nothing without the ones before it.
    """
    sentences = [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence.strip()]
    if len(sentences) < 2:
        return text[: (len(text) + 1) // 2]
    return max(sentences, key=len)


def add_facts(parts: Sequence[Mapping[str, ScriptFacts]]) -> dict[str, ScriptFacts]:
    """Add what several probes found.

    >>> add_facts([{"CJK": {"passages": 32, "found": 5}}, {"CJK": {"passages": 8, "found": 1}}])
    {'CJK': {'passages': 40, 'found': 6}}
    """
    return {
        script: {
            "passages": sum(part[script]["passages"] for part in parts if script in part),
            "found": sum(part[script]["found"] for part in parts if script in part),
        }
        for script in sorted({script for part in parts for script in part})
    }


def unknown_scripts(facts: Mapping[str, ScriptFacts]) -> frozenset[str]:
    """Return the scripts that the encoder does not know.

    >>> unknown_scripts({"CJK": {"passages": 40, "found": 6}, "LATIN": {"passages": 40, "found": 39}})
    frozenset({'CJK'})
    """
    return frozenset(
        name
        for name, fact in facts.items()
        if fact["passages"] >= FEWEST_JUDGED and fact["found"] < KNOWN_SHARE * fact["passages"]
    )
