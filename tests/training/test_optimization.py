"""Optimizer steps against plain torch, and saved states that resume exactly."""

import functools
import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor, nn

from ragtune_ray import config, schema
from ragtune_ray.schema import GeneratorExample
from ragtune_ray.training import optimization, trainable
from ragtune_ray.training.objectives.contrastive import Contrastive

TRAINING = config.Training(learning_rate=1e-3, weight_decay=0.1)


def examples(count: int, answer: str = "yes") -> list[GeneratorExample]:
    return [
        GeneratorExample(f"q{n}", "with_gold", f"question {n}", answer + "!" * n, (), 0, 10, len(answer) + n + 1)
        for n in range(count)
    ]


def step(
    objective: Any, rows: list[GeneratorExample], optimizer: torch.optim.Optimizer, clip: float = 1.0
) -> optimization.StepResult:
    return optimization.take_step(
        objective,
        objective,
        rows,
        objective.weight(rows),
        optimizer,
        clip,
        lambda: optimization.autocast("cpu", torch.float32),
    )


@pytest.fixture
def load(generator_directory: Path):
    def build(*overrides: str) -> Any:
        settings = config.Config().using(*(f"training.{override}" for override in overrides))
        return trainable.load_objective(settings, generator_directory, {})

    return build


def test_a_step_equals_plain_adamw_on_the_mean_token_loss(load) -> None:
    rows = examples(5)
    ours, plain = load("micro_batch_tokens=16"), load()
    optimizer = optimization.make_optimizer(ours, TRAINING)
    result = step(ours, rows, optimizer, clip=0.5)

    whole = plain(plain.collate([row.prompt for row in rows], [row.answer for row in rows])) / sum(
        row.num_answer_tokens for row in rows
    )
    whole.backward()
    weights = [weight for weight in plain.parameters() if weight.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(weights, 0.5)
    decayed = [weight for weight in weights if weight.ndim > 1]
    torch.optim.AdamW(
        [{"params": decayed}, {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0}],
        lr=1e-3,
        weight_decay=0.1,
    ).step()
    assert result.loss == pytest.approx(float(whole.detach()), rel=1e-5)
    assert result.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    for name, weight in optimization.trainable_weights(plain).items():
        torch.testing.assert_close(optimization.trainable_weights(ours)[name], weight, rtol=1e-4, atol=2e-5)


def test_training_from_a_loaded_state_ends_with_the_same_weights(load, tmp_path: Path) -> None:
    straight, stopped, resumed = load(), load(), load()
    optimizer = optimization.make_optimizer(straight, TRAINING)
    for number in range(6):
        step(straight, examples(3 + number), optimizer)
    before = optimization.make_optimizer(stopped, TRAINING)
    for number in range(3):
        step(stopped, examples(3 + number), before)
    best = {name: weight + 1 for name, weight in optimization.trainable_weights(stopped).items()}
    optimization.save_state(tmp_path, stopped, before, best, {"step": 3})
    after = optimization.make_optimizer(resumed, TRAINING)
    facts, kept = optimization.load_state(tmp_path, resumed, after)
    assert facts == {"step": 3}
    assert all(torch.equal(kept[name], best[name]) for name in best)
    for number in range(3, 6):
        step(resumed, examples(3 + number), after)
    for name, weight in optimization.trainable_weights(straight).items():
        torch.testing.assert_close(optimization.trainable_weights(resumed)[name], weight, rtol=0, atol=1e-6)


def test_a_loaded_optimizer_is_on_the_device_of_its_weights(load, tmp_path: Path) -> None:
    saved = load()
    before = optimization.make_optimizer(saved, TRAINING)
    step(saved, examples(2), before)
    optimization.save_state(tmp_path, saved, before, {}, {})
    elsewhere = load().to("meta")  # any device other than the CPU, to which files are loaded
    after = optimization.make_optimizer(elsewhere, TRAINING)
    optimization.load_state(tmp_path, elsewhere, after)
    assert len(after.state) == len(before.state)
    for weight, state in after.state.items():
        assert {key: value.device for key, value in state.items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq"), weight.device
        )


def test_a_state_of_another_model_is_refused(load, tmp_path: Path) -> None:
    objective = load()
    with pytest.raises(optimization.TrainingError, match="another model"):
        optimization.restore_weights(objective, {"model.nothing": torch.zeros(3)})


def test_a_non_finite_loss_changes_no_weights(load) -> None:
    objective = load()
    optimizer = optimization.make_optimizer(objective, TRAINING)
    with torch.no_grad():
        next(objective.parameters())[:] = float("nan")
    before = optimization.trainable_weights(objective)
    result = step(objective, examples(2), optimizer)
    assert result.loss != result.loss
    after = optimization.trainable_weights(objective)
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)


