"""Losses against naive loops and independent implementations, and known ways in which training silently fails."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from ragtune_ray import config
from ragtune_ray.generation.shared_prefixes import IGNORED
from ragtune_ray.schema import GeneratorExample, JointExample, RetrieverExample
from ragtune_ray.training import optimization, trainable
from ragtune_ray.training.objectives import contrastive
from ragtune_ray.training.objectives.contrastive import Contrastive
from ragtune_ray.training.objectives.joint import Joint
from ragtune_ray.training.objectives.query_side import QuerySide
from ragtune_ray.training.objectives.sft import Objective, Sft

SUBJECTS = "moon mars hubble sun earth comet rocket orbit galaxy nebula".split()


def answer_row(prompt: str, answer: str) -> GeneratorExample:
    return GeneratorExample("q", "with_gold", prompt, answer, (), 0, len(prompt), len(answer) + 1)


def query_row(number: int, negatives: int = 2, scores: tuple[float, ...] = ()) -> RetrieverExample:
    others = [SUBJECTS[(number + step + 1) % len(SUBJECTS)] for step in range(negatives)]
    names = [SUBJECTS[number % len(SUBJECTS)], *others]
    return RetrieverExample(
        f"q{number}",
        f"what is {names[0]}?",
        tuple(f"{name}#0" for name in names),
        tuple(f"{name} is a thing called {name}." * (place + 1) for place, name in enumerate(names)),
        scores,
        10,
    )


@pytest.fixture(scope="module")
def load(encoder_directory: Path, generator_directory: Path):
    """A function that builds an objective with a new tiny model from overrides of `training`."""

    def build(objective: str, *overrides: str, pool: dict[str, np.ndarray] | None = None) -> Any:
        settings = config.Config().using(
            f"training.objective={objective}",
            f"encoder.model={encoder_directory}",
            *(f"training.{override}" for override in overrides),
        )
        directory = generator_directory if settings.training.trains_generator else encoder_directory
        return trainable.load_objective(settings, directory, pool or {})

    return build


@pytest.fixture(scope="module")
def pool() -> dict[str, np.ndarray]:
    vectors = np.random.default_rng(0).standard_normal((len(SUBJECTS), 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return {f"{name}#0": vector for name, vector in zip(SUBJECTS, vectors, strict=True)}


def rows_of(objective: str) -> list[Any]:
    if objective == "sft":
        return [answer_row("question: " + "x" * number, "answer" * (number + 1)) for number in range(3)]
    if objective == "joint":
        return [joint_row(number) for number in range(3)]
    return [query_row(number, scores=(1.0, 0.3, 0.0)) for number in range(4)]


def joint_row(number: int) -> JointExample:
    asked = query_row(number)
    prompts = tuple(f"{text} {asked.query}" for text in asked.passages)
    return JointExample(asked.query_id, asked.query, asked.passage_ids, prompts, f"a {SUBJECTS[number]}", 30)


def total_loss(objective: Any, rows: list[Any]) -> torch.Tensor:
    return torch.stack([objective(piece).detach() for piece in objective.pieces(rows)]).sum()


def gradients(objective: Any, rows: list[Any]) -> dict[str, torch.Tensor]:
    objective.zero_grad(set_to_none=True)
    for piece in objective.pieces(rows):
        objective(piece).backward()
    return {name: weight.grad for name, weight in objective.named_parameters() if weight.grad is not None}


# Silent failures known from other projects


@pytest.mark.parametrize("name", ["sft", "contrastive", "distillation", "query_side", "joint"])
def test_every_objective_moves_the_weights_and_lowers_its_loss(name: str, load, pool) -> None:
    objective: Objective = load(name, "learning_rate=0.001", pool=pool)
    rows = rows_of(name)
    optimization.freeze_unreached(objective, objective, rows)
    before = optimization.trainable_weights(objective)
    optimizer = optimization.make_optimizer(objective, config.Training(objective=name, learning_rate=1e-3))
    losses = []
    for _ in range(8):
        result = optimization.take_step(
            objective,
            objective,
            rows,
            objective.weight(rows),
            optimizer,
            1.0,
            lambda: optimization.autocast("cpu", torch.float32),
        )
        assert result.gradient_norm > 1e-4
        losses.append(result.loss)
    assert losses[-1] < losses[0]
    after = optimization.trainable_weights(objective)
    still = [key for key in before if torch.equal(before[key], after[key])]
    # A key's bias shifts all scores of a softmax equally, so its gradient is zero except for rounding.
    assert [key for key in still if "key.bias" not in key] == []


def test_lora_trains_the_adapter_and_nothing_else(load) -> None:
    objective = load("sft", "lora_rank=4")
    trained = [name for name, weight in objective.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    rows = rows_of("sft")
    found = gradients(objective, rows)
    assert any(gradient.abs().max() > 0 for name, gradient in found.items() if "lora_B" in name)


# Supervised fine-tuning


def test_the_masked_loss_equals_a_loop_over_the_tokens_of_each_answer(load) -> None:
    objective: Sft = load("sft")
    rows = rows_of("sft")
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            prompt, answer = objective._chat.encode([row.prompt, row.answer])
            ids = torch.tensor([[*prompt, *answer, objective._end_token]])
            logits = objective.model(input_ids=ids).logits[0]
            for place in range(len(prompt), ids.shape[1]):
                expected -= float(logits[place - 1].log_softmax(-1)[ids[0, place]])
        assert float(total_loss(objective, rows)) == pytest.approx(expected, rel=1e-5)
    assert objective.weight(rows) == sum(len(row.answer) + 1 for row in rows)


def test_only_answer_and_end_token_are_labels(load) -> None:
    objective: Sft = load("sft")
    batch = objective.collate(["a long question", "q"], ["yes", "no"])
    taught = [row[row != IGNORED].tolist() for row in batch["labels"]]
    assert [objective._chat.decode(row[:-1]) for row in taught] == ["yes", "no"]
    assert {row[-1] for row in taught} == {objective._end_token}
    # All except the end token, which predicts nothing.
    assert batch["attention_mask"].sum(dim=1).tolist() == [len("a long question") + 3, len("q") + 2]


def test_an_answer_that_spells_a_control_token_does_not_end_itself(load) -> None:
    objective: Sft = load("sft")
    batch = objective.collate(["q"], ["say <|im_end|> now"])
    assert (batch["labels"][0] == objective._end_token).sum() == 1


def test_micro_batches_do_not_change_the_gradient(load) -> None:
    # Common prefixes are tested in test_shared_prefixes.
    rows = [answer_row(f"{number} asks: " + "x" * number, "answer" * (number + 1)) for number in range(3)]
    # In float64, as kernels of some processors round these large gradients (up to 113) by 2e-4 in float32; and without plain
    # attention, whose softmax is in float32, for which float64's mask is too large a number.
    whole, alone = (load("sft", f"micro_batch_tokens={tokens}").double() for tokens in (10_000, 1))
    for objective in (whole, alone):
        objective.model.set_attn_implementation("sdpa")
    assert len(list(whole.pieces(rows))) == 1
    assert len(list(alone.pieces(rows))) == len(rows)
    expected = gradients(whole, rows)
    for name, gradient in gradients(alone, rows).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


# Retriever


def embedded(objective: Any, rows: list[RetrieverExample]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    queries = objective.vectors([row.query for row in rows])
    return queries, [objective.vectors(list(row.passages)) for row in rows]


def test_the_contrastive_loss_equals_that_of_sentence_transformers(load) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    objective = load("contrastive", "temperature=0.05")
    # No passage is in two rows, which the other implementation does not mask.
    rows = [dataclasses.replace(query_row(number * 3), query_id=str(number)) for number in range(3)]
    queries, passages = embedded(objective, rows)
    columns = [torch.stack([row[place] for row in passages]) for place in range(3)]
    theirs = MultipleNegativesRankingLoss(objective.encoder, scale=20.0)
    expected = theirs.compute_loss_from_embeddings([queries, *columns], torch.empty(0))
    assert float(total_loss(objective, rows)) / len(rows) == pytest.approx(float(expected), rel=1e-4)


def test_another_rows_copy_of_the_positive_is_not_a_negative(load) -> None:
    objective = load("contrastive", "temperature=0.5")
    first = query_row(0, negatives=1)
    other = dataclasses.replace(
        query_row(5, negatives=1), passage_ids=("comet#0", first.passage_ids[0]), passages=("comet", first.passages[0])
    )
    queries, passages = embedded(objective, [first, other])
    scores = queries @ torch.cat(passages).T / 0.5
    kept = scores.clone()
    kept[0, 3] = -torch.inf  # the positive of row 0, shown by row 1 as a negative
    expected = functional.cross_entropy(kept, torch.tensor([0, 2]), reduction="sum")
    assert float(total_loss(objective, [first, other])) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("other_worker", [False, True])
def test_no_passage_of_the_positives_document_is_a_negative(
    other_worker: bool, load, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = load("contrastive")
    rows = [
        RetrieverExample("q0", "first", ("d1#0", "x#0"), ("one", "x"), (), 4),
        RetrieverExample("q1", "second", ("d1#1", "y#0"), ("two", "y"), (), 4),
    ]
    query = torch.full((1, 4), 0.5, requires_grad=True)
    passages, columns = torch.eye(4), objective.batch_columns(rows)
    if other_worker:
        whole = {"passages": passages, "document": columns["document"]}
        monkeypatch.setattr(
            contrastive, "_gathered", lambda local: (whole["passages" if local.ndim == 2 else "document"], 0)
        )
        objective.loss(query, passages[:2], objective.batch_columns(rows[:1])).backward()
    else:
        second = torch.full((1, 4), 0.5)
        objective.loss(torch.cat([query, second]), passages, columns).backward()
    positive, distractor, same_document, other = query.grad[0].tolist()
    assert positive < 0 < min(distractor, other)
    assert same_document == 0


def test_no_stored_passage_of_the_positives_document_is_a_negative(load) -> None:
    stored = dict(zip(("d1#0", "d1#1", "x#0"), np.eye(3), strict=True))
    objective: QuerySide = load("query_side", pool=stored)
    columns = objective.batch_columns([RetrieverExample("q", "first", ("d1#0",), ("one",), (), 4)])
    query = torch.full((1, 3), 3**-0.5, requires_grad=True)
    objective.loss(query, query[:0], columns).backward()
    positive, same_document, distractor = query.grad[0].tolist()
    assert positive < 0 < distractor
    assert same_document == 0


@pytest.mark.parametrize("name", ["distillation", "query_side"])
def test_the_loss_follows_a_permutation_of_rows_and_passages(name: str, load, pool) -> None:
    objective = load(name, "contrastive_weight=0.3", pool=pool)
    rows = [query_row(number, scores=(1.0, 0.5, 0.1)) for number in range(4)]
    swapped = [
        dataclasses.replace(
            row,
            passage_ids=(row.passage_ids[0], row.passage_ids[2], row.passage_ids[1]),
            passages=(row.passages[0], row.passages[2], row.passages[1]),
            teacher_scores=(row.teacher_scores[0], row.teacher_scores[2], row.teacher_scores[1]),
        )
        for row in reversed(rows)
    ]
    assert float(total_loss(objective, rows)) == pytest.approx(float(total_loss(objective, swapped)), rel=1e-5)
    misaligned = [dataclasses.replace(row, teacher_scores=row.teacher_scores[::-1]) for row in rows]
    assert float(total_loss(objective, rows)) != pytest.approx(float(total_loss(objective, misaligned)), rel=1e-3)


def test_distillation_equals_a_kl_divergence_by_hand(load) -> None:
    objective = load("distillation", "contrastive_weight=0", "temperature=0.1", "teacher_temperature=0.5")
    rows = [query_row(0, scores=(1.0, 0.4, 0.0)), query_row(1, negatives=1, scores=(1.0, 0.2))]
    expected = 0.0
    for query, passages, row in zip(*embedded(objective, rows), rows, strict=True):
        student = [float(query @ passage) / 0.1 for passage in passages]
        teacher = [score / 0.5 for score in row.teacher_scores]
        total = sum(math.exp(score) for score in teacher)
        normal = math.log(sum(math.exp(score) for score in student))
        for mine, theirs in zip(student, teacher, strict=True):
            share = math.exp(theirs) / total
            expected += share * (math.log(share) - (mine - normal))
    assert float(total_loss(objective, rows)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["distillation", "query_side"])
def test_a_uniform_teacher_has_no_gradient(name: str, load, pool) -> None:
    objective = load(name, "contrastive_weight=0", pool=pool)
    found = gradients(objective, [query_row(number, scores=(1.0, 1.0, 1.0)) for number in range(3)])
    assert all(gradient.abs().max() == 0 for gradient in found.values())
    told = gradients(objective, [query_row(number, scores=(1.0, 0.0, 0.0)) for number in range(3)])
    assert max(gradient.abs().max() for gradient in told.values()) > 0


@pytest.mark.parametrize("name", ["contrastive", "distillation"])
def test_chunks_with_cached_gradients_have_the_full_gradient(name: str, load) -> None:
    rows = rows_of(name)
    whole_objective = load(name, "micro_batch_tokens=100000")
    assert len(list(whole_objective.pieces(rows))) == 1
    chunked = load(name, "micro_batch_tokens=70")
    assert len(list(chunked.pieces(rows))) > 3
    assert float(total_loss(chunked, rows)) == pytest.approx(float(total_loss(whole_objective, rows)), rel=1e-5)
    whole = gradients(whole_objective, rows)
    for key, gradient in gradients(chunked, rows).items():
        torch.testing.assert_close(gradient, whole[key], rtol=1e-4, atol=1e-5)


def test_chunks_have_few_lengths_within_the_encoders_limit(load) -> None:
    objective = load("contrastive", "micro_batch_tokens=70")
    pieces = list(objective.pieces([query_row(number, negatives=6) for number in range(6)]))
    longest = [int(piece["attention_mask"].sum(dim=1).max()) for piece in pieces]
    widths = [piece["input_ids"].shape[1] for piece in pieces]
    assert widths == [16 * math.ceil(length / 16) for length in longest]
    assert len(set(widths)) < len(set(longest))
    objective.encoder.max_seq_length = 20
    widths = [piece["input_ids"].shape[1] for piece in objective.pieces(rows_of("contrastive"))]
    assert set(widths) == {16, 20}


def test_query_side_contrasts_with_the_whole_unchanged_pool(load, pool) -> None:
    objective: QuerySide = load("query_side", "temperature=0.1", pool=pool)
    rows = [query_row(number) for number in range(4)]
    queries = objective.vectors([row.query for row in rows])
    stored = torch.tensor(np.stack(list(pool.values()))).float()
    expected = functional.cross_entropy(queries @ stored.T / 0.1, torch.arange(4), reduction="sum")
    assert float(total_loss(objective, rows)) == pytest.approx(float(expected), rel=1e-4)
    assert "_pool" not in objective.state_dict()
    assert not any(name.endswith("_pool") for name in dict(objective.named_parameters()))


def test_query_side_learns_a_teachers_distribution_over_stored_vectors(load, pool) -> None:
    options = ("temperature=0.1", "teacher_temperature=0.5", "contrastive_weight=0.3")
    objective: QuerySide = load("query_side", *options, pool=pool)
    rows = [query_row(0, scores=(1.0, 0.4, 0.0)), query_row(1, scores=(0.2, 0.9, 0.1))]
    expected = 0.0
    for query, row in zip(objective.vectors([row.query for row in rows]).numpy(), rows, strict=True):
        student = torch.tensor([float(query @ pool[name]) / 0.1 for name in row.passage_ids])
        teacher = torch.tensor(row.teacher_scores) / 0.5
        expected += float(functional.kl_div(student.log_softmax(0), teacher.softmax(0), reduction="sum"))
        every = torch.tensor([float(query @ vector) / 0.1 for vector in pool.values()])
        expected += 0.3 * float(-every.log_softmax(0)[list(pool).index(row.passage_ids[0])])
    assert float(total_loss(objective, rows)) == pytest.approx(expected, rel=1e-4)


# Joint


def test_the_joint_loss_equals_the_marginal_likelihood_by_hand(load, pool) -> None:
    objective: Joint = load("joint", "temperature=0.5", pool=pool)
    expected = 0.0
    for row in rows_of("joint"):
        query = objective.retriever.vectors([row.query]).numpy()[0]
        cosines = np.array([query @ pool[name] for name in row.passage_ids])
        found = np.exp(cosines / 0.5) / np.exp(cosines / 0.5).sum()
        read = []
        for prompt in row.prompts:
            with torch.no_grad():
                read.append(math.exp(-float(objective.generator(objective.generator.collate([prompt], [row.answer])))))
        expected -= math.log(sum(share * likelihood for share, likelihood in zip(found, read, strict=True)))
    assert float(total_loss(objective, rows_of("joint"))) == pytest.approx(expected, rel=1e-4)
    assert objective.validate(rows_of("joint"))["loss"] == pytest.approx(expected / 3, rel=1e-4)


def test_the_joint_loss_moves_the_retriever_towards_explaining_passages(load, pool) -> None:
    objective: Joint = load("joint", "temperature=0.5", pool=pool)
    row = joint_row(0)
    piece = objective.collate(row)
    likelihoods = torch.exp(-objective.generator.losses(piece).detach().double())
    asked = objective.retriever.collate(row.query, row.passage_ids)
    before = objective.retriever.log_probabilities(asked)
    before.retain_grad()
    (-torch.logsumexp(before - objective.generator.losses(piece).detach(), dim=0)).backward()
    posterior = torch.exp(before.detach().double()) * likelihoods
    torch.testing.assert_close(before.grad.double(), -posterior / posterior.sum(), rtol=1e-3, atol=1e-5)


def test_validation_ranks_the_positive_among_all_passages(load) -> None:
    objective: Contrastive = load("contrastive")
    rows = [query_row(number, negatives=1) for number in range(0, 10, 2)]
    texts = {name: text for row in rows for name, text in zip(row.passage_ids, row.passages, strict=True)}
    names, vectors = list(texts), objective.vectors(list(texts.values())).numpy()
    expected = 0.0
    for row in rows:
        scores = vectors @ objective.vectors([row.query]).numpy()[0]
        rank = 1 + int((scores > scores[names.index(row.passage_ids[0])]).sum())
        expected += 1 / rank if rank <= 10 else 0
    assert objective.validate(rows)["MRR@10"] == pytest.approx(expected / len(rows), abs=1e-6)


def test_a_collapsed_encoder_ranks_the_positive_last(load) -> None:
    objective: Contrastive = load("contrastive")
    last = objective.encoder[0].auto_model.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.arange(32.0))
    rows = [
        RetrieverExample(f"q{number}", f"question {number}", (f"d{number}#0",), (f"text {number}",), (), 4)
        for number in range(16)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        assert objective.validate(rows)["score"] == 0.0
    with torch.no_grad():
        last.bias.fill_(math.nan)
    assert objective.validate(rows)["score"] == 0.0


@pytest.mark.parametrize("name", ["contrastive", "distillation", "query_side"])
def test_cosines_are_float32_under_autocast(name: str, load, pool, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, rows = load(name, pool=pool), rows_of(name)
    texts = list(dict.fromkeys(text for row in rows for text in (row.query, *row.passages)))
    # Too similar for bfloat16 to distinguish.
    near = 1 + 1e-4 * torch.randn((len(texts), 32), generator=torch.Generator().manual_seed(0))
    near = functional.normalize(near, dim=1)
    monkeypatch.setattr(objective, "vectors", lambda asked: near[[texts.index(text) for text in asked]])
    queries, passages = (
        objective.vectors(asked)
        for asked in ([row.query for row in rows], [text for row in rows for text in row.passages])
    )

    def found() -> list[float]:
        loss = float(objective.loss(queries, passages, objective.batch_columns(rows)))
        return [loss, objective.validate(rows)["score"]]

    with torch.autocast("cpu", torch.bfloat16):
        under = found()
    assert under == found()


def test_passage_probabilities_are_float32_under_autocast(load, pool, monkeypatch: pytest.MonkeyPatch) -> None:
    objective: QuerySide = load("query_side", pool=pool)
    asked = objective.collate("what is moon?", list(pool))
    vector = objective.vectors(["what is moon?"])
    monkeypatch.setattr(objective, "_embed", lambda _: vector)
    with torch.autocast("cpu", torch.bfloat16):
        under = objective.log_probabilities(asked)
    assert torch.equal(under, objective.log_probabilities(asked))


def test_a_planted_corpus_is_learned(load) -> None:
    """Queries use codes that only training can connect to passages: recall rises from chance to 1."""
    codes = dict(zip(SUBJECTS, ["aa", "bb", "cc", "dd", "ee", "ff", "gg", "hh", "ii", "jj"], strict=True))
    rows = [RetrieverExample(code, code, (f"{name}#0",), (name,), (), 4) for name, code in codes.items()]
    objective = load("contrastive", "temperature=0.05")
    optimization.freeze_unreached(objective, objective, rows)
    before = objective.validate(rows)["MRR@10"]
    optimizer = optimization.make_optimizer(objective, config.Training(objective="contrastive", learning_rate=5e-3))
    for _ in range(40):
        optimization.take_step(
            objective, objective, rows, len(rows), optimizer, 1.0, lambda: optimization.autocast("cpu", torch.float32)
        )
    assert before < 0.6
    assert objective.validate(rows)["MRR@10"] == 1.0
