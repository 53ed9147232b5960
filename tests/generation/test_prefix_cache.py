"""System messages are computed once, and answers are those of whole prompts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ragtune_ray.generation.continuous import ContinuousGenerator
from ragtune_ray.generation.decoding import DecodingBatch
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.generation.interface import Prompt
from ragtune_ray.generation.shared_prefixes import PrefixCache, prefix_cache
from ragtune_ray.models import packing
from ragtune_ray.models.hardware import resolve_precision
from tests.support.models import save_adapter

DTYPE = resolve_precision("auto", "cpu")
SYSTEM = "Answer from the passages, in a few words, and cite them."
pytestmark = pytest.mark.skipif(not packing.supports_packing(DTYPE), reason="this build of torch lacks the operators")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.2)).eval().to(DTYPE)
    packing.pack(made)
    return made


@pytest.fixture
def generator(generator_directory: Path) -> TransformersGenerator:
    return TransformersGenerator(generator_directory, precision="auto", batch_tokens=4000, device="cpu")


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of tokens of every pass over a model."""
    seen: list[int] = []
    forward = LlamaForCausalLM.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    return seen


def prompts_with(system: str, count: int) -> list[Prompt]:
    return [Prompt((("system", system), ("user", f"{number} says what?")), (), 0) for number in range(count)]


def test_a_prompt_in_two_passes_has_the_logits_of_one_pass(model: Any, lengths: list[int]) -> None:
    beginning = torch.randint(300, (40,)).tolist()
    prompts = [beginning + torch.randint(300, (count,)).tolist() for count in (25, 1, 60)]
    cache = PrefixCache(model, 1000)
    whole = DecodingBatch(model, prompts, 4, 0)
    lengths.clear()
    divided = DecodingBatch(model, prompts, 4, 0, prefixes=cache, num_shared=[40] * 3)
    assert lengths == [40, 32, 16, 64], "the beginning, then each prompt without it, padded"
    grouped = DecodingBatch(model, prompts, 4, 1000, prefixes=cache, num_shared=[40] * 3)
    assert lengths[4:] == [64], "three prompts in a pass after the same beginning"
    for batch in (divided, grouped):
        torch.testing.assert_close(batch.logits.float(), whole.logits.float(), rtol=0.02, atol=0.05)
    tokens = torch.tensor([5, 6, 7])
    for batch in (whole, divided, grouped):
        batch.step(tokens)
    for batch in (divided, grouped):
        torch.testing.assert_close(batch.logits.float(), whole.logits.float(), rtol=0.02, atol=0.05)


def test_padding_beyond_the_reserved_positions_is_cut(model: Any) -> None:
    prompt = torch.randint(300, (60,)).tolist()  # 40 and 20, padded to 32, in 64 positions
    whole = DecodingBatch(model, [prompt], 4, 0)
    divided = DecodingBatch(model, [prompt], 4, 0, prefixes=PrefixCache(model, 100), num_shared=[40])
    for _ in range(3):
        torch.testing.assert_close(divided.logits.float(), whole.logits.float(), rtol=0.02, atol=0.05)
        for batch in (whole, divided):
            batch.step(torch.tensor([7]))


def test_numbers_do_not_depend_on_what_is_in_the_cache(model: Any) -> None:
    prompt = torch.randint(300, (70,)).tolist()
    cache = PrefixCache(model, 1000)
    first, second = (DecodingBatch(model, [prompt], 4, 0, prefixes=cache, num_shared=[40]) for _ in range(2))
    assert torch.equal(first.logits, second.logits)


def test_the_beginnings_used_last_are_kept(model: Any, lengths: list[int]) -> None:
    cache = PrefixCache(model, 100)
    one, two, three = ([number] * 40 for number in range(3))
    for beginning in (one, two, one, three, one):  # the third makes room by dropping the second
        cache.states(beginning)
    assert lengths == [40] * 3
    cache.states(two)
    assert lengths == [40] * 4
    assert [cache.pays(count) for count in (31, 32, 100, 101)] == [False, True, True, False]


def test_an_abandoned_pass_leaves_nothing_in_the_cache(model: Any, lengths: list[int]) -> None:
    cache = PrefixCache(model, 100)

    def abandon() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        cache.states([1] * 40, abandon)
    cache.states([1] * 40)
    assert lengths == [40, 40]


def test_a_system_message_is_computed_once_in_bulk_and_served(
    generator: TransformersGenerator, lengths: list[int]
) -> None:
    prompts = prompts_with(SYSTEM, 6)
    bulk = [made.text for made in generator.generate(prompts, max_new_tokens=5)]
    start = generator.to_row(prompts[0], max_new_tokens=5).num_shared
    assert start == len(generator._system_ids[SYSTEM]) > 32
    assert lengths.count(start) == 1
    engine = ContinuousGenerator(generator)
    served = [engine.submit(prompt, max_new_tokens=5) for prompt in prompts]
    assert [request.completion().text for request in served] == bulk
    engine.close()
    assert lengths.count(start) == 1


def test_other_beginnings_are_not_kept(generator: TransformersGenerator) -> None:
    short = prompts_with("Be brief.", 1)[0]
    without = Prompt((("user", SYSTEM),), (), 0)
    assert [generator.to_row(prompt, max_new_tokens=1).num_shared for prompt in (short, without)] == [0, 0]


def test_requests_with_an_adapter_do_not_use_the_states_of_the_base_model(
    generator_directory: Path, generator: TransformersGenerator, tmp_path: Path
) -> None:
    adapter = save_adapter(generator_directory, tmp_path / "adapter", seed=0)
    prompts = prompts_with(SYSTEM, 4)

    def answers(*names: str) -> list[list[float]]:
        """The log probabilities of the answers, by an engine that is asked with these adapters, one after another."""
        fresh = TransformersGenerator(generator_directory, precision="auto", batch_tokens=4000, device="cpu")
        engine = ContinuousGenerator(fresh, adapters={"other": adapter})
        found = []
        for name in names:
            requests = [engine.submit(prompt, max_new_tokens=8, adapter=name) for prompt in prompts]
            found.append([request.completion().log_probability for request in requests])
        engine.close()
        return found

    base, other = answers("", "other")
    assert answers("other", "") == [other, base]
    assert other != base
    assert base == [made.log_probability for made in generator.generate(prompts, max_new_tokens=8)]


def test_only_packed_models_without_a_sliding_window_have_a_cache() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 30}
    plain = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).eval().to(DTYPE)
    assert prefix_cache(plain, 100) is None
    packing.pack(plain)
    assert prefix_cache(plain, 100) is not None
    sliding = MistralForCausalLM(
        MistralConfig(**shape, num_attention_heads=2, num_key_value_heads=2, sliding_window=16)
    )
    packing.pack(sliding.eval().to(DTYPE))
    assert prefix_cache(sliding, 100) is None
