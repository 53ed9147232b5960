"""The configs for real set-ups parse, can be planned, and fit into the memory that they are for."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import Qwen2Config, Qwen3Config

from ragtune_ray import config
from ragtune_ray.generation.vllm_generator import cache_bytes
from ragtune_ray.index.plan import plan_index
from tests.support.corpora import write_corpus

CONFIGS = Path(__file__).parents[2] / "configs"
GB = 10**9


class Published(NamedTuple):
    """The shape of a model, from its config.json on the hub."""

    shape: Qwen2Config | Qwen3Config
    num_weights: float


QWEN_2 = {
    "Qwen/Qwen2.5-1.5B-Instruct": Published(
        Qwen2Config(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2), 1.54e9
    ),
    "Qwen/Qwen2.5-14B-Instruct": Published(
        Qwen2Config(hidden_size=5120, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8), 14.8e9
    ),
    "Qwen/Qwen2.5-32B-Instruct": Published(
        Qwen2Config(hidden_size=5120, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8), 32.8e9
    ),
    "Qwen/Qwen3-4B-Instruct-2507": Published(
        Qwen3Config(
            hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128
        ),
        4.02e9,
    ),
}


@pytest.mark.parametrize("name", ["cpu", "gpu-24gb", "gpu-80gb", "gpu-8x80gb"])
def test_a_set_up_parses_and_can_be_planned(name: str, tmp_path: Path) -> None:
    settings = config.load_config(CONFIGS / f"{name}.yaml")
    assert settings.generator.model in QWEN_2
    write_corpus(tmp_path / "corpus.jsonl", 20)
    here = [f"workspace={tmp_path / 'workspace'}", f"corpus.path={tmp_path / 'corpus.jsonl'}"]
    planned = plan_index(settings.using(*here, "encoder.model=hashing-384", "encoder.query_prefix="))
    assert json.loads((Path(planned) / "plan.json").read_text())["documents"]["value"] == 20


@pytest.mark.parametrize(("name", "gigabytes"), [("gpu-24gb", 24), ("gpu-80gb", 80), ("gpu-8x80gb", 80)])
def test_weights_and_keys_and_values_fit_on_a_card(name: str, gigabytes: int) -> None:
    settings = config.load_config(CONFIGS / f"{name}.yaml")
    model, parts = QWEN_2[settings.generator.model], settings.generator.tensor_parallel
    weights = 2 * model.num_weights / parts
    cache = settings.generator.batch_tokens * cache_bytes(model.shape, 2) / parts
    assert weights + cache < 0.85 * gigabytes * GB, "vLLM needs some for activations and graphs"
    said = (CONFIGS / f"{name}.yaml").read_text().partition("workspace:")[0]
    assert f"{weights / GB:.0f} GB" in said
    assert f"{cache / GB:.1f} GB" in said or f"{cache / GB:.0f} GB" in said
    assert settings.serve.generator.num_gpus >= parts or parts == 1
    assert settings.prompt.max_tokens <= settings.generator.batch_tokens