def test_weights_without_gradient_are_frozen(encoder_directory: Path) -> None:
    from ragtune_ray.schema import RetrieverExample

    settings = config.Config().using("training.objective=contrastive")
    objective = trainable.load_objective(settings, encoder_directory, {})
    rows = [RetrieverExample("q", "moon", ("a#0", "b#0"), ("the moon", "the sun"), (), 4)]
    frozen = optimization.freeze_unreached(objective, objective, rows)
    assert frozen
    assert all("pooler" in name for name in frozen)
    assert not set(frozen) & set(optimization.trainable_weights(objective))


class Summed(nn.Module):
    """An objective of one layer with one piece per row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def pieces(self, rows: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        for row in rows:
            yield {"row": torch.linspace(0, row, 4)}

    def forward(self, piece: dict[str, Tensor]) -> Tensor:
        return self.layer(piece["row"]).square().sum()


def steps_of_summed(module: nn.Module, objective: Any, rows: Sequence[int]) -> list[float]:
    """Loss and gradient norm of two steps with the weight of four rows."""
    optimizer = optimization.make_optimizer(module, TRAINING)
    computing = functools.partial(optimization.autocast, "cpu", torch.float32)
    results = [optimization.take_step(module, objective, rows, 4.0, optimizer, 1.0, computing) for _ in range(2)]
    return [value for result in results for value in (result.loss, result.gradient_norm)]


def meet(worker: int, directory: str) -> None:
    """Join two workers, which then make the same model."""
    torch.distributed.init_process_group(
        "gloo", f"file://{directory}/meeting", rank=worker, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)


def spread_worker(worker: int, directory: str) -> None:
    """One of two workers; the first has three of the four rows."""
    from torch.distributed.fsdp import fully_shard

    meet(worker, directory)
    objective: Any = Summed()
    fully_shard(objective)
    found = steps_of_summed(objective, objective, [1, 2, 3] if worker == 0 else [4])
    (Path(directory) / f"found-{worker}").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def validated_worker(worker: int, directory: str) -> None:
    """One of two workers, which saves, restores and goes on after a validation, as between two steps."""
    from torch.distributed.fsdp import fully_shard

    meet(worker, directory)
    objective: Any = Summed()
    fully_shard(objective)
    optimizer = optimization.make_optimizer(objective, TRAINING)
    computing = functools.partial(optimization.autocast, "cpu", torch.float32)
    optimization.take_step(objective, objective, [1, 2], 4.0, optimizer, 1.0, computing)
    with torch.no_grad():
        objective({"row": torch.ones(4)})  # leaves the gathered weights in the module
    before = optimization.trainable_weights(objective)
    with torch.no_grad():
        objective({"row": torch.ones(4)})
    state = Path(directory) / f"state-{worker}"
    state.mkdir()
    optimization.save_state(state, objective, optimizer, {}, {"step": 1})
    with torch.no_grad():
        objective({"row": torch.ones(4)})
    optimization.restore_weights(objective, {name: value + 1 for name, value in before.items()})
    after = optimization.trainable_weights(objective)
    moved = max(float((after[name] - before[name] - 1).abs().max()) for name in before)
    names = sorted(load_file(state / optimization.OPTIMIZER))
    (Path(directory) / f"found-{worker}").write_text(json.dumps([moved, names]))
    torch.distributed.destroy_process_group()


def test_fsdp_saves_and_restores_right_after_a_validation(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(validated_worker, (str(tmp_path),), nprocs=2)
    for worker in range(2):
        moved, names = json.loads((tmp_path / f"found-{worker}").read_text())
        assert moved < 1e-6
        assert {name.rpartition(":")[2] for name in names} == {"exp_avg", "exp_avg_sq", "step"}


class Letters(nn.Module):
    """An encoder of texts that averages vectors of their letters."""

    max_seq_length = 512

    class Tokenizer:
        pad_token_id, padding_side, model_max_length = 0, "right", 512

        def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1 + ord(letter) % 50 for letter in text] for text in texts]}

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = self.Tokenizer()
        self.letters, self.layer = nn.Embedding(64, 16), nn.Linear(16, 8)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        shown = features["attention_mask"].unsqueeze(-1).float()
        found = self.layer(self.letters(features["input_ids"]))
        return {"sentence_embedding": (found * shown).sum(1) / shown.sum(1)}


def contrast_rows(lengths: Sequence[int]) -> list[schema.RetrieverExample]:
    """One row per length of its passages, in letters."""
    return [
        schema.RetrieverExample(
            query_id=f"q{number}",
            query=f"query {number}",
            passage_ids=(f"d{number}#0", f"e{number}#0"),
            passages=("p" * length + str(number), "r" * length + str(number)),
            teacher_scores=(),
            num_tokens=1,
        )
        for number, length in enumerate(lengths)
    ]


CONTRAST_LENGTHS = (20, 20, 100, 100)  # two short rows are one chunk, two long ones are several


def steps_of_contrast(module: nn.Module, objective: Any, rows: Sequence[schema.RetrieverExample]) -> list[float]:
    optimizer = optimization.make_optimizer(module, TRAINING)
    computing = functools.partial(optimization.autocast, "cpu", torch.float32)
    results = [optimization.take_step(module, objective, rows, 4.0, optimizer, 1.0, computing) for _ in range(3)]
    return [value for result in results for value in (result.loss, result.gradient_norm)]


def contrasting_worker(worker: int, directory: str) -> None:
    meet(worker, directory)
    objective = Contrastive(Letters(), temperature=0.05, chunk_tokens=256)
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    module = nn.parallel.DistributedDataParallel(objective, **options)
    rows = contrast_rows(CONTRAST_LENGTHS)
    found = steps_of_contrast(module, objective, rows[:2] if worker == 0 else rows[2:])
    (Path(directory) / f"found-{worker}").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_workers_with_one_and_with_several_chunks_take_the_steps_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(contrasting_worker, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    alone = Contrastive(Letters(), temperature=0.05, chunk_tokens=100_000)
    expected = steps_of_contrast(alone, alone, contrast_rows(CONTRAST_LENGTHS))
    for worker in range(2):
        assert json.loads((tmp_path / f"found-{worker}").read_text()) == pytest.approx(expected, rel=1e-4)


def test_fsdp_workers_may_have_different_numbers_of_pieces(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(spread_worker, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    alone = Summed()
    expected = steps_of_summed(alone, alone, [1, 2, 3, 4])
    for worker in range(2):
        assert json.loads((tmp_path / f"found-{worker}").read_text()) == pytest.approx(expected, rel=1e-5)


def test_the_learning_rate_rises_then_falls_to_a_tenth() -> None:
    factors = [optimization.learning_rate_factor(number, 100, 0.1) for number in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (number + 1) for number in range(10)])
    assert sorted(factors[9:], reverse=True) == factors[9:]
    assert factors[55] == pytest.approx(0.55)
    assert optimization.learning_rate_factor(100, 100, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [((), 5e-5), (("lora_rank=8",), 2e-4), (("objective=contrastive",), 3e-5), (("learning_rate=0.5",), 0.5)],
)
def test_the_learning_rate_defaults_to_that_of_the_objective(overrides: tuple[str, ...], expected: float) -> None:
    settings = config.Config().using(*(f"training.{override}" for override in overrides))
    assert optimization.peak_learning_rate(settings.training) == expected
