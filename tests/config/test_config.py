"""Settings: precedence, refusals, documentation."""

from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    assert config.load(path).workspace


def test_arguments_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("retrieval: {top_k: 7, candidates: 20}\nseed: 3\n")
    settings = config.load(path, ["retrieval.top_k=9"])
    assert (settings.retrieval.top_k, settings.retrieval.candidates, settings.seed) == (9, 20, 3)
    assert settings.retrieval.mode == "hybrid"


@pytest.mark.parametrize(
    ("text", "override", "named"),
    [
        pytest.param("retreival: {}", "", ["retreival", "known here"], id="unknown section"),
        pytest.param("retrieval: {topk: 1}", "", ["retrieval.topk", "top_k"], id="unknown field"),
        pytest.param("", "index.kind=ivfpq", ["index.kind", "'flat'", "ivfpq"], id="value outside a choice"),
        pytest.param("", "retrieval.top_k=0", ["retrieval.top_k", "greater than 0"], id="value below its bound"),
        pytest.param("", "retrieval.top_k", ["section.field=value"], id="no equals sign"),
        pytest.param("", "seed.x=1", ["seed"], id="a field is no section"),
        pytest.param("[1]", "", ["mapping"], id="not a mapping"),
        pytest.param("a: [", "", ["is not YAML"], id="not YAML"),
        pytest.param(
            "", "chunking.overlap_tokens=200", ["overlap_tokens (200)", "size_tokens (256)"], id="two fields clash"
        ),
    ],
)
def test_a_wrong_config_is_refused_with_field_value_and_rule(
    tmp_path: Path, text: str, override: str, named: list[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(config.ConfigError) as error:
        config.load(path, [override] if override else [])
    for part in named:
        assert part in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(config.ConfigError, match=r"nowhere\.yaml"):
        config.load("nowhere.yaml")


def test_scientific_notation_is_accepted_as_a_number() -> None:
    assert config.Config().using("retrieval.fusion_constant=6e1").retrieval.fusion_constant == 60


def test_a_config_is_immutable_and_using_returns_a_copy() -> None:
    original = config.Config()
    assert original.using("seed=5").seed == 5
    assert original.seed == 0
    with pytest.raises(ValueError, match="frozen"):
        original.seed = 1


def test_docs_settings_md_is_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == config.settings_page(), "run: ragtune settings --markdown > docs/settings.md"
    assert all(f"| `{name}` |" in page for name, _, _ in config.describe())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        pytest.param("answer.arm", "ft", "ft", id="string"),
        pytest.param("corpus.path", Path("a: b") / "'ü'.jsonl", "a: b/'ü'.jsonl", id="path that is not plain YAML"),
        pytest.param("generator.stop", ["\n"], ("\n",), id="list"),
        pytest.param("retrieval.filter", {"year": {"gte": 2020}}, {"year": {"gte": 2020}}, id="mapping"),
        pytest.param("seed", 7, 7, id="setting without a section"),
    ],
)
def test_with_values_takes_python_values_as_they_are(name: str, value: object, expected: object) -> None:
    settings = config.Config().with_values({name: value})
    section, _, field = name.rpartition(".")
    assert getattr(getattr(settings, section) if section else settings, field) == expected
    assert settings.with_values({}) == settings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"retrieval.topk": 1}, ["retrieval.topk", "top_k"]),
        ({"retrieval.top_k": 0}, ["retrieval.top_k", "greater than 0"]),
        ({"seed.x": 1}, ["seed", "not a section"]),
    ],
)
def test_with_values_refuses_what_load_refuses(values: dict[str, object], named: list[str]) -> None:
    with pytest.raises(config.ConfigError) as error:
        config.Config().with_values(values)
    for part in named:
        assert part in str(error.value)


def test_every_setting_is_documented() -> None:
    undocumented = [name for name, _, meaning in config.describe() if len(meaning) < 10]
    assert undocumented == []


def test_public_setting_names_exist() -> None:
    names = {name for name, _, _ in config.describe()}
    assert names >= {
        "workspace",
        "seed",
        "corpus.path",
        "queries.path",
        "encoder.model",
        "generator.model",
        "generator.engine",
        "index.kind",
        "retrieval.mode",
        "retrieval.top_k",
        "evaluate.arms",
    }


def test_changing_one_deployment_keeps_its_other_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("serve: {retriever: {max_replicas: 3}}\n")
    settings = config.load(path)
    default = config.Config().serve.retriever
    assert settings.serve.retriever == default.model_copy(update={"max_replicas": 3})
    assert settings.serve.retriever.num_cpus != config.Replicas().num_cpus
    assert config.Config().using("serve.generator.min_replicas=0").serve.generator.min_replicas == 0


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("serve.retriever.min_replicas=0", "only the generator"),
        ("serve.generator.min_replicas=3", "is more than max_replicas"),
        ("serve.generator.replicas=3", "max_replicas"),
    ],
)
def test_impossible_replica_counts_are_refused(override: str, named: str) -> None:
    with pytest.raises(config.ConfigError, match=named):
        config.Config().using(override)


GPT = {"model": "gpt", "base_url": "https://api.example/v1"}


