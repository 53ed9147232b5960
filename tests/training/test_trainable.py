"""Saved models load in a process without this package and contain the trained weights."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ragtune_ray import config
from ragtune_ray.models import weights as weights_module
from ragtune_ray.training import optimization, trainable

WARM = """
import contextlib, io, json, sys
sys.modules["ragtune_ray"] = None  # importing it fails
for line in sys.stdin:
    code, *sys.argv[1:] = json.loads(line)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    print(printed.getvalue().splitlines()[-1], flush=True)
"""
"""Runs several scripts in one process, so that the libraries are imported once."""


@pytest.fixture(scope="module")
def clean_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """A function that runs code in a process that cannot import this package and returns the JSON it prints."""
    log = tmp_path_factory.mktemp("clean") / "errors.txt"
    with (
        log.open("w") as sink,
        subprocess.Popen(
            [sys.executable, "-c", WARM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, cwd="/"
        ) as process,
    ):
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def run(code: str, *arguments: str) -> Any:
            stdin.write(json.dumps([code, *arguments]) + "\n")
            stdin.flush()
            answer = stdout.readline()
            assert answer, log.read_text()
            return json.loads(answer)

        yield run
        stdin.close()


def moved(objective: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its weights, each slightly changed."""
    return {name: weight + 0.25 for name, weight in optimization.trainable_weights(objective).items()}


def test_a_generator_loads_with_transformers_and_the_trained_weights(
    generator_directory: Path, tmp_path: Path, clean_process: Callable[..., Any]
) -> None:
    settings = config.Config()
    weights = moved(trainable.load_objective(settings, generator_directory, {}))
    trainable.save_model(settings, generator_directory, weights, tmp_path)
    code = (
        "import json, sys; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(json.dumps([float(model.lm_head.weight.sum()), str(model.dtype)]))"
    )
    total, dtype = clean_process(code, str(tmp_path))
    assert total == pytest.approx(float(weights["model.lm_head.weight"].sum()), rel=1e-5)
    assert dtype == "torch.float32"
    assert weights_module.fingerprint(tmp_path) != weights_module.fingerprint(generator_directory)


