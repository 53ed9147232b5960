"""What several test files share: tiny models with seeded weights, a few passages, and an index of them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pytest

from ragtune_ray import schema
from ragtune_ray.index import faiss_index, segments, versions
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.storage import artifacts, checksums

# A busy machine is no failure, and a failure must come again.
hypothesis.settings.register_profile("ragtune", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ragtune")

DOCUMENTS = {
    "moon": ("The Moon", "The Moon orbits the Earth. Apollo 11 landed on the Moon in 1969."),
    "mars": ("Mars", "Mars is the red planet. Its two moons are Phobos and Deimos."),
    "hubble": ("Hubble", "The Hubble Space Telescope was launched in 1990 and takes sharp pictures of galaxies."),
    "sun": ("The Sun", "The Sun is a star. It fuses hydrogen into helium."),
    "china": ("嫦娥四号", "嫦娥四号在月球背面着陆。"),
}


def _passage(document_id: str, number: int, text: str, start: int) -> schema.Passage:
    title = DOCUMENTS[document_id][0]
    return schema.Passage(f"{document_id}#{number}", document_id, text, title, "{}", start, start + len(text))


@pytest.fixture(scope="session")
def passages() -> list[schema.Passage]:
    """One passage per sentence, their offsets true."""
    found = []
    for document_id, (_, text) in DOCUMENTS.items():
        start = 0
        for number, sentence in enumerate(text.replace(". ", ".\0").split("\0")):
            found.append(_passage(document_id, number, sentence, start))
            start += len(sentence) + 1
    return found


@pytest.fixture(scope="session")
def encoder_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers directory as published ones are laid out: a BERT of 2 layers, mean pooling, length 1."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    directory = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *".,:?'"]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(directory)
    torch.set_num_threads(1)  # tiny models gain nothing from a second thread
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    settings = BertConfig(vocab_size=len(words), max_position_embeddings=128, initializer_range=0.2, **shape)
    BertModel(settings).save_pretrained(directory)
    kinds = ["Transformer", "Pooling", "Normalize"]
    files = {
        "modules.json": [
            {
                "idx": number,
                "name": str(number),
                "path": f"{number}_{kind}" if number else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for number, kind in enumerate(kinds)
        ],
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
    }
    for kind in kinds[1:]:
        (directory / f"{kinds.index(kind)}_{kind}").mkdir()
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="session")
def generator_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama of 2 layers that the tests of the generator use, with a longer context."""
    import torch

    from tests.support.models import save_model, save_tokenizer

    directory = tmp_path_factory.mktemp("generator")
    torch.set_num_threads(1)
    save_tokenizer(directory)
    save_model(directory, max_position_embeddings=2048)
    return directory


@pytest.fixture(scope="session")
def write_index() -> Callable[..., str]:
    """A function that encodes passages, publishes them as segments and a version, and returns the version's name."""

    def write(
        workspace: Path | str,
        passages: Sequence[schema.Passage],
        encoder: Any,
        *,
        model: str = "hashing-64",
        num_segments: int = 2,
        kind: faiss_index.ConcreteKind = "flat",
    ) -> str:
        workspace = str(workspace)
        vectors = encoder.encode_passages([passage.text for passage in passages])
        trained = faiss_index.train(kind, encoder.dimension, len(passages), vectors, seed=0)
        fingerprints = _fingerprints(passages)
        entries = []
        for rows in np.array_split(np.arange(len(passages)), num_segments):
            part = [passages[row] for row in rows]
            marks = [fingerprints[passage.document_id] for passage in part]
            identity = [[passage.passage_id, mark.hex()] for passage, mark in zip(part, marks, strict=True)]
            name = checksums.digest([identity, encoder.fingerprint, kind])
            url = segments.segment_url(workspace, name)
            if not artifacts.is_finished(url):
                staging = artifacts.stage(url)
                table = schema.to_table(part, schema.Passage)
                marked = pa.array(marks, pa.binary(segments.FINGERPRINT_BYTES))
                segments.write_segment(staging, table, marked, vectors[rows], trained, "en")
                segments.publish_segment(staging, url, len(rows), trained_id="")
            entries.append(versions.entry_of(workspace, name))
        facts = {
            "encoder": {"model": model, "fingerprint": encoder.fingerprint, "dimension": encoder.dimension},
            "index_kind": kind,
            "language": "en",
            "num_documents": len(fingerprints),
            # So much that the approximate kinds find everything.
            "search": {"lists": 1000, "graph": 1000, "rescored": 100},
        }
        files = {"rejects.jsonl": '{"place": "x", "reason": "y", "kind": "file"}\n'}
        draft = versions.Draft(tuple(entries), facts, files)
        return versions.publish_version(workspace, versions.latest_version(workspace), draft).name

    return write


@pytest.fixture
def workspace(tmp_path: Path, passages: list[schema.Passage], write_index: Callable[..., str]) -> str:
    """A workspace whose index holds the passages, hashed."""
    write_index(tmp_path, passages, HashingEncoder("hashing-64"))
    return str(tmp_path)


def _fingerprints(passages: Sequence[schema.Passage]) -> dict[str, bytes]:
    """Of each passage's document, as far as the passages tell of it."""
    texts: dict[str, list[schema.Passage]] = {}
    for passage in passages:
        texts.setdefault(passage.document_id, []).append(passage)
    return {
        name: segments.document_fingerprint(
            schema.Document(name, " ".join(row.text for row in rows), rows[0].title, rows[0].metadata, "")
        )
        for name, rows in texts.items()
    }
