"""The generator as teacher: likelihoods against a naive loop, and a retriever that learns only from them."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ragtune_ray import config
from ragtune_ray.answering.prompts import build_prompt
from ragtune_ray.generation.interface import GeneratorError, Prompt
from ragtune_ray.schema import Passage, Query, Reject, RetrieverExample
from ragtune_ray.training import optimization, teaching, trainable
from ragtune_ray.training.examples import Candidates

SETTINGS = config.Config().using(
    "training.objective=query_side", "training.teacher=generator", "training.learning_rate=0.003"
)


def passage(name: str, text: str) -> Passage:
    return Passage(f"{name}#0", name, text, "", "{}", 0, len(text))


def query(text: str = "who won?", answers: tuple[str, ...] = ("Ann",), **changes: Any) -> Query:
    return dataclasses.replace(Query("q", text, answers, (), (), "train"), **changes)


def count_tokens(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


# Likelihoods


def naive_mean(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """The mean ln p of an answer's tokens, with one forward pass per token."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    total, taught = 0.0, tokenizer(answer, add_special_tokens=False)["input_ids"]
    for token in taught:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        total += float(torch.log_softmax(logits.double(), dim=0)[token])
        ids = [*ids, token]
    return total / len(taught)


def test_gains_equal_those_of_a_naive_token_loop(generator_directory: Path, passages: list[Passage]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ragtune_ray.generation.generator import TransformersGenerator

    generator = TransformersGenerator(generator_directory, precision="float32", batch_tokens=4096, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(generator_directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(generator_directory)
    asked = [
        (query("When did Apollo 11 land?", ("in 1969",)), passages[:3]),
        (query("What is Mars?", ("the red planet", "red"), query_id="q2"), passages[2:4]),
    ]
    found = teaching.passage_gains(asked, generator, SETTINGS)
    for (each, shown), gains in zip(asked, found, strict=True):

        def mean(given: Sequence[Passage], each: Query = each) -> float:
            system = SETTINGS.prompt.system if given else SETTINGS.prompt.system_without_passages
            prompt = build_prompt(
                each.text, given, system=system, max_tokens=1536, count_tokens=generator.count_tokens,
                render=generator.render,
            )  # fmt: skip
            return naive_mean(model, tokenizer, generator.render(prompt.messages), (each.answers or ("",))[0])

        assert gains == pytest.approx([mean([one]) - mean([]) for one in shown], abs=1e-5)


class Reader:
    """A generator that returns a high likelihood if the right passage is shown, otherwise a low one."""

    def __init__(self, right: dict[str, str], longest: int = 10_000) -> None:
        self._right, self._longest = right, longest
        """Word of the question -> word of the passage that answers it."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return count_tokens(texts)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        return "\n".join(content for _, content in messages)

    def log_likelihood(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[float, int]]:
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            text = prompt.messages[-1][1]
            if len(text) > self._longest:
                raise GeneratorError("does not fit")
            shown, _, asked = text.rpartition("Question:")
            knows = any(word in asked and other in shown for word, other in self._right.items())
            found.append((-0.1 * len(answer) if knows else -2.0 * len(answer), len(answer)))
        return found


def test_a_question_too_long_has_a_reason_and_affects_no_other() -> None:
    reader: Any = Reader({"who": "Ann"}, longest=60)
    asked = [
        (query(), [passage("a", "Ann won.")]),
        (query("why? " * 30), [passage("a", "Ann won.")]),
        (query(), [passage("b", "Bob lost."), passage("a", "Ann won.")]),
    ]
    short, long, two = teaching.passage_gains(asked, reader, SETTINGS)
    assert short == pytest.approx([1.9])
    assert long == "does not fit"
    assert two == pytest.approx([0.0, 1.9])


# Candidates and examples


def candidates(*names: str, cosines: Sequence[float], answering: str = "") -> Candidates:
    found = tuple(passage(name, f"{name} {'Ann' if name == answering else 'Bob'} won.") for name in names)
    return Candidates((), found, tuple(1.0 / (rank + 1) for rank in range(len(names))), (), tuple(cosines))


def test_candidates_are_the_encoders_best_with_an_answering_hit_last() -> None:
    given = candidates("a", "b", "c", "d", cosines=[0.1, 0.9, 0.5, 0.2])
    assert [each.document_id for each in teaching.choose_candidates(query(), given, 2)] == ["b", "c"]
    given = candidates("a", "b", "c", "d", cosines=[0.1, 0.9, 0.5, 0.2], answering="d")
    assert [each.document_id for each in teaching.choose_candidates(query(), given, 2)] == ["b", "d"]


def taught(gains: Sequence[float], given: Candidates, **options: Any) -> tuple[RetrieverExample | Reject, Any]:
    return teaching.taught_example(query(), given, given.retrieved, gains, SETTINGS, count_tokens, **options)


def test_an_example_orders_passages_by_teacher_score() -> None:
    given = candidates("a", "b", "c", cosines=[0.9, 0.5, 0.1], answering="c")
    example, judgement = taught([0.2, 0.0, 1.5], given)
    assert isinstance(example, RetrieverExample)
    assert example.passage_ids == ("c#0", "a#0", "b#0")
    assert example.teacher_scores == (1.5, 0.2, 0.0)
    assert (judgement.teacher_reciprocal_rank, judgement.retriever_reciprocal_rank) == (1.0, 1 / 3)
    order = [2, 0, 1]
    shuffled = dataclasses.replace(
        given,
        retrieved=tuple(given.retrieved[place] for place in order),
        retrieved_cosines=tuple(given.retrieved_cosines[place] for place in order),
    )
    again, judged_again = taught([1.5, 0.2, 0.0], shuffled)
    assert again == example
    assert judged_again.retriever_reciprocal_rank == judgement.retriever_reciprocal_rank


@pytest.mark.parametrize(
    ("gains", "answering", "problem"),
    [
        ([0.05, 0.0, -1.0], "a", "no passage makes its answer likelier"),
        ([0.2, 1.5, 0.0], "a", "prefers a passage that does not contain the answer"),
        ([0.5, 0.5, 0.5], "", "hardly distinguish its passages"),
        ([1.5, 0.2, 0.0], "", ""),
    ],
)
def test_questions_with_untrustworthy_teacher_scores_are_rejected(
    gains: list[float], answering: str, problem: str
) -> None:
    example, _ = taught(gains, candidates("a", "b", "c", cosines=[0.9, 0.5, 0.1], answering=answering))
    if problem:
        assert isinstance(example, Reject)
        assert problem in example.reason
    else:
        assert isinstance(example, RetrieverExample)


def test_qrels_test_the_teacher_if_there_are_any() -> None:
    given = candidates("a", "b", cosines=[0.9, 0.5], answering="a")
    judged = query(document_ids=("b",), relevances=(1.0,))
    _, judgement = teaching.taught_example(judged, given, given.retrieved, [1.5, 0.0], SETTINGS, count_tokens)
    assert (judgement.teacher_reciprocal_rank, judgement.retriever_reciprocal_rank) == (0.5, 0.5)
    facts = teaching.teacher_facts([judgement, teaching.Judgement(None, None, 0.5), teaching.Judgement(1.0, 0.25, 0.1)])
    assert (facts["MRR"], facts["retriever_MRR"], facts["n"]) == (0.75, 0.375, 2)


def test_a_cross_encoder_makes_half_of_the_distribution() -> None:
    scores = teaching.blended([1.0, 0.0], [3.0, -3.0], temperature=0.5)

    def softmax(values: Sequence[float], temperature: float) -> np.ndarray:
        shares = np.exp(np.asarray(values) / temperature)
        return np.asarray(shares / shares.sum())

    expected = (softmax([1.0, 0.0], 0.5) + softmax([1.0, 0.0], 0.3)) / 2
    assert softmax(scores, 0.5) == pytest.approx(expected)


def test_entropy_is_a_share_of_its_maximum() -> None:
    p = math.exp(2) / (math.exp(2) + 1)
    by_hand = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    assert teaching.entropy([1.0, 0.0], 0.5) == pytest.approx(by_hand)
    assert teaching.entropy([5.0], 0.5) == 0.0


# Learning only from the generator

KEYS = "amber basalt cedar delta ember fjord garnet harbor".split()
VALUES = "walnut velvet silver marble copper zephyr willow valley".split()
RIGHT = dict(zip(KEYS, VALUES, strict=True))


def mean_reciprocal_rank(objective: Any, texts: Sequence[str], names: Sequence[str], pool: np.ndarray) -> float:
    scores = objective.vectors([text.format(key) for text in texts for key in KEYS]).numpy() @ pool.T
    right = np.array([names.index(f"{RIGHT[key]}#0") for _ in texts for key in KEYS])
    return float(np.mean(1 / (1 + (scores > scores[np.arange(len(right)), right][:, None]).sum(axis=1))))


def learnt(encoder_directory: Path, *, shuffled: bool) -> tuple[float, float]:
    """MRR on reworded questions, before and after; all passages contain the answer, so only the generator can rank them."""
    shown = [passage(value, f"{value} Ann won") for value in VALUES]
    asked = [query(f"{key} who won", query_id=key) for key in KEYS]
    settings = SETTINGS.using("training.contrastive_weight=0", "training.teacher_temperature=0.1")
    objective: Any = trainable.load_objective(
        settings, encoder_directory, {each.passage_id: np.zeros(32, np.float32) for each in shown}
    )
    pool = objective.vectors([each.text for each in shown])
    objective._pool.copy_(pool)
    cosines = (objective.vectors([each.text for each in asked]) @ pool.T).numpy()
    reader: Any = Reader(RIGHT)
    gains = teaching.passage_gains([(each, shown) for each in asked], reader, settings)
    source = np.random.default_rng(0)
    rows = []
    for row, (each, gained) in enumerate(zip(asked, gains, strict=True)):
        assert not isinstance(gained, str)
        told = source.permutation(gained).tolist() if shuffled else gained
        given = Candidates((), tuple(shown), (0.0,) * len(shown), (), tuple(cosines[row].tolist()))
        example, _ = teaching.taught_example(each, given, shown, told, settings, count_tokens)
        assert isinstance(example, RetrieverExample)
        rows.append(example)
    optimizer = optimization.make_optimizer(objective, settings.training)
    names = [each.passage_id for each in shown]
    wordings = ["tell who won {}", "{} who has won"]
    before = mean_reciprocal_rank(objective, wordings, names, pool.numpy())
    for _ in range(100):
        optimization.take_step(
            objective, objective, rows, objective.weight(rows), optimizer, 1.0,
            lambda: optimization.autocast("cpu", torch.float32),
        )  # fmt: skip
    return before, mean_reciprocal_rank(objective, wordings, names, pool.numpy())


def test_a_retriever_learns_from_the_generators_likelihoods_alone(encoder_directory: Path) -> None:
    before, after = learnt(encoder_directory, shuffled=False)
    assert before < 0.6
    assert after > 0.8


def test_a_shuffled_teacher_teaches_nothing(encoder_directory: Path) -> None:
    _, after = learnt(encoder_directory, shuffled=True)
    assert after < 0.6
