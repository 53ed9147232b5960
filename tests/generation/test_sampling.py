"""The next token: greedy, sampled from the likeliest, and penalized for repetition."""

import collections
import math

import pytest
import torch

from ragtune_ray.generation.row import Row
from ragtune_ray.generation.sampling import choose_tokens, nucleus

PROBABILITIES = [0.1, 0.4, 0.3, 0.2]


def drawn(num_draws: int = 2000, **options: float) -> dict[int, float]:
    """How often each token is drawn from `PROBABILITIES`."""
    row = Row(0, [1], 5, seed=3, temperature=1.0, **options)
    logits = torch.tensor([PROBABILITIES]).log()
    counts = collections.Counter(choose_tokens(logits, [row])[0] for _ in range(num_draws))
    return {token: count / num_draws for token, count in counts.items()}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.0, [1]), (0.4, [1]), (0.41, [1, 2]), (0.7, [1, 2]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_the_nucleus_is_the_fewest_likeliest_tokens_that_reach_top_p(top_p: float, kept: list[int]) -> None:
    found = nucleus(torch.tensor(PROBABILITIES, dtype=torch.float64), top_p)
    assert found.tolist() == [each if token in kept else 0.0 for token, each in enumerate(PROBABILITIES)]


def test_draws_follow_the_probabilities_of_the_nucleus() -> None:
    assert drawn() == pytest.approx(dict(enumerate(PROBABILITIES)), abs=0.04)
    assert drawn(top_p=0.65) == pytest.approx({1: 4 / 7, 2: 3 / 7}, abs=0.04)


def test_penalties_lower_the_logits_of_generated_tokens_once_or_as_often_as_they_occur() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.5]] * 3)
    plain, present, frequent = (Row(0, [1], 9, generated=[1, 1, 2]) for _ in range(3))
    present.presence_penalty, frequent.frequency_penalty = 1.6, 0.6
    # Presence: 1.0, 2.0 - 1.6, 1.5 - 1.6. Frequency: 1.0, 2.0 - 2 * 0.6, 1.5 - 0.6.
    assert choose_tokens(logits, [plain, present, frequent]) == [1, 0, 0]
    assert logits.tolist() == [[1.0, 2.0, 1.5]] * 3
    normalizer = math.log(math.exp(1) + math.exp(2) + math.exp(1.5))
    assert present.log_probability == pytest.approx(1.0 - normalizer), "without the penalties"


def test_a_repeated_batch_keeps_all_options() -> None:
    row = Row(4, [1], 5, 6, 0.7, ("x",), 0.8, 0.1, 0.2, generated=[9])
    assert row.fresh() == Row(4, [1], 5, 6, 0.7, ("x",), 0.8, 0.1, 0.2)
