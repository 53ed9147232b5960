"""`ragtune init` finds out what a folder holds, and writes a config that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ragtune_ray import cli, config
from ragtune_ray.config.extras import install_command
from ragtune_ray.index.plan import plan_index, read_plan
from ragtune_ray.ingest import parsers, survey
from ragtune_ray.ingest.init import init
from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.ingest.inputs import InputError
from ragtune_ray.ingest.queries import read_queries
from tests.support.corpora import beir, doc, squad, write

LATIN = "The rover landed on Mars and drove to the crater. " * 5
CHINESE = "嫦娥四号在月球背面着陆，玉兔二号开始巡视。" * 5


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a folder `docs` to fill."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    return tmp_path


def mixed(folder: Path, text: str = LATIN) -> None:
    write(folder / "a.md", f"# A\n\n{text}")
    write(folder / "deep" / "b.txt", text)
    write(folder / "c.jsonl", doc(1, text), doc(2, text))


def ask(*rows: dict[str, Any], path: str = "questions.jsonl") -> str:
    return str(
        write(Path(path), *({"query_id": str(n), "text": "Where did it land?"} | row for n, row in enumerate(rows)))
    )


def values(path: str = "ragtune.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("text", [LATIN, CHINESE])
@pytest.mark.parametrize("with_questions", [True, False])
def test_the_written_config_loads_and_plans_an_index(text: str, with_questions: bool) -> None:
    mixed(Path("docs"), text)
    if with_questions:
        ask({"text": text[:9], "answers": [text[:4]], "document_ids": ["a.md"]})
    result = init("docs")
    settings = config.load(result.path, ["encoder.model=hashing-32"])
    assert settings.corpus.path == "docs"
    assert settings.queries.path == ("questions.jsonl" if with_questions else "")
    assert settings.evaluate.language == ("zh" if text == CHINESE and with_questions else settings.evaluate.language)
    assert read_plan(plan_index(settings))["passages"]["value"] >= 4
    assert result.commands[0] == "ragtune index ragtune.yaml"
    assert result.commands[-1] == (
        "ragtune compare ragtune.yaml" if with_questions else 'ragtune ask ragtune.yaml "YOUR QUESTION"'
    )


def test_kinds_bytes_and_scripts_of_the_corpus_are_counted() -> None:
    mixed(Path("docs"))
    write(Path("docs", "zh.txt"), CHINESE)
    write(Path("docs", "ru.txt"), "Луна")
    corpus = init("docs").corpus
    assert corpus.kinds == {".txt": 3, ".md": 1, ".jsonl": 1}
    assert corpus.num_bytes == sum(path.stat().st_size for path in Path("docs").rglob("*") if path.is_file())
    assert list(corpus.scripts) == ["Latin", "CJK", "other"]
    assert sum(corpus.scripts.values()) == pytest.approx(1)


def test_english_and_chinese_corpora_get_settings_of_their_scripts() -> None:
    mixed(Path("docs"), CHINESE)
    init("docs")
    small = {"retrieval": {"top_k": 2}, "generator": {"stop": ["\n"]}}
    assert values() == {
        "workspace": "workspace",
        "corpus": {"path": "docs"},
        "evaluate": {"language": "zh"},
        **small,
    }
    mixed(Path("docs"), LATIN)
    init("docs", force=True)
    assert values() == {"workspace": "workspace", "corpus": {"path": "docs"}, **small}
    mixed(Path("docs"), "Луна вращается вокруг Земли. ")
    init("docs", force=True)
    assert values()["index"] == {"language": "none"}


def test_files_that_cannot_be_read_are_named_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsers, "missing_extra", lambda suffix: "docx" if suffix == ".docx" else None)
    mixed(Path("docs"))
    for name in ("a.png", "b.png", "c.docx"):
        write(Path("docs", name), "x")
    Path("docs", "empty.txt").touch()
    Path("docs", "bytes.md").write_bytes(b"\xfa caf\xe9 \x81")
    result = init("docs")
    found = {(item.suffix, item.num_files, item.extra) for item in result.corpus.unread}
    assert found == {(".png", 2, ""), (".docx", 1, "docx"), (".txt", 1, ""), (".md", 1, "")}
    assert result.commands[0] == install_command("docx")
    lines = "\n".join(result.lines())
    assert "not read: 2 .png (files of type '.png' cannot be read" in lines
    assert install_command("docx") in lines


def test_bad_rows_are_reported_once_per_file() -> None:
    write(Path("docs", "a.jsonl"), doc(1, LATIN), "{", {"text": "no id"}, doc(2, LATIN))
    (unread,) = init("docs").corpus.unread
    assert (unread.suffix, unread.num_files) == (".jsonl", 1)
    assert unread.reason.startswith(f"2 of 4 sampled rows; the first, {Path('docs', 'a.jsonl').absolute()}:2: not JSON")


def test_an_empty_or_missing_folder_is_refused() -> None:
    with pytest.raises(InputError, match=r"docs: nothing readable .it is empty.; accepted: a folder of"):
        init("docs")
    write(Path("docs", "a.png"), "x")
    with pytest.raises(InputError, match=r"nothing readable .1 \.png: files of type"):
        init("docs")
    with pytest.raises(InputError, match="no such file or folder"):
        init("nowhere")
    assert not Path("ragtune.yaml").exists()


def test_short_answers_keep_the_default_length_and_prompt_and_suit_the_demonstration_model() -> None:
    mixed(Path("docs"))
    ask({"answers": ["on Mars"]}, {"answers": []}, {"answers": ["the crater"], "document_ids": ["a.md"]}, {})
    questions = init("docs").questions
    assert questions is not None
    assert (questions.num_questions, questions.num_answered, questions.num_unanswerable) == (4, 2, 1)
    assert (questions.num_judged, questions.splits, questions.median_words) == (1, {}, 2)
    assert not questions.has_long_answers
    assert values()["queries"] == {
        "path": "questions.jsonl",
        "split_by": "document",
        "split_record": "workspace/splits.json",
    }
    assert "prompt" not in values()
    settings = config.load("ragtune.yaml")
    assert settings.generator.model_copy(update={"stop": ()}) == config.Generator()
    assert (settings.generator.stop, settings.retrieval.top_k) == (("\n",), 2)
    lines = list(init("docs", force=True).lines())
    assert "note: SmolLM2-135M-Instruct is a demonstration model; set generator.model in ragtune.yaml" in lines


def test_long_answers_raise_the_limit_and_change_the_prompt() -> None:
    mixed(Path("docs"))
    ask({"answers": [LATIN]}, {"answers": [LATIN]})
    questions = init("docs").questions
    assert questions is not None
    assert questions.has_long_answers
    settings = config.load("ragtune.yaml")
    assert settings.generator.max_new_tokens >= 1.5 * questions.long_words
    assert settings.generator.stop == (), "an answer may have several lines"
    assert "short" not in settings.prompt.system
    assert "I don't know" in settings.prompt.system


def test_questions_in_squads_format_are_scored_as_its_script_does() -> None:
    write(Path("train.json"), squad({"id": "1", "question": "Who?", "answers": [{"text": "Ada"}]}))
    init("train.json", "train.json")
    assert config.load("ragtune.yaml").evaluate.normalization == "squad"


def test_given_splits_are_kept() -> None:
    mixed(Path("docs"))
    ask({"split": "train", "answers": ["x"]}, {"split": "dev", "answers": ["y"]})
    questions = init("docs").questions
    assert questions is not None
    assert questions.splits == {"train": 1, "validation": 1}
    assert values()["queries"] == {"path": "questions.jsonl"}


def test_questions_without_answers_are_to_be_answered_not_scored() -> None:
    mixed(Path("docs"))
    ask({}, {})
    assert init("docs").commands == ("ragtune index ragtune.yaml", "ragtune answer ragtune.yaml")
    ask({"document_ids": ["a.md"]})
    assert "ragtune retrieve ragtune.yaml" in init("docs", force=True).commands


def test_questions_are_found_in_beir_squad_and_next_to_the_folder() -> None:
    beir(Path("docs"))
    assert survey.find_questions("docs") == "docs"
    write(Path("squad", "train.json"), squad({"id": "1", "question": "?", "answers": [{"text": "Moon"}]}))
    assert survey.find_questions("squad") == "squad/train.json"
    assert survey.find_questions("squad/train.json") == "squad/train.json"
    mixed(Path("own"))
    assert survey.find_questions("own") is None
    ask({}, path="my_questions.jsonl")
    assert survey.find_questions("own") == "my_questions.jsonl"
    assert init("own", questions=ask({"text": "?"}, path="given.jsonl")).questions is not None
    assert [query.text for query in read_queries(values()["queries"]["path"])] == ["?"]  # type: ignore[union-attr]


def test_questions_in_the_corpus_folder_are_warned_about() -> None:
    mixed(Path("docs"))
    ask({"answers": ["x"]}, {"text": ""}, path="docs/questions.jsonl")
    result = init("docs")
    unusable, inside = result.warnings
    assert "1 row not usable, the first: " in unusable
    assert "move it out of docs" in inside


def test_a_workspace_inside_the_corpus_is_hidden_from_indexing() -> None:
    mixed(Path())
    init(".")
    assert values()["workspace"] == ".ragtune"
    before = {file.path for file in plan_units(".", 10**6).files}
    write(Path(".ragtune", "index", "a.jsonl"), doc(1))
    assert {file.path for file in plan_units(".", 10**6).files} == before


def test_odd_names_are_quoted() -> None:
    name = "a: {b} #1 'c' \"d\" 🚀"
    mixed(Path(name))
    init(name)
    assert config.load("ragtune.yaml").corpus.path == name


def test_an_existing_file_is_overwritten_only_when_forced() -> None:
    mixed(Path("docs"))
    write(Path("mine.yaml"), "seed: 7")
    with pytest.raises(config.ConfigError, match=r"mine\.yaml exists; add --force"):
        init("docs", output="mine.yaml")
    assert values("mine.yaml") == {"seed": 7}
    init("docs", output="mine.yaml", force=True)
    assert values("mine.yaml")["corpus"] == {"path": "docs"}


def test_the_command_prints_its_findings_and_the_path_last(capsys: pytest.CaptureFixture[str]) -> None:
    mixed(Path("docs"))
    with pytest.raises(SystemExit, match="0"):
        cli.main(["init", "docs"])
    out, err = capsys.readouterr()
    assert out == "ragtune.yaml\n"
    assert err.startswith("docs: 3 files, ")
    assert "ragtune index ragtune.yaml" in err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["init", "docs"])
    assert "add --force" in capsys.readouterr().err
    ask({"answers": ["x"]}, path="given.jsonl")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["init", "docs", "--questions", "given.jsonl", "--output", "b.yaml", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["path"], facts["num_files"], facts["questions"]["num_answered"]) == ("b.yaml", 3, 1)
