"""Encoders return the same unit vectors as sentence-transformers, and query encoders match their passage encoder."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.ingest.chunking import word_spans
from ragtune_ray.models import encoder, hardware
from ragtune_ray.models import weights as weights_module
from ragtune_ray.models.encoder import (
    Encoder,
    HashingEncoder,
    load_encoder,
    load_token_counter,
)
from ragtune_ray.storage import artifacts

TEXTS = [
    "the moon orbits the earth",
    "a",
    "mars is the red planet, its two moons are phobos and deimos",
    "",
    "hubble was launched in 1990",
    "x" * 300,
    "月球",
    "the sun is a star",
]


def settings_of(directory: Path, **changes: object) -> config.Encoder:
    return config.Encoder(**({"model": str(directory), "precision": "float32"} | changes))


@pytest.fixture(scope="module")
def tiny(encoder_directory: Path) -> Encoder:
    return load_encoder(settings_of(encoder_directory), "cpu")


def test_vectors_equal_those_of_sentence_transformers(tiny: Encoder, encoder_directory: Path) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(encoder_directory), device="cpu", local_files_only=True)
    expected = reference.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    vectors = tiny.encode_passages(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert vectors.dtype == np.float32
    assert tiny.dimension == expected.shape[1] == 32
    assert np.abs(expected[0] - expected[2]).max() > 0.05, "the model distinguishes texts"


@pytest.mark.parametrize("batch_tokens", [1, 70, 130, 100_000])
def test_batches_and_padding_do_not_change_vectors(tiny: Encoder, encoder_directory: Path, batch_tokens: int) -> None:
    batched = load_encoder(settings_of(encoder_directory, batch_tokens=batch_tokens), "cpu").encode_passages(TEXTS)
    alone = np.concatenate([tiny.encode_passages([text]) for text in TEXTS])
    np.testing.assert_allclose(batched, alone, atol=1e-5)


def test_rows_keep_the_order_of_the_texts(tiny: Encoder) -> None:
    vectors = tiny.encode_passages(TEXTS)
    shuffled = [5, 2, 7, 0, 3, 1, 6, 4]
    np.testing.assert_allclose(tiny.encode_passages([TEXTS[n] for n in shuffled]), vectors[shuffled], atol=1e-5)


def test_vectors_have_length_one_and_no_texts_return_no_rows(tiny: Encoder) -> None:
    np.testing.assert_allclose(np.linalg.norm(tiny.encode_passages(TEXTS), axis=1), 1, atol=1e-5)
    assert tiny.encode_queries([]).shape == (0, 32)
    assert HashingEncoder("hashing-8").encode_queries([]).shape == (0, 8)


def test_texts_beyond_the_model_limit_are_truncated(tiny: Encoder) -> None:
    # 64 tokens with [CLS] and [SEP]: only the first 62 letters count.
    start = "ab" * 31
    np.testing.assert_allclose(tiny.encode_passages([start + "cde"]), tiny.encode_passages([start]), atol=1e-5)
    assert np.abs(tiny.encode_passages([start[:-1] + "z"]) - tiny.encode_passages([start])).max() > 1e-4


def test_prefixes_are_prepended_and_change_the_fingerprint(tiny: Encoder, encoder_directory: Path) -> None:
    prefixed = load_encoder(settings_of(encoder_directory, query_prefix="query: ", passage_prefix="passage: "), "cpu")
    np.testing.assert_allclose(
        prefixed.encode_queries(TEXTS), tiny.encode_passages([f"query: {text}" for text in TEXTS]), atol=1e-5
    )
    np.testing.assert_allclose(
        prefixed.encode_passages(TEXTS), tiny.encode_passages([f"passage: {text}" for text in TEXTS]), atol=1e-5
    )
    assert np.abs(prefixed.encode_queries(TEXTS[:1]) - tiny.encode_queries(TEXTS[:1])).max() > 1e-3
    others = [
        load_encoder(settings_of(encoder_directory, **prefixes), "cpu").fingerprint
        for prefixes in ({"query_prefix": "query: "}, {"passage_prefix": "query: "}, {"passage_prefix": "passage: "})
    ]
    assert len({tiny.fingerprint, prefixed.fingerprint, *others}) == 5


def test_precision_and_batch_size_do_not_change_the_fingerprint(tiny: Encoder, encoder_directory: Path) -> None:
    other = load_encoder(settings_of(encoder_directory, precision="bfloat16", batch_tokens=9), "cpu")
    assert other.fingerprint == tiny.fingerprint


@pytest.mark.skipif(not hardware.supports_bfloat16(), reason="this CPU has no bfloat16 units")
def test_bfloat16_vectors_agree_with_float32_vectors(tiny: Encoder, encoder_directory: Path) -> None:
    half = load_encoder(settings_of(encoder_directory, precision="auto"), "cpu").encode_passages(TEXTS)
    full = tiny.encode_passages(TEXTS)
    assert (half * full).sum(axis=1).min() > 0.999
    assert not np.array_equal(half, full), "auto computes in bfloat16 here"
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-5)


def test_hashing_encoder_is_deterministic_with_unit_vectors() -> None:
    first, second = HashingEncoder("hashing-64"), HashingEncoder("hashing-64")
    vectors = first.encode_passages(TEXTS)
    np.testing.assert_array_equal(vectors, second.encode_queries(TEXTS))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors.dtype == np.float32
    assert (first.dimension, first.fingerprint) == (64, "hashing-64")


def test_hashing_encoder_ignores_case_and_word_order() -> None:
    a, b, c = HashingEncoder("hashing-4096").encode_passages(["Moon moon earth", "EARTH moon, MOON!", "mars"])
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(sorted(np.abs(a[a != 0])), [1 / 5**0.5, 2 / 5**0.5], rtol=1e-6)
    assert float(a @ c) == 0


def test_texts_without_words_are_encoded_as_the_first_axis() -> None:
    vectors = HashingEncoder("hashing-8").encode_passages(["", "?!", " \n"])
    np.testing.assert_array_equal(vectors, np.eye(8, dtype=np.float32)[[0, 0, 0]])


@pytest.mark.parametrize("name", ["hashing-", "hashing-0", "hashing-x", "hashing-100000", "hashing--1", "hashing-64 "])
def test_hashing_encoder_without_a_valid_dimension_is_refused(name: str) -> None:
    with pytest.raises(weights_module.ModelError, match=r"hashing-DIMENSION"):
        load_encoder(config.Encoder(model=name))


def test_token_counter_agrees_with_the_tokenizer(encoder_directory: Path) -> None:
    from transformers import AutoTokenizer

    counter = load_token_counter(settings_of(encoder_directory, passage_prefix="passage: "))
    tokenizer = AutoTokenizer.from_pretrained(encoder_directory)
    ordinary = [text for text in TEXTS if "x" * 65 not in text]  # longer runs count as several tokens
    for text, spans in zip(ordinary, counter.token_spans(ordinary), strict=True):
        assert len(spans) + counter.num_added_tokens == len(tokenizer("passage: " + text)["input_ids"]), text
    assert counter.num_added_tokens == len("passage") + len(":") + len(["[CLS]", "[SEP]"])
    assert counter.max_tokens == 64


def test_tokens_made_without_the_weights_give_the_vectors_of_the_texts(encoder_directory: Path) -> None:
    settings = settings_of(encoder_directory, passage_prefix="passage: ")
    found = load_token_counter(settings).token_ids
    assert found is not None
    loaded = load_encoder(settings, "cpu")
    assert isinstance(loaded, encoder.SentenceEncoder)
    rows = [np.array(row, dtype=np.int32) for row in found(TEXTS)]
    assert np.array_equal(loaded.encode_tokens(rows), loaded.encode_passages(TEXTS))


def test_token_counter_without_a_model_counts_words() -> None:
    counter = load_token_counter(config.Encoder(model="hashing-8"))
    assert (counter.num_added_tokens, counter.max_tokens) == (0, 1_000_000)
    (spans,) = counter.token_spans(["Two words"])
    np.testing.assert_array_equal(spans, word_spans(["Two words"])[0])


# --- Query encoders


def query_model(encoder_directory: Path, url: Path, **facts: Any) -> str:
    """Publish a model with other weights than the encoder's, as training does."""
    from safetensors.torch import load_file, save_file

    staging = artifacts.stage(str(url))
    shutil.copytree(encoder_directory, staging, dirs_exist_ok=True)
    weights = load_file(staging / "model.safetensors")
    save_file({name: tensor.flip(0).contiguous() for name, tensor in weights.items()}, staging / "model.safetensors")
    artifacts.publish(staging, str(url), "model", **facts)
    return str(url)


