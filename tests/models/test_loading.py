"""Models that lack tensors or are damaged are refused by name; good ones of every kind load."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ragtune_ray import config
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.models import layout, loading, weights
from ragtune_ray.models.encoder import load_encoder, load_token_counter
from ragtune_ray.models.layout import ModelError
from ragtune_ray.models.reranker import Reranker
from ragtune_ray.training import trainable
from tests.support.models import (
    Touching,
    change_settings,
    change_tensors,
    save_cross_encoder,
    save_model,
    save_tokenizer,
)

ENCODER_LAYER = "encoder.layer.1.attention.self.query.weight"


def load_embeddings(directory: Path) -> Any:
    return load_encoder(config.Encoder(model=str(directory), precision="float32"), "cpu")


def load_answers(directory: Path) -> Any:
    return TransformersGenerator(directory, precision="float32", batch_tokens=500)


def load_for_training(objective: str) -> Callable[[Path], Any]:
    settings = config.Config().using(f"training.objective={objective}")
    return lambda directory: trainable.load_objective(settings, directory, {})


ENCODERS = [load_embeddings, load_for_training("contrastive"), load_for_training("reranker")]
GENERATORS = [load_answers, load_for_training("sft")]


@pytest.fixture
def encoder(encoder_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder_directory, tmp_path / "encoder"))


@pytest.fixture
def generator(generator_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(generator_directory, tmp_path / "generator"))


@pytest.fixture
def cross_encoder(encoder_directory: Path, tmp_path: Path) -> Path:
    return save_cross_encoder(encoder_directory, tmp_path / "cross-encoder")


def without(*parts: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return remove


def refused(load: Callable[[Path], Any], directory: Path, *parts: str) -> str:
    """The message of the error, which names the directory and the parts in one line."""
    with pytest.raises(ModelError) as error:
        load(directory)
    message = str(error.value)
    assert "\n" not in message
    assert "weights_only" not in message
    for part in (f"model {directory}: ", *parts):
        assert part in message, message
    return message


# --- Tensors


@pytest.mark.parametrize("load", ENCODERS)
def test_an_encoder_without_a_layer_is_refused(encoder: Path, load: Callable[[Path], Any]) -> None:
    change_tensors(encoder, without("encoder.layer.1."))
    message = refused(load, encoder, "missing tensors", "encoder.layer.1.attention.output.LayerNorm.bias")
    assert "and 13 more" in message, "a layer of BERT has 16 tensors"


@pytest.mark.parametrize("load", GENERATORS)
def test_a_generator_without_its_embeddings_is_refused(generator: Path, load: Callable[[Path], Any]) -> None:
    change_tensors(generator, without("embed_tokens"))
    refused(load, generator, "missing tensors: model.embed_tokens.weight.", "copy or download")


def test_a_cross_encoder_without_its_head_is_refused(cross_encoder: Path, encoder: Path) -> None:
    def load(directory: Path) -> Reranker:
        return Reranker(str(directory), "cpu")

    assert load(cross_encoder)
    change_tensors(cross_encoder, without("classifier."))
    refused(load, cross_encoder, "missing tensors: classifier.bias, classifier.weight.")
    refused(load_for_training("reranker"), cross_encoder, "missing tensors: classifier.bias, classifier.weight.")


def test_a_late_interaction_model_is_refused_like_an_encoder(encoder: Path, tmp_path: Path) -> None:
    settings = config.Config().using("training.objective=reranker")
    trainable.save_model(settings, encoder, {}, tmp_path / "late")
    assert Reranker(str(tmp_path / "late"), "cpu")
    change_tensors(tmp_path / "late", without("layer.1."))
    refused(lambda directory: Reranker(str(directory), "cpu"), tmp_path / "late", "missing tensors: encoder.layer.1.")


@pytest.mark.parametrize("load", ENCODERS)
@pytest.mark.parametrize("layers", [1, 0, -1])
def test_an_encoder_with_more_layers_than_its_config_is_refused(
    encoder: Path, load: Callable[[Path], Any], layers: int
) -> None:
    change_settings(encoder / "config.json", num_hidden_layers=layers)
    refused(load, encoder, "config.json has no place for: ", f"encoder.layer.{max(layers, 0)}.")


@pytest.mark.parametrize("layers", [1, -1])
def test_a_generator_with_more_layers_than_its_config_is_refused(generator: Path, layers: int) -> None:
    change_settings(generator / "config.json", num_hidden_layers=layers, layer_types=None)
    refused(load_answers, generator, "model.layers.1." if layers == 1 else "")


@pytest.mark.parametrize("load", ENCODERS)
def test_an_encoder_with_tensors_of_another_shape_is_refused(encoder: Path, load: Callable[[Path], Any]) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[ENCODER_LAYER] = torch.zeros(32, 31)

    change_tensors(encoder, widen)
    refused(load, encoder, "other shapes: ", f"{ENCODER_LAYER} has shape [32, 31] and not [32, 32]")


@pytest.mark.parametrize("load", GENERATORS)
def test_a_generator_with_tensors_of_another_shape_is_refused(generator: Path, load: Callable[[Path], Any]) -> None:
    change_settings(generator / "config.json", intermediate_size=40)
    refused(load, generator, "mlp.down_proj.weight has shape [32, 48] and not [32, 40]")


def test_a_dense_module_without_a_tensor_is_refused(encoder: Path) -> None:
    add_dense(encoder)
    assert load_embeddings(encoder).dimension == 5
    change_tensors(encoder / "2_Dense", without("bias"))
    refused(load_embeddings, encoder, "linear.bias")


def add_dense(encoder: Path) -> None:
    """Insert a linear layer from 32 to 5 components after the pooling, as sentence-transformers does."""
    from safetensors.torch import save_file

    modules = json.loads((encoder / "modules.json").read_text())
    modules[2] = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (encoder / "modules.json").write_text(json.dumps(modules))
    (encoder / "2_Dense").mkdir()
    described = {"in_features": 32, "out_features": 5, "bias": True}
    change_settings(
        encoder / "2_Dense" / "config.json", **described, activation_function="torch.nn.modules.linear.Identity"
    )
    save_file(
        {"linear.weight": torch.ones(5, 32), "linear.bias": torch.ones(5)}, encoder / "2_Dense" / "model.safetensors"
    )


# --- Good models


def test_an_encoder_without_a_pooler_and_with_another_head_is_loaded(encoder: Path) -> None:
    """As encoders are published that were trained to predict masked words."""
    expected = load_embeddings(encoder).encode_passages(["moon"])

    def as_masked_model(tensors: dict[str, torch.Tensor]) -> None:
        without("pooler")(tensors)
        for name in list(tensors):
            tensors[f"bert.{name}"] = tensors.pop(name)
        tensors["cls.predictions.bias"] = torch.zeros(9)
        tensors["bert.embeddings.position_ids"] = torch.arange(128)[None]

    change_tensors(encoder, as_masked_model)
    change_settings(encoder / "config.json", architectures=["BertForMaskedLM"])
    np.testing.assert_array_equal(load_embeddings(encoder).encode_passages(["moon"]), expected)
    for load in ENCODERS[1:]:
        assert load(encoder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_generator_is_loaded_with_and_without_tied_embeddings(tmp_path: Path, tied: bool) -> None:
    save_tokenizer(tmp_path)
    save_model(tmp_path, tie_word_embeddings=tied)
    for load in GENERATORS:
        assert load(tmp_path)
    if not tied:
        change_tensors(tmp_path, without("lm_head"))
        refused(load_answers, tmp_path, "missing tensors: lm_head.weight.")


def test_a_reranker_is_trained_from_encoders_of_other_architectures(encoder: Path, tmp_path: Path) -> None:
    """Roberta's cross-encoder has no pooler, so that the pooler of its encoder has no place."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaModel(RobertaConfig(vocab_size=90, pad_token_id=0, **shape)).save_pretrained(tmp_path)
    assert load_for_training("reranker")(tmp_path)
    assert load_embeddings(tmp_path).dimension == 16, "plain encoders are pooled"


