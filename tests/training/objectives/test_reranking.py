"""The reranker's loss, gradient and validation score equal those computed by hand from its scores of single pairs."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ragtune_ray import config
from ragtune_ray.schema import RerankerExample
from ragtune_ray.training import optimization, trainable
from ragtune_ray.training.objectives import reranking

SETTINGS = config.Config().using("training.objective=reranker", "seed=3")


def row(query: str, *passages: str, first: tuple[float, ...] = ()) -> RerankerExample:
    ids = tuple(f"d{number}#0" for number in range(len(passages)))
    return RerankerExample(query, query, ids, passages, first or (1.0,) * len(passages), 10 * len(passages))


ROWS = [
    row("who walked on the moon", "armstrong walked on the moon in 1969", "mars is red"),
    row("what is mars", "mars", "the sun is a star and very far away from us all", "a moon orbits", "galaxies"),
    row("sun", "the sun is hot", "ice"),
]


@pytest.fixture(scope="module")
def objective(encoder_directory: Path) -> reranking.Reranking:
    """A new head on the encoder, with weights so large that scores differ."""
    made = trainable.load_objective(SETTINGS, encoder_directory, {})
    assert isinstance(made, reranking.Reranking)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "classifier" in name:
                weight.mul_(40)
    return made


def plain_score(objective: reranking.Reranking, query: str, passage: str) -> torch.Tensor:
    """The logit of one pair, by transformers alone."""
    model = objective.model[0].auto_model  # type: ignore[index]
    return model(**objective.model.tokenizer(query, passage, return_tensors="pt")).logits[0, 0]


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
    assert optimization.freeze_unreached(made, made, ROWS[:1]) == []
    optimizer = optimization.make_optimizer(made, SETTINGS.training.model_copy(update={"learning_rate": 1e-2}))
    taken = [
        optimization.take_step(made, made, ROWS, made.weight(ROWS), optimizer, 1.0, contextlib.nullcontext).loss
        for _ in range(8)
    ]
    # A new head knows nothing: the loss is nearly that of guessing among 2, 4 and 2 passages.
    assert taken[0] == pytest.approx((2 * np.log(2) + np.log(4)) / 3, abs=0.1)
    assert taken[-1] < taken[0] / 2


def test_a_new_head_depends_on_the_seed_alone(encoder_directory: Path) -> None:
    def head(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # whatever was drawn before
        made = trainable.load_objective(SETTINGS.using(f"seed={seed}"), encoder_directory, {})
        return dict(made.named_parameters())["model.0.model.classifier.weight"]

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_validation_reranks_each_querys_own_hits(objective: reranking.Reranking) -> None:
    scores = [[float(plain_score(objective, each.query, text)) for text in each.passages] for each in ROWS]
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
