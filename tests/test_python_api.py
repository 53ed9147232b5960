"""The Python API: what the package exports, and the way from documents to an answer."""

import subprocess
import sys
from pathlib import Path

import pytest

import ragtune_ray as rt
from tests.support.corpora import write_corpus

PACKAGE = Path(rt.__file__).parent


@pytest.fixture
def config(tmp_path: Path, generator_directory: Path) -> rt.Config:
    """A config of 12 documents that runs in seconds."""
    write_corpus(tmp_path / "corpus.jsonl", 12)
    return rt.load_config(
        {
            "workspace": tmp_path / "workspace",
            "corpus.path": tmp_path / "corpus.jsonl",
            "encoder.model": "hashing-64",
            "chunking.size_tokens": 32,
            "chunking.overlap_tokens": 4,
            "generator.model": generator_directory,
            "generator.precision": "float32",
            "generator.max_new_tokens": 4,
            "prompt.max_tokens": 1500,
        }
    )


def test_every_exported_name_can_be_imported_and_is_listed() -> None:
    assert set(rt.__all__) <= set(dir(rt))
    assert all(callable(getattr(rt, name)) for name in rt.__all__)
    assert set(rt._MODULES) == set(rt.__all__) - {"RagtuneError"}
    with pytest.raises(AttributeError, match="no attribute 'build_indexes'"):
        rt.build_indexes  # noqa: B018


def test_no_exported_name_is_the_name_of_a_room() -> None:
    assert set(rt.__all__) & {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} == set()


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'ray', 'pydantic', 'numpy', 'pyarrow', 'yaml'} & set(sys.modules)"
    code = f"import sys; import ragtune_ray; dir(ragtune_ray); print({heavy})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_config_is_loaded_from_a_file_or_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3\nretrieval: {top_k: 7}\n")
    assert rt.load_config(path, {"retrieval.top_k": 9}) == rt.load_config({"seed": 3, "retrieval.top_k": 9})
    assert rt.load_config(str(path)).retrieval.top_k == 7
    with pytest.raises(rt.RagtuneError, match=r"retrieval\.topk"):
        rt.load_config({"retrieval.topk": 9})


def test_documents_are_indexed_searched_changed_and_asked_about(config: rt.Config, tmp_path: Path) -> None:
    built = rt.build_index(config)
    assert built.manifest["num_documents"] == 12
    assert Path(built) == Path(str(built))
    added = tmp_path / "added.md"
    added.write_text("The quokka of Rottnest smiles at visitors.")
    assert rt.upsert_documents(config, str(added)).manifest["num_documents"] == 13
    found = rt.Retriever.open(config).search(["quokka of Rottnest", "visitors"], top_k=2)
    assert [hits[0].passage.document_id for hits in found] == ["added.md", "added.md"]
    assert [hit.rank for hit in found[0]] == [1, 2]
    assert rt.delete_documents(config, ["added.md"]).manifest["num_documents"] == 12
    answer = rt.ask(config, "What is known of document 3?")
    assert isinstance(answer, rt.SourcedAnswer)
    assert answer.answer.status == "ok"
    assert len(answer.passages) == len(answer.answer.passage_ids) > 0