def test_a_hosted_model_takes_part_in_both_of_its_arms_unless_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("compare: {hosted: {gpt: {model: gpt-x}, other: {model: y}}, arms: [base, rag@other]}\n")
    settings = config.load(path)
    assert settings.compare.arms == ("base", "rag@other", "base@gpt", "rag@gpt")
    assert settings.using("compare.margin=0.1").compare.arms == settings.compare.arms, "arms are added only once"
    added = config.load_config({"compare.hosted": {"gpt": GPT}})
    assert added.compare.arms == ("base", "rag", "ft", "rag+ft", "base@gpt", "rag@gpt")
    assert added.compare.hosted["gpt"].engine == "openai"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"answer.arm": "rag@gtp"}, ["answer.arm", "rag@gtp", "no gtp (it has: gpt)"]),
        ({"evaluate.arms": ["base", "rag@gtp"]}, ["evaluate.arms", "rag@gtp"]),
        ({"evaluate.arms": ["ft@gpt"]}, ["evaluate.arms", "'ft@gpt'", "base@NAME or rag@NAME"]),
        ({"compare.arms": ["rag", "gpt"]}, ["compare.arms.1", "'gpt'", "rag+ft"]),
        ({"compare.hosted": {"a/b": GPT}}, ["compare.hosted", "a/b"]),
        ({"compare.hosted": {"gpt": {"base_url": "x"}}}, ["compare.hosted.gpt.model", "required"]),
        ({"compare.hosted": {"gpt": GPT | {"modell": "x"}}}, ["compare.hosted.gpt.modell", "base_url"]),
        ({"answer.reading": "apart"}, ["answer.reading=apart", "compare.hosted.gpt.engine=openai"]),
        ({"compare.hosted.gpt.million_prompt_tokens": 2}, ["compare.hosted.gpt", "prices.core_hour"]),
        ({"prices.million_completion_tokens": 2, "prices.core_hour": 1, "cluster.gpus_per_worker": 1}, ["gpu_hour"]),
    ],
)
def test_an_arm_without_a_model_and_a_wrong_hosted_model_are_refused(values: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(config.ConfigError) as error:
        config.load_config({"compare.hosted": {"gpt": GPT}}, values)
    for part in named:
        assert part in str(error.value)


def test_the_identity_of_scores_omits_a_newer_setting_at_its_old_value() -> None:
    old = config.Evaluate(normalization="squad").identity()
    newer = {"normalization", "metrics", "numeric_tolerance", "labels_path", "judge", "nli_model", "max_failed_grades"}
    assert set(config.Evaluate().model_dump()) - set(old) == newer
    assert config.Evaluate().identity() == {**old, "normalization": "strict"}
    assert "arms" not in config.Evaluate().identity(exclude={"arms"})
    changed = config.Evaluate.model_validate({"metrics": ("semantic",), "numeric_tolerance": 0.01}).identity()
    assert (changed["metrics"], changed["numeric_tolerance"]) == (["semantic"], 0.01)


def test_newer_settings_of_retrieval_leave_the_identity_of_old_runs() -> None:
    newer = {"rerank_candidates", "first_stage_weight", "rewrite", "decompose"}
    for reranker in ("", "some/model"):
        old = config.Retrieval(reranker=reranker)
        assert old.identity() == old.model_dump(mode="json", exclude=newer)
    changed = config.Retrieval(rerank_candidates=10, first_stage_weight=0.0)
    assert changed.identity() == config.Retrieval().identity(), "they have no effect without a reranker"
    assert config.Retrieval(rewrite="none").identity()["rewrite"] == "none"
    rewritten = config.Retrieval(rewrite="generator", decompose=True).identity()
    assert rewritten == {**config.Retrieval().identity(), "rewrite": "generator", "decompose": True}
    found = changed.model_copy(update={"reranker": "some/model"}).identity()
    assert (found["rerank_candidates"], found["first_stage_weight"]) == (10, 0.0)


def test_the_identity_of_retrieval_names_score_fusion_only_where_it_is_used() -> None:
    before = {"mode", "top_k", "candidates", "fusion_constant", "reranker", "filter", "tenant"}
    for override in ("retrieval.fusion=ranks", "retrieval.mode=dense", "retrieval.mode=lexical"):
        assert set(config.Config().using(override).retrieval.identity()) == before, override
    added = set(config.Config().retrieval.identity()) - before
    assert added == {"fusion", "lexical_weight", "unknown_script_weight"}


def test_the_identity_of_an_index_without_titles_is_that_of_earlier_versions() -> None:
    without = config.Config().using("index.lexical_titles=false").index.identity()
    assert "lexical_titles" not in without
    assert config.Config().index.identity() == {**without, "lexical_titles": True}


def test_a_replica_with_a_model_in_parts_needs_as_many_gpus() -> None:
    given = ["generator.engine=vllm", "generator.tensor_parallel=4"]
    assert config.Config().using(*given, "serve.generator.num_gpus=4").generator.tensor_parallel == 4
    with pytest.raises(config.ConfigError, match=r"tensor_parallel=4 .*serve\.generator\.num_gpus is 2; set that to 4"):
        config.Config().using(*given, "serve.generator.num_gpus=2")
