"""The memory plan of training against what torch's allocator handed out in real steps."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config

from ragtune_ray import config
from ragtune_ray.generation import shared_prefixes
from ragtune_ray.terminal import training_plan_lines
from ragtune_ray.training import memory, optimization, trainable
from tests.support.models import save_model, save_tokenizer

ANSWER_TOKENS = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tokenizer(path)
    save_model(path, hidden_size=128, intermediate_size=256, num_hidden_layers=4, vocab_size=1000)
    return path


def settings_of(directory: Path, *changes: str) -> config.Config:
    given = [f"generator.model={directory}", "training.precision=float32", "training.max_tokens=128"]
    return config.Config().using(*given, "training.micro_batch_tokens=512", *changes)


def allocated(settings: config.Config, directory: Path, folder: Path) -> int:
    """The most bytes that torch's allocator had handed out at once during two steps, and the loading before them."""
    training = settings.training
    rows = range(max(1, training.micro_batch_tokens // training.max_tokens))
    prompts = [[5 + row] * (training.max_tokens - ANSWER_TOKENS + 1) for row in rows]
    piece = shared_prefixes.collate(prompts, [[3] * ANSWER_TOKENS for _ in rows], [[row] for row in rows], 0)
    dtype = getattr(torch, training.precision)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective = trainable.load_objective(settings, directory, {})
        optimizer = optimization.make_optimizer(objective, training)
        for _ in range(2):
            optimization.take_step(
                objective,
                types.SimpleNamespace(pieces=lambda given: iter([given])),
                piece,
                1.0,
                optimizer,
                1.0,
                lambda: optimization.autocast("cpu", dtype),
            )
        del objective, optimizer
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((each["ts"], each["args"]["Bytes"]) for each in events if each["name"] == "[memory]")
    alive = peak = 0
    for _, size in changes:
        alive += size
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["training.gradient_checkpointing=true"],
        ["training.lora_rank=8"],
        ["training.lora_rank=8", "training.quantization=nf4"],
        ["training.precision=bfloat16"],
        ["training.micro_batch_tokens=128"],
        ["training.max_tokens=512"],
    ],
    ids=" ".join,
)
def test_the_plan_is_what_two_steps_take(directory: Path, tmp_path: Path, changes: list[str]) -> None:
    settings = settings_of(directory, *changes)
    planned = memory.plan(settings, directory, ANSWER_TOKENS)
    assert planned.device_bytes == pytest.approx(allocated(settings, directory, tmp_path), rel=0.15)


def test_weights_gradients_and_moments_are_counted_by_their_type(directory: Path) -> None:
    def counts(*changes: str) -> Any:
        return memory.plan(settings_of(directory, *changes), directory, ANSWER_TOKENS)

    full, adapted = counts(), counts("training.lora_rank=8")
    number = full.num_trained
    assert number == sum(
        each.numel() for each in trainable.generator_without_weights(config.Training(), directory, "cpu").parameters()
    )
    assert (full.weights, full.gradients, full.optimizer, full.best_weights) == (
        4 * number,
        4 * number,
        8 * number,
        4 * number,
    )
    assert adapted.weights == full.weights + 4 * adapted.num_trained
    assert adapted.gradients == 4 * adapted.num_trained
    sharded = counts("training.strategy=fsdp", "training.workers=4")
    assert (sharded.weights, sharded.optimizer) == (full.weights // 4, full.optimizer // 4)
    assert sharded.weights < sharded.loading < full.weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "gigabytes"),
    # Linear layers of the blocks: 6.95e9 weights in .516 bytes each or 2; embeddings and the last layer: 1.24e9 in 2 bytes;
    # adapters: 43.6e6 in 4 bytes, their gradients and two moments.
    [(["training.quantization=nf4"], 6.95 * 0.516 + 2.49 + 4 * 0.175), ([], 6.95 * 2 + 2.49 + 4 * 0.175)],
)
def test_adapters_on_a_model_of_8_billion_weights_fit_on_a_card_of_24_gb(
    tmp_path: Path, changes: list[str], gigabytes: float
) -> None:
    Qwen3Config(
        hidden_size=4096,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12288,
        vocab_size=151936,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(tmp_path)  # Qwen/Qwen3-8B, without its weights
    given = ["training.lora_rank=16", "training.gradient_checkpointing=true", "training.precision=bfloat16"]
    lengths = ["training.micro_batch_tokens=4096", "training.max_tokens=4096"]
    plan = memory.plan(config.Config().using(*given, *lengths, *changes), tmp_path, 128, "cuda")
    held = plan.weights + plan.gradients + plan.optimizer
    assert held == pytest.approx(gigabytes * 1e9, rel=0.02)
    assert plan.device_bytes < 21e9


def test_the_questions_decide_how_long_answers_are(directory: Path, tmp_path: Path) -> None:
    asked = tmp_path / "questions.jsonl"
    rows = [{"query_id": f"q{n}", "text": "Why?", "answers": ["a" * n]} for n in (3, 20)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert memory.plan_for(settings_of(directory)).answer_tokens == memory.UNKNOWN_ANSWER_TOKENS
    settings = settings_of(directory, f"queries.path={asked}")
    planned = memory.plan_for(settings)
    assert planned.answer_tokens == 21, "20 letters and the end token"
    shown = training_plan_lines(settings, planned)
    assert max(map(len, shown)) <= 80
    assert "512 tokens per pass, up to 21 of an answer" in "\n".join(shown)
    with pytest.raises(config.ConfigError, match="contrastive: memory is planned for sft"):
        memory.plan_for(settings.using("training.objective=contrastive"))
