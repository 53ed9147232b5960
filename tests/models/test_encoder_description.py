"""What a sentence-transformers model says of itself: its prompts, similarity and modules."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.models import weights
from ragtune_ray.models.encoder import load_encoder, load_token_counter
from ragtune_ray.models.layout import ModelError
from ragtune_ray.training import trainable
from tests.support.models import change_settings

DESCRIPTION = "config_sentence_transformers.json"
TEXTS = ["the moon", "mars: a planet"]


@pytest.fixture
def encoder(encoder_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder_directory, tmp_path / "encoder"))


def load(directory: Path, **settings: Any) -> Any:
    return load_encoder(config.Encoder(model=str(directory), precision="float32", **settings), "cpu")


@pytest.mark.parametrize(
    ("prompts", "default", "query", "passage"),
    [
        ({"query": "query: ", "passage": "passage: "}, None, "query: ", "passage: "),
        ({"query": "q ", "document": "d ", "corpus": "c "}, None, "q ", "d "),
        ({"query": "q ", "document": "", "passage": ""}, None, "q ", ""),
        ({"query": "q "}, "query", "q ", "q "),
        ({"query": "", "document": "", "other": "o "}, "other", "", ""),
        ({"query": None, "other": "o "}, "other", "o ", "o "),
        ({}, None, "", ""),
    ],
)
def test_the_prompts_that_a_model_brings_are_used_unless_the_config_names_others(
    encoder: Path, prompts: dict[str, Any], default: str | None, query: str, passage: str
) -> None:
    plain = load(encoder)
    change_settings(encoder / DESCRIPTION, prompts=prompts, default_prompt_name=default)
    load_token_counter.cache_clear()
    brought, fingerprint = load(encoder), weights.resolve(str(encoder))
    for text, found, prefix in (
        ("queries", brought.encode_queries(TEXTS), query),
        ("passages", brought.encode_passages(TEXTS), passage),
    ):
        expected = plain.encode_passages([prefix + one for one in TEXTS])
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=text)
    named = load(encoder, query_prefix=query, passage_prefix=passage)
    assert brought.fingerprint == named.fingerprint, "it does not matter where the prefixes are from"
    unprefixed = load(encoder, query_prefix="", passage_prefix="")
    np.testing.assert_allclose(unprefixed.encode_queries(TEXTS), plain.encode_queries(TEXTS), atol=1e-6)
    assert (unprefixed.fingerprint == brought.fingerprint) == (not query and not passage)
    settings = config.Encoder(model=str(encoder))
    assert weights.encoder_fingerprint(fingerprint, settings) == brought.fingerprint
    counted = (
        load_token_counter(settings).num_added_tokens
        - load_token_counter(config.Encoder(model=str(encoder), passage_prefix="")).num_added_tokens
    )
    assert counted == len(passage.replace(" ", "")), "each letter and colon of this tokenizer is a token"


def test_prompts_are_those_of_sentence_transformers(encoder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    change_settings(encoder / DESCRIPTION, prompts={"query": "query: ", "document": "passage: "})
    brought, reference = load(encoder), SentenceTransformer(str(encoder), device="cpu", local_files_only=True)
    np.testing.assert_allclose(brought.encode_queries(TEXTS), reference.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(brought.encode_passages(TEXTS), reference.encode_document(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    ("given", "expected"), [({}, ("q ", "p ")), ({"query_prefix": "", "passage_prefix": "x "}, ("", "x "))]
)
def test_training_uses_the_same_prefixes_and_the_trained_model_brings_them(
    encoder: Path, tmp_path: Path, given: dict[str, str], expected: tuple[str, str]
) -> None:
    change_settings(encoder / DESCRIPTION, prompts={"query": "q ", "passage": "p ", "other": "o "})
    settings = config.Config(encoder={"model": str(encoder), **given}, training={"objective": "contrastive"})
    objective: Any = trainable.load_objective(settings, encoder, {})
    assert (objective._query_prefix, objective._passage_prefix) == expected
    trainable.save_model(settings, encoder, {}, tmp_path / "trained")
    tuned = config.Encoder(model=str(tmp_path / "trained"))
    found = weights.with_prompts(tuned, tmp_path / "trained")
    assert (found.query_prefix, found.passage_prefix) == expected
    assert json.loads((tmp_path / "trained" / DESCRIPTION).read_text())["prompts"]["other"] == "o "


def test_a_prompt_that_is_not_pooled_is_refused(encoder: Path) -> None:
    change_settings(encoder / "1_Pooling" / "config.json", include_prompt=False)
    assert load(encoder)
    with pytest.raises(ModelError, match="include_prompt"):
        load(encoder, query_prefix="q ")
    change_settings(encoder / DESCRIPTION, prompts={"query": "q "})
    with pytest.raises(ModelError, match=f"model {encoder}: leaves its prompt out of the pooling"):
        load(encoder)


@pytest.mark.parametrize(
    ("described", "normalizes", "reason"),
    [
        ({"similarity_fn_name": "cosine"}, False, ""),
        ({"similarity_fn_name": None}, False, ""),
        ({"similarity_fn_name": "dot"}, True, ""),
        ({"similarity_fn_name": "euclidean"}, True, ""),
        ({"similarity_fn_name": "dot"}, False, "was trained for dot of vectors of any length"),
        ({"similarity_fn_name": "euclidean"}, False, "was trained for euclidean"),
        ({"similarity_fn_name": "manhattan"}, True, "was trained for manhattan"),
        ({"truncate_dim": 8}, True, "sets truncate_dim"),
    ],
)
def test_similarities_that_unit_vectors_do_not_have_are_refused(
    encoder: Path, described: dict[str, Any], normalizes: bool, reason: str
) -> None:
    change_settings(encoder / DESCRIPTION, **described)
    if not normalizes:
        modules = json.loads((encoder / "modules.json").read_text())
        (encoder / "modules.json").write_text(json.dumps(modules[:2]))
    if not reason:
        assert load(encoder)
        return
    with pytest.raises(ModelError) as error:
        load(encoder)
    assert f"model {encoder}: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("place", "kind", "reason"),
    [
        (
            0,
            "StaticEmbedding",
            "begins with a module StaticEmbedding, such as static embeddings, which is not supported",
        ),
        (0, "Router", "one model for queries and another for passages"),
        (0, "Asym", "one model for queries and another for passages"),
        (1, "LSTM", "has the modules LSTM, which are not supported"),
    ],
)
def test_modules_that_cannot_be_run_are_refused(encoder: Path, place: int, kind: str, reason: str) -> None:
    modules = json.loads((encoder / "modules.json").read_text())
    modules[place]["type"] = f"sentence_transformers.models.{kind}"
    (encoder / "modules.json").write_text(json.dumps(modules))
    for objective in ("contrastive", "query_side"):
        with pytest.raises(ModelError, match=reason):
            trainable.load_objective(config.Config().using(f"training.objective={objective}"), encoder, {})
    with pytest.raises(ModelError, match=reason):
        load(encoder)
