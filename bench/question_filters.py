"""How strict the filters of `ragtune questions` are: questions that people wrote should pass, planted mistakes should not.

    python -m bench.question_filters                      # data/space, and SQuAD and CMRC 2018 where they are beside the project

For each corpus: the share of people's questions that each filter throws out, given their answer and the sentence that contains
it; the share of planted mistakes that are thrown out, by their own filter and by any; and what the rule of near duplicates does.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np

from ragtune_ray import config
from ragtune_ray.config import Language
from ragtune_ray.config.evaluation import Questions
from ragtune_ray.evaluation.questions.writing.agreement import says_the_same
from ragtune_ray.evaluation.questions.writing.drafts import Draft
from ragtune_ray.evaluation.questions.writing.drawing import Seed
from ragtune_ray.evaluation.questions.writing.filters import Reason, draft_problem
from ragtune_ray.evaluation.questions.writing.making import Outcome
from ragtune_ray.evaluation.questions.writing.selection import select
from ragtune_ray.ingest.queries import read_queries
from ragtune_ray.ingest.rows import squad_contexts
from ragtune_ray.models.encoder import load_encoder
from ragtune_ray.schema import Passage, Query

SHARED = Path("../shared/data")
CORPORA: dict[str, tuple[Path, Language]] = {
    "space (English)": (Path("data/space/questions.jsonl"), "en"),
    "SQuAD (English)": (SHARED / "squad/squad-v1.1-24articles.json", "en"),
    "CMRC 2018 (Chinese)": (SHARED / "cmrc2018/cmrc2018_trial.json", "zh"),
}
_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？]?")


def documents_of(path: Path) -> dict[str, str]:
    """Document id -> text."""
    if path.name == "questions.jsonl":
        return {file.name: file.read_text(encoding="utf-8") for file in (path.parent / "documents").glob("*.md")}
    return {each.document_id: each.text for each in squad_contexts(json.loads(path.read_text(encoding="utf-8")))}


def written(query: Query, text: str) -> Draft | None:
    """The draft that a perfect generator would have made of a question; None if the document contains no answer."""
    answer = next((each for each in query.answers or () if each in text), None)
    if answer is None:
        return None
    sentence = next((found[0].strip() for found in _SENTENCE.finditer(text) if answer in found[0]), "")
    return Draft(query.text, answer, (sentence,)) if len(sentence) > len(answer) else None


def mistakes(draft: Draft, other: str) -> dict[str, tuple[Draft, Reason]]:
    """Planted mistakes, each with the filter that should see it."""
    asked, sentence = draft.question.rstrip("?？"), draft.evidence[0]
    middle = len(sentence) // 2
    changed = sentence[:middle] + ("7" if sentence[middle] != "7" else "8") + sentence[middle + 1 :]
    end = draft.question[-1]
    return {
        "sentence as question": (
            Draft(sentence.rstrip(".。") + end, draft.answer, draft.evidence),
            "copies the passage",
        ),
        "sentence with a gap": (
            Draft(sentence.rstrip(".。").replace(draft.answer, "what", 1) + end, draft.answer, draft.evidence),
            "copies the passage",
        ),
        "answer in question": (
            Draft(f"{asked}{'，' if end == '？' else ', '}{draft.answer}{end}", draft.answer, draft.evidence),
            "gives its answer away",
        ),
        "points at passage": (
            Draft(
                f"{'根据这段文字，' if end == '？' else 'According to the passage, '}{draft.question}",
                draft.answer,
                draft.evidence,
            ),
            "points at the passage",
        ),
        "evidence changed": (Draft(draft.question, draft.answer, (changed,)), "evidence is not in the passage"),
        "answer of another": (Draft(draft.question, other, draft.evidence), "answer is not in the passage"),
    }


def measure(name: str, path: Path, language: Language, limit: int) -> None:
    """Print the figures of a corpus."""
    texts = documents_of(path)
    asked = [
        row for row in read_queries(str(path)) if isinstance(row, Query) and row.answers and row.text[-1:] in "?？"
    ]
    random.Random(0).shuffle(asked)
    rule = Questions()
    reasons = Counter[str]()
    drafts: list[Draft] = []
    seen: dict[int, str] = {}
    caught: dict[str, Counter[str]] = {}
    for query in asked:
        text = texts[query.document_ids[0]]
        draft = written(query, text)
        if draft is None or len(drafts) == limit:
            continue
        passage = Passage("d#0", "d", text, "", "{}", 0, len(text))
        reason = draft_problem(draft, "fact", [passage], rule, language, "strict")
        reasons[reason or "kept"] += 1
        if reason is None:
            other = next((each.answer for each in drafts if each.answer not in text), "Zanzibar")
            for mistake, (bad, expected) in mistakes(draft, other).items():
                found = draft_problem(bad, "fact", [passage], rule, language, "strict")
                caught.setdefault(mistake, Counter()).update(
                    ["all", *(["any"] if found else []), *(["own"] if found == expected else [])]
                )
        drafts.append(draft)
        seen[len(drafts) - 1] = query.document_ids[0]
    print(f"\n{name}: {len(drafts)} questions of people")
    print("  thrown out:", {key: f"{count / len(drafts):.3f}" for key, count in reasons.most_common()})
    for mistake, counts in caught.items():
        print(
            f"  {mistake:<22} caught {counts['any'] / counts['all']:.3f}, by its own filter {counts['own'] / counts['all']:.3f}"
        )
    near_duplicates(drafts, list(seen.values()), language)


def near_duplicates(drafts: list[Draft], documents: list[str], language: Language) -> None:
    """How many questions of people have an earlier neighbour above a cosine, and how many of them the rule throws out."""
    encode = load_encoder(config.Encoder()).encode_queries
    vectors = encode([draft.question for draft in drafts])
    cosines = np.tril(vectors @ vectors.T, -1)
    for threshold in (0.75, 0.8, 0.85, 0.9, 0.95):
        near = [np.flatnonzero(row >= threshold) for row in cosines]
        answers = [draft.answer for draft in drafts]
        twins = [
            any(says_the_same(answers[row], [answers[n]], language) for n in each) for row, each in enumerate(near)
        ]
        outcomes = [
            Outcome(Seed("fact", (f"{name}#0",)), draft, None) for draft, name in zip(drafts, documents, strict=True)
        ]
        rule = Questions(near_duplicate=threshold, per_document=len(drafts))
        chosen = select(outcomes, {"fact": len(drafts)}, rule, language, "strict", encode)
        thrown = [outcome.draft.question for outcome, _ in chosen.refused if outcome.draft]
        close = sum(bool(len(each)) for each in near) / len(drafts)
        print(
            f"  cosine >= {threshold}: {close:.3f} have a neighbour, {sum(twins) / len(drafts):.4f} one with the same answer; "
            f"thrown out {len(thrown) / len(drafts):.4f} {chosen.counts()}"
        )
        if threshold == Questions().near_duplicate:
            print("\n".join(f"      {text}" for text in thrown[:12]))


def main() -> None:
    """Measure every corpus that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=1000, help="questions per corpus")
    limit = parser.parse_args().limit
    for name, (path, language) in CORPORA.items():
        if path.exists():
            measure(name, path, language, limit)
        else:
            print(f"\n{name}: {path} is not there")


if __name__ == "__main__":
    main()
