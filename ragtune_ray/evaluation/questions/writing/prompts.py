"""What the generator is asked: to write a question, and to answer one with and without its passage.

Each kind has one worked example, as an earlier exchange: it shows the form to large models, and small ones write nothing usable
without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ragtune_ray.config.evaluation import QuestionKind
from ragtune_ray.evaluation.grading.asking import Request
from ragtune_ray.evaluation.questions.writing.drafts import Draft, draft_of
from ragtune_ray.schema import Passage

VERSION: Final = 1
"""Part of every question's provenance and of a run's identity: raise it with any change of a prompt."""

_BEGINNING = "You are shown a passage of a document. Write a question about it, for a test of a search system. "
_RULES = (
    "The question names whom or what it is about, so that a reader who has never seen the passage understands it: no words such "
    'as "the passage", "the text" or "according to", and no pronoun without its noun. It uses other words than the passage '
    "where it can, does not give its own answer away, cannot be answered by yes or no, and asks for something that readers of "
    "such documents want to know. Question and answer are in the language of the passage. "
)
_EVIDENCE = '"evidence" is a list of the sentences of the passage on which the answer rests, copied letter by letter. '
_TASKS: dict[QuestionKind, str] = {
    "fact": (
        f'{_BEGINNING}It asks for one fact, and "answer" is a short phrase, copied from the passage, that answers it completely. '
    ),
    "sentences": (
        f"{_BEGINNING}It takes two to four sentences to answer: how something works, why it is so, what steps or conditions "
        'there are. "answer" is that answer, in whole sentences, with nothing that the passage does not say. '
    ),
    "comparison": (
        "You are shown passages of two documents. Write a question, for a test of a search system, that compares what they are "
        "about and that nobody can answer from one of them alone: which is larger, older, cheaper or allowed, or how they differ "
        'in one respect. "answer" is a short phrase or one sentence. "evidence" has at least one sentence of each passage. '
    ),
    "unanswerable": (
        "You are shown a passage of a document. Write a question, for a test of whether a system admits what it does not know: a "
        "reader of the passage could well ask it, and it is about the same subject and names it, but the passage does not answer "
        "it, and other documents of the same collection probably do not either. "
    ),
    "follow_up": (
        "You are shown a passage of a document. Write a conversation of two questions about it, for a test of a search system. "
        '"first_question" and "first_answer" begin it. "question" continues it as people do, with a pronoun or with words left '
        'out, so that only someone who knows the first one understands it. "standalone" is the same question in full. "answer", '
        "to this question, is a short phrase copied from the passage. "
    ),
}
_FIELDS: dict[QuestionKind, tuple[str, ...]] = {
    "fact": ("question", "answer", "evidence"),
    "sentences": ("question", "answer", "evidence"),
    "comparison": ("question", "answer", "evidence"),
    "unanswerable": ("question",),
    "follow_up": ("first_question", "first_answer", "question", "standalone", "answer", "evidence"),
}
_TOWER = (
    "The Eiffel Tower in Paris was completed in 1889 by Gustave Eiffel's company. It is 330 metres high. Its paint is renewed "
    "about every seven years. Without paint the iron would rust."
)
_OTHER_TOWER = "Tokyo Tower was opened in 1958. It is 333 metres high and carries antennas for radio and television."
_EXAMPLES: dict[QuestionKind, dict[str, Any]] = {
    "fact": {
        "question": "In which year was the Eiffel Tower finished?",
        "answer": "1889",
        "evidence": ["The Eiffel Tower in Paris was completed in 1889 by Gustave Eiffel's company."],
    },
    "sentences": {
        "question": "How is the Eiffel Tower kept from decay?",
        "answer": "The tower gets new paint about every seven years. The paint keeps its iron from rusting.",
        "evidence": ["Its paint is renewed about every seven years.", "Without paint the iron would rust."],
    },
    "comparison": {
        "question": "Which is taller, the Eiffel Tower or Tokyo Tower, and by how much?",
        "answer": "Tokyo Tower, by 3 metres",
        "evidence": ["It is 330 metres high.", "It is 333 metres high and carries antennas for radio and television."],
    },
    "unanswerable": {"question": "How many visitors may be at the top of the Eiffel Tower at the same time?"},
    "follow_up": {
        "first_question": "How tall is the Eiffel Tower?",
        "first_answer": "330 metres",
        "question": "And who built it?",
        "standalone": "Who built the Eiffel Tower?",
        "answer": "Gustave Eiffel's company",
        "evidence": ["The Eiffel Tower in Paris was completed in 1889 by Gustave Eiffel's company."],
    },
}

ASK = "Write a quiz question about a fact in this passage."
"""Sent in place of a question where the reply is plain text (`plain_instruction`)."""
ANSWER_ALONE = (
    "Answer the question from your own knowledge, in as few words as possible. Do not guess: if you do not know, say: "
    "I don't know."
)
"""The check that a question needs its passage."""
ANSWER_FROM_PASSAGES = (
    "Answer the question from the passages alone, in as few words as possible; where the question asks how or why, in a few "
    "sentences. Use the language of the question. If the passages do not contain the answer, say: I don't know."
)
"""The check that a passage answers a question, or that none does."""


def request_for(kind: QuestionKind, passages: Sequence[Passage]) -> Request[Draft]:
    """What asks for a question of a kind about a passage, or about two for a comparison."""
    fields = _FIELDS[kind]
    form = ", ".join(f'"{name}": {"[...]" if name == "evidence" else "..."}' for name in fields)
    evidence = _EVIDENCE if "evidence" in fields else ""
    towers = [{"text": _TOWER}, {"text": _OTHER_TOWER}] if kind == "comparison" else [{"text": _TOWER}]
    shown = [
        {"title": each.title, "text": each.text.strip()} if each.title else {"text": each.text.strip()}
        for each in passages
    ]
    return Request(
        f"{_TASKS[kind]}{_RULES}{evidence}Reply with one JSON object and nothing else: {{{form}}}",
        {"passages": shown},
        _schema(fields),
        lambda found: draft_of(kind, found),
        (({"passages": towers}, _EXAMPLES[kind]),),
    )


def plain_instruction() -> str:
    """The system message that asks for a question about a fact, and for nothing else, as plain text.

    `tune.mode=domain` sends it: the model that it tunes may be too small to write JSON, and answers in a request of its own. The
    examples are for such models; without them, SmolLM2 asks what the answer to the question is.
    """
    return (
        "You are shown a passage. Write one short question, in its language, whose answer is a short phrase of it. Name whom or "
        f"what the question is about. Write the question and nothing else. For example, of {_TOWER!r} one could ask: "
        f'{_EXAMPLES["fact"]["question"]} Of "An octopus has three hearts and blue blood." one could ask: How many hearts does '
        "an octopus have?"
    )


def _schema(fields: Sequence[str]) -> dict[str, Any]:
    text: dict[str, Any] = {"type": "string"}
    texts: dict[str, Any] = {"type": "array", "items": text}
    return {
        "type": "object",
        "properties": {name: texts if name == "evidence" else text for name in fields},
        "required": list(fields),
        "additionalProperties": False,
    }
