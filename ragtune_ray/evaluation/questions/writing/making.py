"""Writes a batch of questions about drawn passages and checks each: malformed, trivial, known already, unsupported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ragtune_ray import config
from ragtune_ray.answering.abstention import is_abstention
from ragtune_ray.answering.prompts import PromptError, build_prompt
from ragtune_ray.evaluation.grading.asking import Asker, Reply
from ragtune_ray.evaluation.questions.writing import filters, prompts
from ragtune_ray.evaluation.questions.writing.agreement import gives
from ragtune_ray.evaluation.questions.writing.drafts import Draft
from ragtune_ray.evaluation.questions.writing.drawing import Seed
from ragtune_ray.generation.interface import Completion, Generator, GeneratorError, Prompt
from ragtune_ray.schema import Citation, Passage

TURN_TEMPERATURE = 0.7
"""Of a question about a passage that was asked about before: at 0 it would be the same question."""
CHECK_TOKENS = 160
"""Longest answer of a check."""


class Searcher(Protocol):
    """Finds passages for a question; a `Retriever` does."""

    def retrieve_passages(self, texts: Sequence[str], top_k: int) -> list[tuple[list[Passage], list[float]]]:
        """The passages of each question's hits and their scores, best first."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one drawn passage, or pair of passages."""

    seed: Seed
    draft: Draft | None
    """None if the generator wrote nothing usable."""
    reason: filters.Reason | None
    """Why the question is thrown out; None if it passed."""
    detail: str = ""
    """What the generator or the check said, for people who look into thrown out questions."""
    evidence: tuple[Citation, ...] = ()
    rank: int = 0
    """Place of the first hit of its document when the question is searched for, from 1; 0: not among the hits."""
    malformed: int = 0
    """Replies of another form than the one asked for, until there was a good one or no more attempts."""
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Maker:
    """The models that write and check questions."""

    settings: config.Config
    """With the generator that writes the questions."""
    generator: Generator
    searcher: Searcher

    def make(self, seeds: Sequence[Seed], passages: Mapping[str, Passage]) -> list[Outcome]:
        """Write and check a question for every seed, in the same order.

        Args:
            seeds: what to ask about.
            passages: by id, all that the seeds name.
        """
        shown = [[passages[name] for name in seed.passage_ids] for seed in seeds]
        outcomes = self._written(seeds, shown)
        outcomes = [
            self._filtered(outcome, texts) if outcome.draft and not outcome.reason else outcome
            for outcome, texts in zip(outcomes, shown, strict=True)
        ]
        outcomes = self._asked_alone(outcomes)
        outcomes = self._asked_with(outcomes, shown)
        return self._searched(outcomes)

    def _written(self, seeds: Sequence[Seed], shown: Sequence[Sequence[Passage]]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(seeds)
        rule, seed = self.settings.questions, self.settings.seed
        for turn in sorted({each.turn for each in seeds}):
            places = [place for place, each in enumerate(seeds) if each.turn == turn]
            asker = Asker(
                self.generator,
                rule.max_new_tokens,
                "questions",
                max_asked=rule.max_attempts,
                temperature=TURN_TEMPERATURE if turn else self.settings.generator.temperature,
                seed=seed + turn,
            )
            replies = asker.ask([prompts.request_for(seeds[place].kind, shown[place]) for place in places])
            for place, reply in zip(places, replies, strict=True):
                outcomes[place] = _outcome(seeds[place], reply)
        return [outcome for outcome in outcomes if outcome is not None]

    def _filtered(self, outcome: Outcome, shown: Sequence[Passage]) -> Outcome:
        scored = self.settings.evaluate
        draft, kind = outcome.draft, outcome.seed.kind
        assert draft is not None
        reason = filters.draft_problem(
            draft, kind, shown, self.settings.questions, scored.language, scored.normalization
        )
        if reason:
            return dataclasses.replace(outcome, reason=reason)
        return dataclasses.replace(outcome, evidence=filters.spans_of(draft, shown))

    def _asked_alone(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Throw out what the generator answers without a passage."""
        chosen = [place for place, each in enumerate(outcomes) if not each.reason and each.seed.kind != "unanswerable"]
        replies = self._replies([outcomes[place] for place in chosen], [()] * len(chosen), prompts.ANSWER_ALONE)

        def judged(outcome: Outcome, reply: Completion) -> tuple[filters.Reason | None, str]:
            return ("answered without the passage" if self._gives(reply, outcome) else None), reply.text

        return self._judged(outcomes, chosen, replies, judged)

    def _asked_with(self, outcomes: Sequence[Outcome], shown: Sequence[Sequence[Passage]]) -> list[Outcome]:
        """Throw out what its passages do not answer or, for an unanswerable question, what retrieved passages do answer."""
        chosen = [place for place, each in enumerate(outcomes) if not each.reason]
        open_places = [place for place in chosen if outcomes[place].seed.kind == "unanswerable"]
        found = self._search([outcomes[place] for place in open_places])
        near = {place: (*shown[place], *hits) for place, hits in zip(open_places, found, strict=True)}
        texts = [tuple({each.passage_id: each for each in near.get(place, shown[place])}.values()) for place in chosen]
        replies = self._replies([outcomes[place] for place in chosen], texts, prompts.ANSWER_FROM_PASSAGES)

        def judged(outcome: Outcome, reply: Completion) -> tuple[filters.Reason | None, str]:
            if outcome.seed.kind == "unanswerable":
                return (None if is_abstention(reply.text) else "answered by other documents"), reply.text
            return (None if self._gives(reply, outcome) else "not answered from the passage"), reply.text

        return self._judged(outcomes, chosen, replies, judged)

    def _judged(
        self, outcomes: Sequence[Outcome], chosen: Sequence[int], replies: Sequence[Completion], judged: _Judgement
    ) -> list[Outcome]:
        after = list(outcomes)
        for place, reply in zip(chosen, replies, strict=True):
            before = after[place]
            reason, detail = ("check failed", reply.error) if reply.error else judged(before, reply)
            after[place] = dataclasses.replace(
                before,
                reason=reason,
                detail=detail if reason else "",
                requests=before.requests + 1,
                prompt_tokens=before.prompt_tokens + reply.prompt_tokens,
                completion_tokens=before.completion_tokens + reply.completion_tokens,
            )
        return after

    def _gives(self, reply: Completion, outcome: Outcome) -> bool:
        assert outcome.draft is not None
        scored, rule = self.settings.evaluate, self.settings.questions
        return not is_abstention(reply.text) and gives(
            reply.text,
            outcome.draft.answer,
            scored.language,
            scored.normalization,
            least=rule.same_answer,
            least_long=rule.same_long_answer,
        )

    def _replies(
        self, outcomes: Sequence[Outcome], texts: Sequence[Sequence[Passage]], system: str
    ) -> list[Completion]:
        """Answers of the generator to the questions of outcomes, from these passages; a prompt that is too long is an error."""
        built = [self._prompt(outcome, shown, system) for outcome, shown in zip(outcomes, texts, strict=True)]
        sent = [prompt for prompt in built if not isinstance(prompt, str)]
        completions = iter(
            self.generator.generate(sent, max_new_tokens=CHECK_TOKENS, seed=self.settings.seed) if sent else []
        )
        return [
            Completion("", 0, 0, 0.0, "stop", prompt) if isinstance(prompt, str) else next(completions)
            for prompt in built
        ]

    def _prompt(self, outcome: Outcome, shown: Sequence[Passage], system: str) -> Prompt | str:
        assert outcome.draft is not None
        try:
            return build_prompt(
                outcome.draft.question,
                shown,
                system=system,
                max_tokens=self.settings.prompt.max_tokens,
                count_tokens=self.generator.count_tokens,
                render=self.generator.render,
                history=[(each.role, each.content) for each in outcome.draft.messages],
            )
        except (PromptError, GeneratorError) as error:
            return str(error)

    def _search(self, outcomes: Sequence[Outcome]) -> list[list[Passage]]:
        texts = [outcome.draft.full_question for outcome in outcomes if outcome.draft]
        if not texts:
            return []
        return [hits for hits, _ in self.searcher.retrieve_passages(texts, self.settings.retrieval.top_k)]

    def _searched(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Note where each question that passed finds its document; nothing is thrown out for that."""
        chosen = [place for place, each in enumerate(outcomes) if not each.reason]
        after = list(outcomes)
        found = self._search([outcomes[place] for place in chosen])
        for place, hits in zip(chosen, found, strict=True):
            wanted = {name.rpartition("#")[0] for name in outcomes[place].seed.passage_ids}
            ranks = [rank for rank, hit in enumerate(hits, start=1) if hit.document_id in wanted]
            after[place] = dataclasses.replace(after[place], rank=min(ranks, default=0))
        return after


class _Judgement(Protocol):
    def __call__(self, outcome: Outcome, reply: Completion, /) -> tuple[filters.Reason | None, str]:
        """Why a question is thrown out after this reply, and what to note about it."""


def _outcome(seed: Seed, reply: Reply[Draft]) -> Outcome:
    reason: filters.Reason | None = None
    if reply.value is None:
        reason = "malformed reply" if reply.malformed == reply.requests else "request failed"
    return Outcome(
        seed,
        reply.value,
        reason,
        reply.error,
        malformed=reply.malformed,
        requests=reply.requests,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
    )
