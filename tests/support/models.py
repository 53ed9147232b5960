"""Tiny generators with seeded weights, prompts for them, and tuned models."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ragtune_ray.generation.interface import Prompt
from ragtune_ray.storage import artifacts, filesystem

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
CONTEXT = 256


def save_tokenizer(directory: Path, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|im_end|>",
        chat_template=template,
    )
    wrapped.save_pretrained(directory)
    return wrapped


def save_model(directory: Path, seed: int = 0, **changes: Any) -> None:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "initializer_range": 0.5,
    }
    LlamaForCausalLM(LlamaConfig(**(shape | changes))).save_pretrained(directory)


def save_cross_encoder(encoder_directory: Path, directory: Path) -> Path:
    """As transformers writes it, with the tokenizer of an encoder, one label, and weights so large that scores differ."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(encoder_directory)
    tokenizer.save_pretrained(directory)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    described = BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **shape)
    BertForSequenceClassification(described).save_pretrained(directory)
    return directory


def prompt_of(text: str) -> Prompt:
    return Prompt((("user", text),), (), 0)


def some_prompts(count: int = 12) -> list[Prompt]:
    source = random.Random(3)
    return [prompt_of("".join(source.choices("abc def", k=source.randint(1, 90)))) for _ in range(count)]


def save_adapter(model_directory: Path, directory: Path, seed: int, **changes: Any) -> Path:
    """As PEFT writes it, with weights that are not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False} | changes
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(directory)
    return directory


def publish_tuned_model(folder: Path | str, directory: Path, content: bytes = b"weights", **facts: Any) -> str:
    """Publish a copy of a model directory in a folder of tuned models, as training does; returns its URL."""
    url = filesystem.join(str(folder), hashlib.sha256(content).hexdigest()[:12])
    staging = artifacts.stage(url)
    shutil.copytree(directory, staging, dirs_exist_ok=True)
    (staging / "model.safetensors").write_bytes(content)
    artifacts.publish(staging, url, "model", **facts)
    artifacts.make_current(str(folder), url.rpartition("/")[2])
    return url


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the weights of a model directory after a change."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_settings(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(found | changes))


class Touching:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


def save_nli_model(directory: Path, encoder_directory: Path) -> None:
    """A BERT of 2 layers with three labels, entailment in the middle, and the tokenizer of the encoder."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(encoder_directory)
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(directory)
    torch.manual_seed(1)
    labels = {0: "contradiction", 1: "Entailment", 2: "neutral"}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    settings = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.4, id2label=labels, **shape
    )
    BertForSequenceClassification(settings).save_pretrained(directory)
