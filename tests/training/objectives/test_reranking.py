"""The reranker's loss, gradient and validation score equal those computed by hand from its scores of single pairs."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder

from ragtune_ray import config
from ragtune_ray.schema import RerankerExample
from ragtune_ray.training import optimization, trainable
from ragtune_ray.training.objectives import reranking
from tests.support.models import save_cross_encoder

SETTINGS = config.Config().using("training.objective=reranker", "seed=3")


def row(query: str, *passages: str, first: tuple[float, ...] = ()) -> RerankerExample:
    ids = tuple(f"d{number}#0" for number in range(len(passages)))
    return RerankerExample(query, query, ids, passages, first or (1.0,) * len(passages), 10 * len(passages))


ROWS = [
    row("who walked on the moon", "armstrong walked on the moon in 1969", "mars is red"),
    row("what is mars", "mars", "the sun is a star and very far away from us all", "a moon orbits", "galaxies"),
    row("sun", "the sun is hot", "ice"),
]


@pytest.fixture(scope="module", params=["late interaction", "cross-encoder"])
def objective(
    request: pytest.FixtureRequest, encoder_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> reranking.Reranking:
    directory = encoder_directory
    if request.param == "cross-encoder":
        directory = save_cross_encoder(encoder_directory, tmp_path_factory.mktemp("cross-encoder"))
    made = trainable.load_objective(SETTINGS, directory, {})
    assert isinstance(made, reranking.Reranking)
    return made


def plain_score(objective: reranking.Reranking, query: str, passage: str) -> torch.Tensor:
    """The score of one pair, by transformers alone."""
    model, tokenizer = objective.model[0].auto_model, objective.model.tokenizer  # type: ignore[index]
    if isinstance(objective.model, CrossEncoder):
        return model(**tokenizer(query, passage, return_tensors="pt")).logits[0, 0]
    vectors = []
    for text in (query, passage):
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]  # without [CLS] and [SEP]
        vectors.append(states / states.norm(dim=1, keepdim=True))
    return torch.stack([max(a @ b for b in vectors[1]) for a in vectors[0]]).sum()


def plain_loss(objective: reranking.Reranking) -> torch.Tensor:
    """-log of the softmax share of the positive, pair by pair."""
    total = torch.zeros(())
    for each in ROWS:
        shares = torch.exp(torch.stack([plain_score(objective, each.query, text) for text in each.passages]))
        total = total - torch.log(shares[0] / shares.sum())
    return total


def gradients(objective: reranking.Reranking, *losses: torch.Tensor) -> dict[str, torch.Tensor]:
    objective.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward()
    return {name: weight.grad.clone() for name, weight in objective.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(("micro_batch_tokens", "num_pieces"), [(10_000, 1), (1, 3)])
def test_loss_and_gradient_do_not_depend_on_the_pieces(
    objective: reranking.Reranking, micro_batch_tokens: int, num_pieces: int
) -> None:
    cut = reranking.Reranking(objective.model, micro_batch_tokens)
    expected = plain_loss(objective)
    losses = [cut(piece) for piece in cut.pieces(ROWS)]
    assert len(losses) == num_pieces
    assert cut.weight(ROWS) == 3
    assert sum(loss.item() for loss in losses) == pytest.approx(expected.item(), rel=1e-5)
    found, hand = gradients(cut, *losses), gradients(objective, expected)
    assert found.keys() == hand.keys()
    for name, gradient in hand.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_every_weight_learns_and_the_loss_falls(encoder_directory: Path) -> None:
    made = trainable.load_objective(SETTINGS, encoder_directory, {})
    assert all("pooler" in name for name in optimization.freeze_unreached(made, made, ROWS[:1]))
    optimizer = optimization.make_optimizer(made, SETTINGS.training.model_copy(update={"learning_rate": 1e-2}))
    taken = [
        optimization.take_step(made, made, ROWS, made.weight(ROWS), optimizer, 1.0, contextlib.nullcontext).loss
        for _ in range(8)
    ]
    assert taken[-1] < taken[0] / 2


def test_prefixes_of_the_encoder_are_part_of_the_texts(encoder_directory: Path) -> None:
    with_prefixes = SETTINGS.using("encoder.query_prefix='who '", "encoder.passage_prefix='about '")
    plain, prefixed = (trainable.load_objective(each, encoder_directory, {}) for each in (SETTINGS, with_prefixes))
    expected = plain.score([("who walked", "about mars")])
    np.testing.assert_allclose(prefixed.score([("walked", "mars")]), expected, rtol=1e-5)


def test_validation_reranks_each_querys_own_hits(objective: reranking.Reranking) -> None:
    scores = [[plain_score(objective, each.query, text).item() for text in each.passages] for each in ROWS]
    ranks = [1 + sum(other >= row_scores[0] for other in row_scores[1:]) for row_scores in scores]
    validated = objective.validate(ROWS)  # equal retrieval scores, so that their weight changes nothing
    assert validated["MRR@10"] == validated["score"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert validated["first_stage_weight"] == 128, "of equally good weights, the most cautious"


def test_the_chosen_weight_is_the_best_of_the_grid(
    objective: reranking.Reranking, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        row("a", "right", "wrong", first=(1.0, 0.5)),  # 1 + w against 3 + w / 2: right if w > 4
        row("b", "right", "wrong", first=(0.9, 1.0)),  # 2 + .9 w against 1 + w: right if w < 10
    ]
    monkeypatch.setattr(objective, "score", lambda _: np.array([1.0, 3.0, 2.0, 1.0], dtype=np.float32))
    assert objective.validate(rows) == {"MRR@10": 1.0, "first_stage_weight": 8.0, "score": 1.0}


def test_ties_long_lists_and_nan_rank_the_positive_last() -> None:
    ones = [np.ones(3)]
    assert reranking.mean_reciprocal_rank([np.array([1.0, 1.0, 0.0])], ones, 4.0) == 1 / 2
    assert reranking.mean_reciprocal_rank([np.array([np.nan, 1.0, 0.0])], ones, 4.0) == 1 / 3
    assert reranking.mean_reciprocal_rank([np.arange(11.0)], [np.zeros(11)], 0.0) == 0.0
