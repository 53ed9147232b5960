"""Prompts with a common beginning: same losses and gradients as in separate rows, from fewer tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3Config

from ragtune_ray import config
from ragtune_ray.generation import shared_prefixes
from ragtune_ray.generation.shared_prefixes import IGNORED, OWN_TOKENS, collate, groups, mask, num_tokens
from ragtune_ray.schema import GeneratorExample
from ragtune_ray.training import trainable
from ragtune_ray.training.objectives.sft import Sft

PASSAGE = "[1] Saturn has rings of ice and rock, and Titan is its largest moon. question: "


def row(prompt: str, answer: str) -> GeneratorExample:
    return GeneratorExample("q", "with_gold", prompt, answer, (), 0, len(prompt), len(answer) + 1)


ROWS = [
    row(f"{PASSAGE}what has rings?", "Saturn"),
    row("[1] Io has volcanoes, more than any other moon. question: what erupts?", "Io"),
    row(f"{PASSAGE}which moon is largest?", "Titan [1]"),
    row(f"{PASSAGE}what has rings?", "it is Saturn"),  # the same prompt with another answer
    row(f"{PASSAGE}what are the rings of?", "ice"),
]


def test_two_questions_about_one_passage_match_tensors_by_hand() -> None:
    piece = collate([[1, 2, 3, 4], [1, 2, 5]], [[6, 9], [7, 8, 9]], [[0, 1]], pad_token=0)
    # First the tokens without a label: the shared 1 2 and the first prompt's 3. Then those that predict an answer's token.
    assert piece["input_ids"].tolist() == [[1, 2, 3, 4, 6, 5, 7, 8]]
    assert piece["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]
    assert piece["segments"].tolist() == [[0, 0, 1, 1, 1, 2, 2, 2]]
    assert piece["labels"].tolist() == [[IGNORED, IGNORED, IGNORED, 6, 9, 7, 8, 9]]
    assert piece["attention_mask"].tolist() == [[1] * 8]
    (seen,) = mask(piece["segments"], piece["position_ids"])
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 5],
        [0, 1, 5, 6],
        [0, 1, 5, 6, 7],
    ]


def test_one_prompt_with_two_answers_has_labels_of_both() -> None:
    piece = collate([[1, 2], [1, 2]], [[5], [6]], [[0, 1]], pad_token=0)
    assert piece["input_ids"].tolist() == [[1, 2, 2]]
    assert piece["labels"].tolist() == [[IGNORED, 5, 6]]


def test_padding_attends_to_itself_and_nothing_attends_to_it() -> None:
    piece = collate([[1, 2, 3], [4]], [[5], [5]], [[0], [1]], pad_token=0)
    assert piece["input_ids"].tolist() == [[1, 2, 3], [0, 0, 4]]
    assert piece["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert mask(piece["segments"], piece["position_ids"])[1].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=12)


@given(PROMPTS, st.integers(1, 60))
def test_every_prompt_is_in_one_group_that_shares_half(prompts: list[list[int]], longest: int) -> None:
    taught = [[7] * (1 + len(prompt) % 3) for prompt in prompts]
    found = groups(prompts, taught, longest)
    assert sorted(number for group in found for number in group) == list(range(len(prompts)))
    for group in (each for each in found if len(each) > 1):
        shown = [prompts[number] for number in group]
        total = num_tokens(shown, [taught[number] for number in group])
        (width,) = {len(line) for line in collate(prompts, taught, [group], 0)["input_ids"].tolist()}
        assert total == width <= longest
        least = max(len(prompt) for prompt in shown) / 2
        assert len({tuple(prompt[: int(least + 0.5)]) for prompt in shown}) == 1


def test_groups_are_limited_by_their_own_tokens() -> None:
    prompts = [[*range(100, 400), number] for number in range(1, 60)]
    taught = [[3] * 20 for _ in prompts]
    found = groups(prompts, taught, 10_000)
    assert (
        max(num_tokens([prompts[n] for n in group], [taught[n] for n in group]) for group in found) <= 300 + OWN_TOKENS
    )
    assert len(found) == 3


@pytest.fixture(params=[1024, 4096], ids=["eager", "sdpa"])
def objective(request: pytest.FixtureRequest, generator_directory: Path) -> Sft:
    """A tiny model, with either attention."""
    settings = config.Config().using(f"training.max_tokens={request.param}")
    found = trainable.load_objective(settings, generator_directory, {})
    assert isinstance(found, Sft)
    model: Any = found.model
    assert model.config._attn_implementation == ("eager" if request.param == 1024 else "sdpa")
    return found


def test_losses_and_gradients_equal_those_of_separate_rows(objective: Sft) -> None:
    def learnt(rows: list[GeneratorExample], *, apart: bool) -> tuple[float, torch.Tensor]:
        objective.zero_grad()
        pieces = [piece for row in rows for piece in objective.pieces([row])] if apart else list(objective.pieces(rows))
        losses = [objective(piece) for piece in pieces]
        for loss in losses:
            loss.backward()
        gradient = [weight.grad.flatten() for weight in objective.parameters() if weight.grad is not None]
        return sum(loss.item() for loss in losses), torch.cat(gradient)

    together = sum(piece["input_ids"].numel() for piece in objective.pieces(ROWS))
    assert together < sum(piece["input_ids"].numel() for row in ROWS for piece in objective.pieces([row]))
    loss, gradient = learnt(ROWS, apart=True)
    shared_loss, shared_gradient = learnt(ROWS, apart=False)
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert (shared_gradient - gradient).norm() / gradient.norm() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("sliding_window", 8), ("layer_types", ["full_attention", "linear_attention"])]
)
def test_models_with_other_attention_get_one_prompt_per_row(
    objective: Sft, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(objective.model.config, name, value, raising=False)
    plain = Sft(objective.model, objective._chat._tokenizer, objective._end_token)
    pieces = list(plain.pieces(ROWS))
    assert all(int(piece["segments"].max()) == 1 and not (piece["segments"] == 0).any() for piece in pieces)
    assert sum(len(piece["input_ids"]) for piece in pieces) == len(ROWS)


def test_a_window_in_the_config_of_the_text_part_counts() -> None:
    class Base:
        _supports_attention_backend = True
        config = Gemma3Config(
            text_config={"sliding_window": 8, "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
        )

    assert not shared_prefixes.supports_sharing(Base())
