"""Packed layers compute the same numbers as plain ones, independently of the batch."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ragtune_ray.generation.decoding import DecodingBatch
from ragtune_ray.models import packing
from ragtune_ray.models.hardware import resolve_precision

DTYPE = resolve_precision("auto", "cpu")
IS_ROUNDED = torch.bfloat16 == DTYPE
pytestmark = pytest.mark.skipif(not packing.supports_packing(DTYPE), reason="this build of torch lacks the operators")


def largest_difference(packed: torch.Tensor, exact: torch.Tensor) -> float:
    return float((packed.float() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("bias", [True, False])
def test_packed_layer_computes_like_the_plain_one(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 48, bias=bias).to(DTYPE)
    inputs = torch.randn(3, 7, 96).to(DTYPE)
    with torch.inference_mode():
        exact = nn.functional.linear(inputs.float(), layer.weight.float(), layer.bias.float() if bias else None)
        assert largest_difference(packing.PackedLinear(layer)(inputs), exact) < 0.01
        gelu = nn.functional.gelu(exact)
        assert largest_difference(packing.PackedLinear(layer, "gelu")(inputs), gelu) < 0.01
        assert largest_difference(packing.PackedLinear(layer, "swish")(inputs), nn.functional.silu(exact)) < 0.01


@pytest.mark.parametrize(
    ("model_class", "config_class", "more"),
    [
        (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": 12}),
        (Qwen2ForCausalLM, Qwen2Config, {}),
        (Qwen3ForCausalLM, Qwen3Config, {}),
    ],
)
def test_a_packed_model_is_as_close_to_float32_as_a_plain_one(
    model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig], more: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 99, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    exact = model_class(config_class(**shape, **heads, **more, initializer_range=0.2)).eval()
    for name, parameter in exact.named_parameters():
        if "norm" in name or "bias" in name:  # else they would be one and zero
            nn.init.uniform_(parameter, 0.5, 1.5)
    plain = copy.deepcopy(exact).to(DTYPE)
    packed = copy.deepcopy(plain)
    assert packing.pack(packed) == 3 * (1 + 1) + 1, "an attention and a feed-forward block per layer, and the head"
    prompts = [list(range(30)), list(range(40, 57))]
    rows = [DecodingBatch(model, prompts, 8, prefill_tokens=512) for model in (exact, plain, packed)]
    for _ in range(3):
        expected, near, found = (row.logits.float() for row in rows)
        assert largest_difference(found, expected) < max(1.5 * largest_difference(near, expected), 0.01)
        assert not IS_ROUNDED or largest_difference(found, expected) > 0, "it does compute in bfloat16"
        for row in rows:
            row.step(expected.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_norm_equals_that_of_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    nn.init.uniform_(layer.weight)
    inputs = torch.randn(3, 5, 64).to(dtype)
    before = inputs.clone()
    torch.testing.assert_close(packing.PackedNorm(layer)(inputs), layer(inputs))
    assert torch.equal(inputs, before)


def test_packed_bert_fuses_gelu_and_computes_the_same() -> None:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    exact = BertModel(BertConfig(**shape, initializer_range=0.2)).eval()
    plain = copy.deepcopy(exact).to(DTYPE)
    packed = copy.deepcopy(plain)
    packing.pack(packed)
    fused = [module for module in packed.modules() if isinstance(module, packing.PackedLinear)]
    assert [layer.activation for layer in fused].count("gelu") == 2
    ids = torch.arange(60).view(2, 30)
    with torch.inference_mode():
        expected = exact(ids).last_hidden_state
        close = largest_difference(plain(ids).last_hidden_state, expected)
        assert largest_difference(packed(ids).last_hidden_state, expected) < max(1.5 * close, 0.01)


def test_a_model_in_another_format_is_not_packed() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.float32 if IS_ROUNDED else torch.bfloat16)
    assert packing.pack(model) == 0
    assert type(model[0]) is nn.Linear


def test_logits_of_a_row_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "vocab_size": 4000}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.05)).eval().to(DTYPE)
    packing.pack(model)
    prompts = [torch.randint(4000, (20 + 3 * number,)).tolist() for number in range(48)]
    together = DecodingBatch(model, prompts, 8, prefill_tokens=0)
    alone = [DecodingBatch(model, [prompt], 8, prefill_tokens=0) for prompt in prompts]
    for _ in range(3):
        tokens = torch.stack([row.logits[0].argmax() for row in alone])
        together.step(tokens)
        for place, row in enumerate(alone):
            row.step(tokens[place : place + 1])
            if IS_ROUNDED:
                assert torch.equal(together.logits[place], row.logits[0]), f"row {place}"
            torch.testing.assert_close(together.logits[place], row.logits[0], rtol=1e-5, atol=1e-4)
