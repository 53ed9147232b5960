"""The `ragtune` command: exit codes, streams, messages."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ragtune_ray as rt
from ragtune_ray import cli, config, schema
from ragtune_ray.models.encoder import HashingEncoder, load_encoder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Restores the loggers that the command configures for its process."""
    root, ours = logging.getLogger(), logging.getLogger("ragtune_ray")
    before = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command, which must end with SystemExit; returns exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            cli.main(arguments)
        captured = capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        assert "Traceback" not in captured.out + captured.err
        return leaving.value.code, captured.out, captured.err

    return call


@pytest.fixture
def workspace(tmp_path: Path, passages: list[schema.Passage], write_index: Callable[..., str]) -> Path:
    write_index(tmp_path / "workspace", passages, HashingEncoder("hashing-64"))
    return tmp_path / "workspace"


@pytest.fixture
def config_path(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(f"workspace: {tmp_path / 'workspace'}\nencoder: {{model: hashing-64}}\n")
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(["frobnicate"], ["frobnicate"], id="unknown verb"),
        pytest.param(["index"], ["CONFIG"], id="no config"),
        pytest.param(["index", "--fast", "x.yaml"], ["--fast"], id="unknown option"),
        pytest.param(["index", "nowhere.yaml"], ["nowhere.yaml", "name a YAML file"], id="missing config"),
        pytest.param(["index", "CONFIG", "index.kind=ivfpq"], ["index.kind", "ivfpq", "'flat'"], id="wrong value"),
        pytest.param(["versions", "CONFIG", "seed"], ["'seed'", "section.field=value"], id="no equals sign"),
        pytest.param(["verify", "CONFIG", "retreival.k=1"], ["retreival", "known here"], id="unknown section"),
        pytest.param(["versions", "CONFIG", "workspace="], ["workspace"], id="no workspace"),
        pytest.param(["versions", "CONFIG", "corpus.path=2024-02-30"], ["2024-02-30", "quote it"], id="no such day"),
        pytest.param(["diff", "CONFIG", "1", "2", "3"], ["3 versions"], id="three versions"),
        pytest.param(["index", "delete", "CONFIG", "seed=1"], ["no document is named"], id="no document"),
        pytest.param(
            ["evaluate", "CONFIG", "--show", "many"], ["--show", "valid integer"], id="option of another type"
        ),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_mistake(
    run: Run, config_path: str, arguments: list[str], named: list[str]
) -> None:
    code, out, err = run(*(config_path if argument == "CONFIG" else argument for argument in arguments))
    assert (code, out) == (2, "")
    for part in named:
        assert part in err


def test_no_arguments_show_the_help_and_exit_with_2(run: Run) -> None:
    code, out, err = run()
    assert code == 2
    assert "Usage: ragtune" in out + err


@pytest.mark.parametrize("arguments", [["versions"], ["verify"], ["ask", "-q"]])
def test_a_missing_index_exits_with_1_and_names_the_command(run: Run, config_path: str, arguments: list[str]) -> None:
    verb, *question = arguments
    code, out, err = run(verb, config_path, *("Why?" for _ in question))
    assert (code, out) == (1, "")
    (error,) = [line for line in err.splitlines() if not line.startswith(("ask: reading", "note: "))]
    assert error.startswith("error: ")
    assert "run: ragtune index CONFIG" in error


@pytest.mark.parametrize("arguments", [["diff", "1"], ["index", "delete", "a.md"]])
def test_settings_after_document_names_are_overrides(
    run: Run, config_path: str, arguments: list[str], tmp_path: Path
) -> None:
    place = arguments.index("delete") + 1 if "delete" in arguments else 1
    arguments.insert(place, config_path)
    code, _, err = run(*arguments, f"workspace={tmp_path / 'another'}")
    assert code == 1
    assert f"{tmp_path / 'another'}: has no index" in err


def test_a_document_id_may_contain_an_equals_sign(run: Run, config_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ragtune_ray.cluster.indexing import update

    asked: list[list[str]] = []
    monkeypatch.setattr(update, "document_ids", lambda _, given: asked.append(given) or given)
    run("index", "delete", config_path, "x=1.md", "seed=3")
    assert asked == [["x=1.md"]]


def test_the_json_of_a_change_is_about_this_command(run: Run, config_path: str, tmp_path: Path) -> None:
    """The second deletion publishes nothing; the manifest of the current version tells of the first one."""
    documents = tmp_path / "d.jsonl"
    documents.write_text('{"id": "a", "text": "The moon."}\n{"id": "b", "text": ""}\n{"id": "c", "text": "The sun."}\n')
    settings = (f"workspace={tmp_path / 'w'}", "encoder.model=hashing-32")
    added = json.loads(run("index", "upsert", config_path, str(documents), *settings, "--json")[1])
    assert (added["added"], added["rejected"]) == (2, [{"place": f"{documents}:2", "reason": "empty document"}])
    assert json.loads(run("index", "delete", config_path, "a", *settings, "--json")[1])["deleted"] == 1
    code, out, _ = run("index", "delete", config_path, "a", *settings, "--json")
    facts = json.loads(out)
    assert (code, facts["deleted"], facts["missing"], facts["version"]) == (0, 0, ["a"], "000002")
    assert not {"change", "num_rejects"} & facts.keys()


def test_json_option_may_precede_the_config_of_index(run: Run, config_path: str) -> None:
    code, out, err = run("index", "--json", config_path)
    assert (code, out) == (2, "")
    assert "corpus.path" in err


@pytest.mark.parametrize("error", [KeyError("x"), type("NoCredentialsError", (Exception,), {})("unable to locate")])
def test_an_unexpected_error_is_one_line_without_a_traceback(
    run: Run, config_path: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(config, "load", fail)
    code, out, err = run("versions", config_path)
    assert (code, out) == (1, "")
    assert err == f"error: {type(error).__name__}: {error}; --debug shows where\n"


def test_debug_raises_the_error_with_its_traceback(config_path: str) -> None:
    with pytest.raises(RuntimeError, match="has no index"):
        cli.main(["versions", config_path, "--debug"])


def test_an_interrupted_command_exits_with_130(run: Run, config_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "load", interrupt)
    code, out, err = run("index", config_path)
    assert (code, out) == (130, "")
    assert "run the same command again to continue where it stopped" in err


def test_versions_go_to_stderr_and_the_current_path_to_stdout(run: Run, config_path: str, workspace: Path) -> None:
    code, out, err = run("versions", config_path)
    assert code == 0
    assert out == f"{workspace}/index/versions/000001\n"
    assert "* 000001" in err
    code, out, _ = run("versions", config_path, "--json")
    facts = json.loads(out)
    assert (code, facts["path"]) == (0, f"{workspace}/index/versions/000001")
    assert (facts["num_passages"], facts["encoder"]["model"]) == (8, "hashing-64")
    assert not {"files", "config", "manifest_sha256"} & set(facts)


def test_verify_names_damaged_files_and_exits_with_1(run: Run, config_path: str, workspace: Path) -> None:
    code, out, err = run("verify", config_path)
    assert (code, out.splitlines()[-1]) == (0, config_path)
    assert "3 artifacts checked, 0 problems" in err
    (workspace / "index" / "versions" / "000001" / "rejects.jsonl").write_text("{}")
    code, out, err = run("verify", config_path)
    assert (code, out.splitlines()[-1]) == (1, config_path)
    assert "error: " in err
    assert "rejects.jsonl" in err
    code, out, _ = run("verify", config_path, "--json")
    facts = json.loads(out)
    assert (code, facts["checked"], len(facts["problems"])) == (1, 3, 1)
    code, out, _ = run("verify", str(workspace / "index" / "versions" / "000001"))
    assert code == 1, "one artifact by its directory"


def test_ask_streams_the_answer_and_shows_its_sources(
    run: Run,
    tmp_path: Path,
    encoder_directory: Path,
    generator_directory: Path,
    passages: list[schema.Passage],
    write_index: Callable[..., str],
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"workspace: {tmp_path / 'workspace'}\n"
        f"encoder: {{model: {encoder_directory}, precision: float32}}\n"
        f"generator: {{model: {generator_directory}, precision: float32, max_new_tokens: 8}}\n"
        "retrieval: {top_k: 2}\n"
    )
    write_index(tmp_path / "workspace", passages, load_encoder(config.load(path).encoder, "cpu"))
    code, out, _ = run("ask", str(path), "Phobos and Deimos?", "--json")
    facts = json.loads(out)
    assert (code, facts["query"], facts["status"]) == (0, "Phobos and Deimos?", "ok")
    assert len(facts["sources"]) == 2
    code, out, _ = run("ask", str(path), "Phobos and Deimos?")
    assert code == 0
    assert facts["answer"] in out
    shown = [line for line in out.splitlines() if line.startswith("[")]
    assert [line.partition(" (")[0] for line in shown] == [
        f"[{number}] {source['title']}" for number, source in enumerate(facts["sources"], start=1)
    ]
    code, out, err = run("ask", str(path), " ")
    assert (code, out) == (1, "")
    assert "the question is empty" in err


def test_models_prints_path_and_fingerprint_of_each_model(
    run: Run, tmp_path: Path, encoder_directory: Path, generator_directory: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"encoder: {{model: {encoder_directory}}}\ngenerator: {{model: {generator_directory}}}\n")
    code, out, err = run("models", str(path))
    assert code == 0
    assert out.splitlines() == [str(encoder_directory), str(generator_directory)]
    facts = json.loads(run("models", str(path), "--json")[1])
    assert [model["path"] for model in facts["models"]] == [str(encoder_directory), str(generator_directory)]
    assert [model["fingerprint"] for model in facts["models"]] == [line.split()[-1] for line in err.splitlines()]
    code, out, err = run("models", str(path), "generator.model=./nowhere")
    assert (code, out) == (1, "")
    assert "'./nowhere': no such directory" in err


def test_settings_lists_every_field_with_its_default_and_meaning(run: Run) -> None:
    code, out, _ = run("settings")
    assert code == 0
    lines = out.splitlines()
    expected = list(config.describe())
    assert len(expected) > 50
    assert lines == [
        line for name, default, text in expected for line in (f"{name} = {default}", *f"    {text}".split("\n"))
    ]


def test_settings_of_one_section_or_one_setting(run: Run) -> None:
    code, out, _ = run("settings", "retrieval")
    assert code == 0
    shown = [line.partition(" = ")[0] for line in out.splitlines() if " = " in line and line.startswith("retrieval.")]
    assert shown == [f"retrieval.{name}" for name in config.Retrieval.model_fields]
    assert "encoder.model = " not in out
    assert run("settings", "retrieval.top_k")[1].splitlines()[0] == "retrieval.top_k = 5"
    code, out, err = run("settings", "retreival")
    assert (code, out) == (2, "")
    assert "did you mean retrieval? sections: workspace, " in err


def test_the_version_is_shown(run: Run) -> None:
    assert run("--version") == (0, f"ragtune {rt.__version__}\n", "")


def test_the_help_of_index_shows_its_argument(run: Run) -> None:
    code, out, _ = run("index", "--help")
    assert code == 0
    assert out.splitlines()[0] == "Usage: ragtune index CONFIG [SECTION.FIELD=VALUE]..."
    assert "CONFIG is a YAML file" in out


@pytest.mark.parametrize("model", ["", "generator.model=mine"])
def test_a_verb_says_at_once_what_it_reads_and_names_a_demonstration_model(
    run: Run, config_path: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rt, "evaluate", lambda _: sys.exit(7), raising=False)
    code, _, err = run("evaluate", config_path, "queries.path=q.jsonl", *filter(None, [model]))
    assert code == 7
    note = "note: SmolLM2-135M-Instruct is a demonstration model; set generator.model"
    assert err.splitlines() == ["evaluate: reading q.jsonl", *([] if model else [note])]


def test_help_names_every_verb_and_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from ragtune_ray.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as leaving:\n"
        "    assert leaving.code == 0, leaving.code\n"
        "print({'torch', 'ray', 'faiss', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"
    verbs = ["index", "retrieve", "answer", "evaluate", "ask", "verify", "versions", "doctor", "models", "settings"]
    listed = [line.split()[0] for line in result.stdout.partition("Commands:")[2].splitlines() if line.startswith("  ")]
    assert set(verbs) <= set(listed)