@pytest.mark.parametrize("objective", ["contrastive", "reranker", "sft"])
def test_trained_models_are_loaded(encoder: Path, generator: Path, tmp_path: Path, objective: str) -> None:
    settings = config.Config().using(f"training.objective={objective}")
    trainable.save_model(settings, generator if objective == "sft" else encoder, {}, tmp_path / "out")
    layout.check_directory(tmp_path / "out")
    load = {"contrastive": load_embeddings, "reranker": lambda path: Reranker(str(path), "cpu"), "sft": load_answers}
    assert load[objective](tmp_path / "out")


# --- Damaged files


@pytest.mark.parametrize("load", [*ENCODERS, lambda path: Reranker(str(path), "cpu")])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "modules.json"])
def test_a_damaged_file_of_an_encoder_is_named(encoder: Path, load: Callable[[Path], Any], name: str) -> None:
    content = (encoder / name).read_bytes()
    (encoder / name).write_bytes(content[: len(content) // 2])
    refused(load, encoder, f"{name} is damaged", "copy or download the model again")


@pytest.mark.parametrize("load", GENERATORS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_of_a_generator_is_named(generator: Path, load: Callable[[Path], Any], name: str) -> None:
    content = (generator / name).read_bytes()
    (generator / name).write_bytes(content[: len(content) // 2])
    refused(load, generator, f"{name} is damaged", "copy or download the model again")


def test_the_token_counter_names_a_damaged_tokenizer(encoder: Path) -> None:
    load_token_counter.cache_clear()
    (encoder / "tokenizer.json").write_text("{")
    refused(lambda path: load_token_counter(config.Encoder(model=str(path))), encoder, "tokenizer.json is damaged")


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "wide"), ("model_type", "unheard-of"), ("num_attention_heads", 7)]
)
def test_a_config_that_makes_no_model_is_refused(encoder: Path, generator: Path, key: str, value: Any) -> None:
    for directory, load in ((encoder, load_embeddings), (generator, load_answers)):
        change_settings(directory / "config.json", **{key: value})
        refused(load, directory, "save_pretrained")


# --- Pickles, code and files elsewhere


def pickled(path: Path, canary: Path) -> None:
    """A file of torch that runs code when it is unpickled."""
    path.write_bytes(pickle.dumps(Touching(canary)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pkl"])
def test_pickled_weights_are_never_read(encoder: Path, generator: Path, tmp_path: Path, name: str) -> None:
    for directory, loads in ((encoder, ENCODERS), (generator, GENERATORS)):
        (directory / "model.safetensors").unlink()
        pickled(directory / name, tmp_path / "canary")
        for load in (*loads, lambda path: weights.resolve(str(path))):
            refused(load, directory, f"pickled ({name})", "convert them to safetensors")
    assert not (tmp_path / "canary").exists()


def test_weights_are_read_from_safetensors_alone(
    encoder: Path, cross_encoder: Path, generator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the check of the directory misses pickled weights, which are valid here."""
    monkeypatch.setattr(layout, "check_directory", lambda _: None)
    for directory in (encoder, cross_encoder, generator):
        from safetensors.torch import load_file

        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    for load in (
        lambda: loading.load_sentence_encoder(encoder, "cpu", torch.float32),
        lambda: loading.load_late_interaction(encoder, "cpu", torch.float32),
        lambda: loading.load_cross_encoder(cross_encoder, "cpu", torch.float32),
        lambda: loading.load_causal_model(generator, torch.float32, "sdpa"),
    ):
        with pytest.raises(ModelError, match=r"no file named model\.safetensors"):
            load()


def test_pickled_weights_of_a_module_are_refused(encoder: Path, tmp_path: Path) -> None:
    add_dense(encoder)
    (encoder / "2_Dense" / "model.safetensors").unlink()
    refused(load_embeddings, encoder, "contains no .safetensors weights (2_Dense/model.safetensors)")
    pickled(encoder / "2_Dense" / "pytorch_model.bin", tmp_path / "canary")
    refused(load_embeddings, encoder, "pickled (2_Dense/pytorch_model.bin)")
    assert not (tmp_path / "canary").exists()


def test_pickled_copies_beside_safetensors_are_no_reason_to_refuse(encoder: Path, tmp_path: Path) -> None:
    """Most models of the hub have both."""
    add_dense(encoder)
    expected = weights.resolve(str(encoder)).fingerprint
    for folder in (encoder, encoder / "2_Dense"):
        pickled(folder / "pytorch_model.bin", tmp_path / "canary")
    assert load_embeddings(encoder).dimension == 5
    assert weights.resolve(str(encoder)).fingerprint == expected
    assert not (tmp_path / "canary").exists()


def shard(directory: Path, name: str) -> None:
    """Store the weights in one shard, and name it in the index."""
    from safetensors import safe_open

    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    with safe_open(directory / "model-00001-of-00001.safetensors", framework="pt") as file:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(file.keys(), name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_files_beside_their_index(generator: Path, tmp_path: Path) -> None:
    shard(generator, "model-00001-of-00001.safetensors")
    assert load_answers(generator)
    other = Path(shutil.copytree(generator, tmp_path / "other"))
    (generator / "model.safetensors.index.json").unlink()
    names = {
        "../other/model-00001-of-00001.safetensors": "a shard is a *.safetensors file beside its index",
        str(other / "model-00001-of-00001.safetensors"): "a shard is a *.safetensors file beside its index",
        "model.bin": "pickled (model.bin, named by model.safetensors.index.json)",
        "model-00002-of-00002.safetensors": "is missing; copy or download",
        "model.txt": "a shard is a *.safetensors file beside its index",
    }
    (generator / "model.txt").write_text("")
    for name, reason in names.items():
        (generator / "model-00001-of-00001.safetensors").rename(generator / "model.safetensors")
        shard(generator, name)
        refused(load_answers, generator, repr(name)[1:-1], reason)
        refused(lambda path: weights.resolve(str(path)), generator, reason)


def test_links_out_of_the_directory_are_refused(encoder: Path, tmp_path: Path) -> None:
    (encoder / "model.safetensors").rename(tmp_path / "weights")
    (encoder / "model.safetensors").symlink_to(tmp_path / "weights")
    refused(load_embeddings, encoder, "model.safetensors is a link to", "replace it by a copy")
    (encoder / "model.safetensors").unlink()
    (tmp_path / "weights").rename(encoder / "model.safetensors")
    (encoder / "1_Pooling").rename(tmp_path / "1_Pooling")
    (encoder / "1_Pooling").symlink_to(tmp_path / "1_Pooling")
    refused(load_embeddings, encoder, "1_Pooling is a link to")


def test_a_snapshot_in_the_hubs_cache_is_loaded(encoder: Path, tmp_path: Path) -> None:
    """Its files are links into a folder beside the snapshots."""
    repository = tmp_path / "models--organisation--model"
    snapshot = Path(shutil.copytree(encoder, repository / "snapshots" / "0123abc"))
    (repository / "blobs").mkdir()
    for path in [path for path in snapshot.rglob("*") if path.is_file()]:
        blob = repository / "blobs" / re.sub(r"\W", "-", str(path.relative_to(snapshot)))
        path.rename(blob)
        path.symlink_to(blob)
    assert load_embeddings(snapshot).fingerprint == load_embeddings(encoder).fingerprint


def test_modules_outside_of_the_directory_are_refused(encoder: Path, tmp_path: Path) -> None:
    modules = json.loads((encoder / "modules.json").read_text())
    for path in ("../1_Pooling", str(tmp_path / "1_Pooling")):
        modules[1]["path"] = path
        (encoder / "modules.json").write_text(json.dumps(modules))
        refused(load_embeddings, encoder, repr(path), "outside of the directory")


def test_an_adapter_is_not_a_model(generator: Path, tmp_path: Path) -> None:
    from tests.support.models import save_adapter

    adapter = save_adapter(generator, tmp_path / "adapter", seed=0)
    refused(load_answers, adapter, "is an adapter of", str(generator), "merge")
    pickled(adapter / "adapter_model.bin", tmp_path / "canary")
    (adapter / "adapter_model.safetensors").unlink()
    refused(load_answers, adapter, "is an adapter of")
    assert not (tmp_path / "canary").exists()


def test_code_of_a_model_is_not_run(encoder: Path, generator: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
    for directory, load in ((encoder, load_embeddings), (generator, load_answers)):
        sound = (directory / "config.json").read_text()
        (directory / "evil.py").write_text(code)
        auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
        for changes in (
            {"auto_map": auto, "model_type": "evil"},
            {"auto_map": auto, "model_type": "evil", "trust_remote_code": True},
            {"trust_remote_code": True},
            {"_attn_implementation_internal": "organisation/kernel"},
            {"attn_implementation": "organisation/kernel"},
            {"text_config": {"_attn_implementation": "organisation/kernel"}},
        ):
            change_settings(directory / "config.json", **changes)
            refused(load, directory)
            (directory / "config.json").write_text(sound)
        change_settings(directory / "config.json", auto_map=auto)
        assert load(directory), "transformers knows the architecture, so that the code is not needed"
    modules = json.loads((encoder / "modules.json").read_text())
    modules[1]["type"] = "evil.Evil"
    (encoder / "modules.json").write_text(json.dumps(modules))
    refused(load_embeddings, encoder, "'evil.Evil'", "is not run")
    assert not canary.exists()


def test_other_files_that_an_encoder_names_are_refused(encoder: Path, tmp_path: Path) -> None:
    change_settings(encoder / "sentence_bert_config.json", tokenizer_name_or_path=str(tmp_path))
    refused(load_embeddings, encoder, "sentence_bert_config.json sets tokenizer_name_or_path")
    change_settings(encoder / "sentence_bert_config.json", tokenizer_name_or_path=None)
    change_settings(encoder / "config.json", transformers_weights="../other.safetensors")
    refused(load_embeddings, encoder, "config.json names the weights '../other.safetensors'")


@pytest.mark.parametrize("name", ["sentence_roberta_config.json", "sentence_xlm-roberta_config.json"])
def test_older_names_of_an_encoders_settings_count(encoder: Path, tmp_path: Path, name: str) -> None:
    (encoder / "sentence_bert_config.json").rename(encoder / name)
    assert load_token_counter(config.Encoder(model=str(encoder))).max_tokens == 64
    change_settings(encoder / name, model_args={"gguf_file": "other.gguf"})
    refused(load_embeddings, encoder, f"{name} sets gguf_file")


@pytest.mark.parametrize("other", [[], [{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}]])
def test_the_root_is_checked_whatever_modules_it_names(
    encoder: Path, generator: Path, tmp_path: Path, other: list[dict[str, str]]
) -> None:
    shutil.copytree(encoder, generator / "0_Transformer")
    modules = [*other, {"type": "sentence_transformers.models.Normalize", "path": "1_Normalize"}]
    (generator / "modules.json").write_text(json.dumps(modules))
    layout.check_directory(generator)
    change_settings(generator / "config.json", _attn_implementation="organisation/kernel")
    refused(load_answers, generator, "config.json sets _attn_implementation")
    change_settings(generator / "config.json", _attn_implementation="sdpa")
    (generator / "model.safetensors").rename(generator / "pytorch_model.bin")
    refused(load_answers, generator, "its weights are pickled (pytorch_model.bin)")