def test_a_bfloat16_generator_is_trained_in_float32_and_written_in_bfloat16(
    generator_directory: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(generator_directory, source)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    objective = trainable.load_objective(config.Config(), source, {})
    assert {weight.dtype for weight in objective.parameters()} == {torch.float32}
    trainable.save_model(config.Config(), source, optimization.trainable_weights(objective), target)
    assert AutoModelForCausalLM.from_pretrained(target, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_loads_with_peft_and_equals_the_merged_model(
    generator_directory: Path, tmp_path: Path, clean_process: Callable[..., Any], quantization: str
) -> None:
    settings = config.Config().using("training.lora_rank=4", f"training.quantization={quantization}")
    objective = trainable.load_objective(settings, generator_directory, {})
    trainable.save_model(settings, generator_directory, moved(objective), tmp_path)
    code = (
        "import json, sys, torch; from transformers import AutoModelForCausalLM; from peft import PeftModel;"
        "merged = AutoModelForCausalLM.from_pretrained(sys.argv[1]); base = AutoModelForCausalLM.from_pretrained(sys.argv[2]);"
        "ids = torch.arange(20).unsqueeze(0); plain = base(ids).logits.clone();"
        "adapted = PeftModel.from_pretrained(base, sys.argv[1] + '/adapter');"
        "difference = lambda a, b: float((a - b).abs().max());"
        "print(json.dumps([difference(merged(ids).logits, adapted(ids).logits), difference(merged(ids).logits, plain)]))"
    )
    between, from_base = clean_process(code, str(tmp_path), str(generator_directory))
    assert between < 1e-2 < from_base


def test_a_quantized_model_has_linear_layers_in_four_bits_and_learns(generator_directory: Path) -> None:
    settings = config.Config().using("training.lora_rank=4", "training.quantization=nf4", "training.learning_rate=0.01")
    objective = trainable.load_objective(settings, generator_directory, {})
    layers = objective.model.base_model.model.model.layers
    weight = layers[0].self_attn.q_proj.base_layer.weight
    assert (weight.dtype, weight.numel()) == (torch.uint8, layers[0].self_attn.q_proj.in_features ** 2 // 2)
    trained = [name for name, each in objective.named_parameters() if each.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    piece = objective.collate(["one two three"] * 2, ["four", "five"])
    optimizer = optimization.make_optimizer(objective, settings.training)
    losses = []
    for _ in range(8):
        loss = objective(piece)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_without_bitsandbytes_quantization_says_how_to_install_it(
    generator_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    settings = config.Config().using("training.lora_rank=4", "training.quantization=nf4")
    with pytest.raises(weights_module.ModelError, match=r"pip install 'bitsandbytes>=0\.46'"):
        trainable.load_objective(settings, generator_directory, {})


@pytest.mark.parametrize(
    "changes",
    [
        ["training.quantization=nf4"],
        ["training.quantization=nf4", "training.lora_rank=4", "training.strategy=fsdp"],
        ["training.compile=true", "training.objective=contrastive"],
        ["training.compile=true", "training.strategy=fsdp"],
    ],
    ids=" ".join,
)
def test_settings_that_do_not_go_together_are_refused(changes: list[str]) -> None:
    with pytest.raises(config.ConfigError, match=r"training\.(quantization|compile)"):
        config.Config().using(*changes)


@pytest.mark.parametrize("name", ["contrastive", "distillation", "query_side"])
def test_an_encoder_loads_with_sentence_transformers(
    name: str, encoder_directory: Path, tmp_path: Path, clean_process: Callable[..., Any]
) -> None:
    import numpy as np

    settings = config.Config().using(f"training.objective={name}")
    objective = trainable.load_objective(settings, encoder_directory, {"a#0": np.ones(32, dtype=np.float32)})
    trainable.save_model(settings, encoder_directory, moved(objective), tmp_path)
    code = (
        "import json, sys; from sentence_transformers import SentenceTransformer;"
        "print(json.dumps([SentenceTransformer(path, device='cpu').encode('moon').tolist() for path in sys.argv[1:]]))"
    )
    tuned, base = (np.array(vector) for vector in clean_process(code, str(tmp_path), str(encoder_directory)))
    assert np.linalg.norm(tuned) == pytest.approx(1.0, rel=1e-4)
    assert np.abs(tuned - base).max() > 1e-3
    expected = trainable.load_objective(settings, tmp_path, {"a#0": np.ones(32, dtype=np.float32)}).vectors(["moon"])[0]
    assert np.allclose(tuned, expected.numpy(), atol=1e-5)


def test_a_reranker_loads_with_sentence_transformers_and_the_same_scores(
    encoder_directory: Path, tmp_path: Path, clean_process: Callable[..., Any]
) -> None:
    from ragtune_ray.models.reranker import Reranker

    settings = config.Config().using("training.objective=reranker")
    objective: Any = trainable.load_objective(settings, encoder_directory, {})
    weights = {name: weight * 3 for name, weight in optimization.trainable_weights(objective).items()}
    trainable.save_model(settings, encoder_directory, weights, tmp_path)
    optimization.restore_weights(objective, weights)
    pairs = [("what is mars", "mars is red and cold"), ("moon", "armstrong"), ("moon", "a star")]
    code = (
        "import json, sys; from sentence_transformers import MultiVectorEncoder;"
        "model = MultiVectorEncoder(sys.argv[1], device='cpu');"
        "texts = zip(*json.loads(sys.argv[2]));"
        "queries, passages = (encode(list(some)) for encode, some in zip((model.encode_query, model.encode_document), texts));"
        "print(json.dumps(model.similarity_pairwise(queries, passages).tolist()))"
    )
    found = clean_process(code, str(tmp_path), json.dumps(pairs))
    assert found == pytest.approx(objective.score(pairs).tolist(), rel=1e-4, abs=1e-5)
    assert max(found) - min(found) > 0.1
    # In bfloat16 where the CPU has it.
    assert Reranker(str(tmp_path), "cpu").score(pairs).tolist() == pytest.approx(found, rel=0.02, abs=0.02)
    # A tuned reranker can be trained further.
    again: Any = trainable.load_objective(settings.using("seed=9"), tmp_path, {})
    assert again.score(pairs).tolist() == pytest.approx(found, rel=1e-4, abs=1e-5)


def test_a_classifier_of_several_labels_is_no_reranker(encoder_directory: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(encoder_directory, num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder_directory).save_pretrained(tmp_path)
    with pytest.raises(weights_module.ModelError, match="a cross-encoder with one label"):
        trainable.load_objective(config.Config().using("training.objective=reranker"), tmp_path, {})


def test_a_model_without_new_weights_is_written_unchanged(generator_directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainable.save_model(config.Config(), generator_directory, {}, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (generator_directory, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_directory_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(weights_module.ModelError, match=str(tmp_path)):
        trainable.load_objective(config.Config(), tmp_path, {})


def test_a_model_without_an_end_token_is_refused(generator_directory: Path, tmp_path: Path) -> None:
    source = tmp_path / "endless"
    shutil.copytree(generator_directory, source)
    for name, key in (
        ("generation_config.json", "eos_token_id"),
        ("config.json", "eos_token_id"),
        ("tokenizer_config.json", "eos_token"),
    ):
        content = json.loads((source / name).read_text())
        content.pop(key, None)
        (source / name).write_text(json.dumps(content))
    with pytest.raises(weights_module.ModelError, match="eos_token"):
        trainable.load_objective(config.Config(), source, {})
