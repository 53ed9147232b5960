"""Each arm uses the models that were trained for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.models import arms, weights
from tests.support.models import publish_tuned_model

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["training.arm=ft"], "ft"),
        (["training.arm=rag+ft"], "rag+ft"),
        (["training.arm=ft", "training.name=mine"], "mine"),
        (["training.objective=contrastive"], "retriever"),
        (["training.objective=query_side", "training.arm=ft"], "retriever"),
        (["training.objective=distillation", "training.name=mine"], "mine"),
        (["training.objective=reranker"], "reranker"),
    ],
)
def test_tuned_name_is_the_config_name_or_the_arm_or_retriever(overrides: list[str], name: str) -> None:
    assert arms.tuned_name(config.Config().using(*overrides).training) == name


def test_tuned_model_of_a_name_is_the_latest(directory: Path, tmp_path: Path) -> None:
    workspace = str(tmp_path / "workspace")
    for content in (b"first", b"second"):
        url = publish_tuned_model(f"{workspace}/models/mine", directory, content)
        assert arms.tuned_model(workspace, "mine") == url


@pytest.mark.parametrize(
    ("name", "argument"), [("ft", " training.arm=ft"), ("rag+ft", " training.arm=rag+ft"), ("retriever", "")]
)
def test_missing_tuned_model_names_the_command_to_run(tmp_path: Path, name: str, argument: str) -> None:
    with pytest.raises(weights.ModelError) as error:
        arms.tuned_model(str(tmp_path), name)
    assert str(error.value).startswith(f"{tmp_path}/models/{name}: ")
    assert str(error.value).endswith(f"run: ragtune train CONFIG{argument}")
    (tmp_path / "models" / name / "half-written").mkdir(parents=True)
    with pytest.raises(weights.ModelError, match="no tuned model"):
        arms.tuned_model(str(tmp_path), name)


@pytest.mark.parametrize("workspace", ["workspace", "a b: {c} #1 'd' \"e\"", "工作 🚀 𠮷", "{x}"])
def test_tuned_arms_use_the_models_trained_for_them(directory: Path, tmp_path: Path, workspace: str) -> None:
    place = str(tmp_path / workspace)
    settings = config.Config(workspace=place, generator=config.Generator(engine="openai", max_new_tokens=7))
    urls = {arm: publish_tuned_model(f"{place}/models/{arm}", directory, arm.encode()) for arm in ("ft", "rag+ft")}
    for arm, url in urls.items():
        found = arms.with_tuned_models(settings.using(f"answer.arm={arm}"))
        assert found.generator.model == url
        assert weights.resolve(found.generator.model).directory == Path(url)
        assert found.generator.engine == "transformers"
        unchanged = {"model": settings.generator.model, "engine": "openai"}
        assert found.generator.model_copy(update=unchanged) == settings.generator
        assert found.using("answer.arm=rag").model_copy(update={"generator": settings.generator}) == settings
    for arm in ("base", "rag"):
        untuned = settings.using(f"answer.arm={arm}")
        assert arms.with_tuned_models(untuned) is untuned


def test_tuned_arm_ignores_models_of_other_names(directory: Path, tmp_path: Path) -> None:
    settings = config.Config(workspace=str(tmp_path)).using("answer.arm=rag+ft", "training.name=mine")
    publish_tuned_model(tmp_path / "models" / "mine", directory, b"mine")
    with pytest.raises(weights.ModelError, match=r"rag\+ft: no tuned model .* training.arm=rag\+ft"):
        arms.with_tuned_models(settings)
    url = publish_tuned_model(tmp_path / "models" / "rag+ft", directory, b"other")
    assert arms.with_tuned_models(settings).generator.model == url


def test_a_hosted_arm_uses_its_own_generator_and_prices_and_all_other_settings() -> None:
    hosted = {
        "model": "gpt-x",
        "base_url": "https://api.example/v1",
        "api_key_env": "KEY",
        "million_prompt_tokens": 2.5,
    }
    settings = config.load_config(
        {
            "compare.hosted": {"gpt": hosted, "long": {"model": "thinker", "max_new_tokens": 900}},
            "generator.max_new_tokens": 7,
            "generator.timeout_seconds": 3,
            "prices.core_hour": 0.1,
            "prices.million_completion_tokens": 9,
        }
    )
    found = arms.with_tuned_models(settings.with_values({"answer.arm": "rag@gpt"}))
    changed = {"model": "gpt-x", "engine": "openai", "base_url": "https://api.example/v1", "api_key_env": "KEY"}
    assert found.generator == settings.generator.model_copy(update=changed)
    assert (found.prices.core_hour, found.prices.million_prompt_tokens) == (0.1, 2.5)
    assert found.prices.million_completion_tokens == 0, "the price of another server is not its own"
    assert found.with_values({"answer.arm": "rag"}).model_copy(
        update={"generator": settings.generator, "prices": settings.prices}
    ) == settings.with_values({"answer.arm": "rag"})
    assert arms.with_tuned_models(found) == found
    assert arms.with_tuned_models(settings.with_values({"answer.arm": "base@long"})).generator.max_new_tokens == 900


@pytest.mark.parametrize(
    ("reranker", "base"),
    [
        ("", "encoder"),
        ("other", "other"),
        ("workspace/models/reranker", "encoder"),
        ("workspace/models/reranker/0123", "encoder"),
        ("workspace/models/reranker2", "workspace/models/reranker2"),
    ],
)
def test_a_reranker_starts_from_the_configured_one_unless_it_is_the_result(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reranker: str, base: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("encoder", "other", "workspace/models/reranker2"):
        shutil.copytree(directory, name)
    settings = config.Config().using(
        "training.objective=reranker", "encoder.model=encoder", f"retrieval.reranker={reranker}"
    )
    assert arms.base_model(settings).name == base