def test_passages_and_queries_are_encoded_by_their_own_models(
    tiny: Encoder, encoder_directory: Path, tmp_path: Path
) -> None:
    prefixes = {"query_prefix": "query: ", "passage_prefix": "passage: "}
    plain = load_encoder(settings_of(encoder_directory, **prefixes), "cpu")
    tuned = query_model(encoder_directory, tmp_path / "tuned", passage_encoder=plain.fingerprint)
    other = load_encoder(settings_of(Path(tuned), **prefixes), "cpu")
    both = load_encoder(settings_of(encoder_directory, query_model=tuned, **prefixes), "cpu")
    np.testing.assert_array_equal(both.encode_passages(TEXTS), plain.encode_passages(TEXTS))
    np.testing.assert_array_equal(both.encode_queries(TEXTS), other.encode_queries(TEXTS))
    assert np.abs(both.encode_queries(TEXTS) - plain.encode_queries(TEXTS)).max() > 0.05
    assert both.dimension == 32
    assert both.fingerprint == plain.fingerprint, "it can search the index built with the passage model"
    assert other.fingerprint != plain.fingerprint != tiny.fingerprint


def test_each_model_is_loaded_when_first_used(
    encoder_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = query_model(encoder_directory, tmp_path / "tuned")
    loaded: list[str] = []

    class Recorded(encoder.SentenceEncoder):
        def __init__(self, model: weights_module.Model, *rest: Any) -> None:
            loaded.append(model.name)
            super().__init__(model, *rest)

    monkeypatch.setattr(encoder, "SentenceEncoder", Recorded)
    both = load_encoder(settings_of(encoder_directory, query_model=tuned), "cpu")
    assert both.fingerprint
    assert loaded == []
    both.encode_queries(["a"])
    both.encode_queries(["b"])
    assert both.dimension == 32
    assert loaded == [tuned]
    both.encode_passages(["a"])
    both.encode_passages(["b"])
    assert loaded == [tuned, str(encoder_directory)]


def test_query_model_trained_for_another_encoder_is_refused(
    tiny: Encoder, encoder_directory: Path, tmp_path: Path
) -> None:
    tuned = query_model(encoder_directory, tmp_path / "tuned", passage_encoder=tiny.fingerprint)
    assert load_encoder(settings_of(encoder_directory, query_model=tuned), "cpu").fingerprint == tiny.fingerprint
    for settings in (
        settings_of(Path(tuned), query_model=tuned),
        settings_of(encoder_directory, query_model=tuned, passage_prefix="passage: "),
        settings_of(encoder_directory, query_model=tuned, query_prefix="query: "),
    ):
        with pytest.raises(weights_module.ModelError) as error:
            load_encoder(settings, "cpu")
        for part in (f"encoder.query_model {tuned!r}", f"encoder.model {settings.model!r}", f"({tiny.fingerprint})"):
            assert part in str(error.value)


def test_hashing_encoder_with_a_query_model_is_refused(encoder_directory: Path) -> None:
    for model, query in (("hashing-32", str(encoder_directory)), (str(encoder_directory), "hashing-32")):
        with pytest.raises(weights_module.ModelError, match=r"encoder\.query_model .*hashing encoder has no weights"):
            load_encoder(config.Encoder(model=model, query_model=query), "cpu")
