"""The tree of all settings: defaults < YAML file < `section.field=value` arguments."""

from __future__ import annotations

import difflib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ragtune_ray.config.answering import Answer, Prompt
from ragtune_ray.config.arms import hosted_name
from ragtune_ray.config.cluster import Cluster
from ragtune_ray.config.evaluation import Compare, Evaluate, GradedMetric, Prices, Questions
from ragtune_ray.config.generation import Generator
from ragtune_ray.config.index import Index, Retrieval
from ragtune_ray.config.ingest import Chunking, Corpus, Queries
from ragtune_ray.config.models import Encoder
from ragtune_ray.config.section import Section
from ragtune_ray.config.serving import Serve
from ragtune_ray.config.source import ConfigError, Source, read
from ragtune_ray.config.training import Training
from ragtune_ray.config.tuning import Tune

VARIED = ("chunking", "encoder", "index", "retrieval", "prompt")
"""Sections whose settings may differ in `compare.variants`."""


class Config(Section):
    """All settings of a run; the whole tree is recorded in every manifest."""

    workspace: str = Field("workspace", min_length=1)
    """Directory for all results, local or s3://; they are written to index/, models/ and runs/ in it."""
    seed: int = Field(0, ge=0)
    """Seed for every random choice."""
    corpus: Corpus = Corpus()
    queries: Queries = Queries()
    chunking: Chunking = Chunking()
    encoder: Encoder = Encoder()
    index: Index = Index()
    retrieval: Retrieval = Retrieval()
    prompt: Prompt = Prompt()
    generator: Generator = Generator()
    answer: Answer = Answer()
    training: Training = Training()
    evaluate: Evaluate = Evaluate()
    compare: Compare = Compare()
    tune: Tune = Tune()
    questions: Questions = Questions()
    cluster: Cluster = Cluster()
    serve: Serve = Serve()
    prices: Prices = Prices()

    @model_validator(mode="after")
    def _reading_apart_needs_probabilities(self) -> Self:
        engines = {"generator": self.generator.engine}
        engines |= {f"compare.hosted.{name}": hosted.engine for name, hosted in self.compare.hosted.items()}
        for section, engine in engines.items():
            if self.answer.reading == "apart" and engine == "openai":
                raise ValueError(
                    f"answer.reading=apart needs the probability of each answer, which {section}.engine=openai does not "
                    f"report; use {section}.engine=transformers or vllm, or answer.reading=together"
                )
        return self

    @model_validator(mode="after")
    def _parts_of_a_model_have_gpus(self) -> Self:
        parts, num_gpus = self.generator.tensor_parallel, self.serve.generator.num_gpus
        if self.generator.engine == "vllm" and parts > 1 and 0 < num_gpus < parts:
            raise ValueError(
                f"generator.tensor_parallel={parts} divides the model among {parts} GPUs, but serve.generator.num_gpus is "
                f"{num_gpus:g}; set that to {parts}"
            )
        return self

    @model_validator(mode="after")
    def _hosted_arms_have_a_model(self) -> Self:
        named = {
            "answer.arm": (self.answer.arm,),
            "evaluate.arms": self.evaluate.arms,
            "compare.arms": self.compare.arms,
        }
        for field, arm in ((field, arm) for field, arms in named.items() for arm in arms):
            name = hosted_name(arm)
            if name and name not in self.compare.hosted:
                known = ", ".join(self.compare.hosted) or "none"
                raise ValueError(f"{field}: {arm}: compare.hosted has no {name} (it has: {known}); add it there")
        return self

    @model_validator(mode="after")
    def _variants_are_settings_of_retrieval(self) -> Self:
        for name, values in self.compare.variants.items():
            tree = self.model_dump(mode="json")
            tree["compare"]["variants"] = {}
            for field, value in values.items():
                section, _, setting = field.partition(".")
                if section not in VARIED or setting in ("", "system_without_passages"):
                    raise ValueError(
                        f"compare.variants.{name}: {field}: must be section.field, of a setting that changes what is retrieved "
                        f"or how it is shown (sections: {', '.join(VARIED)})"
                    )
                _set(tree, field, value)
            _validated(tree, Source(f"compare.variants.{name}"))
        return self

    @model_validator(mode="after")
    def _token_prices_need_the_price_of_hardware(self) -> Self:
        priced = {"prices": self.prices} | {
            f"compare.hosted.{name}": each for name, each in self.compare.hosted.items()
        }
        hardware = "gpu_hour" if self.cluster.gpus_per_worker else "core_hour"
        for section, each in priced.items():
            if (each.million_prompt_tokens or each.million_completion_tokens) and not getattr(self.prices, hardware):
                raise ValueError(
                    f"{section}: prices of tokens are set, but prices.{hardware} is 0, so the cost of other arms would be in "
                    f"seconds and could not be compared; set prices.{hardware}, too"
                )
        return self

    def with_values(self, values: Mapping[str, Any]) -> Config:
        """A copy with other values, by dotted name; validated again.

        >>> Config().with_values({"retrieval.top_k": 3}).retrieval.top_k
        3

        Raises:
            ConfigError: a name is unknown or a value breaks its rule.
        """
        tree = self.model_dump(mode="json")
        for name, value in values.items():
            _set(tree, name, os.fspath(value) if isinstance(value, os.PathLike) else value)
        return _validated(tree, Source("settings"))

    def with_compared_metric(self) -> Config:
        """A copy in which `evaluate.metrics` names `compare.metric`, if that is one that a model computes.

        >>> Config().with_values({"compare.metric": "semantic"}).with_compared_metric().evaluate.metrics
        ('semantic',)
        """
        metric, metrics = self.compare.metric, self.evaluate.metrics
        if metric in metrics or metric not in get_args(GradedMetric):
            return self
        return self.with_values({"evaluate.metrics": [*metrics, metric]})

    def using(self, *overrides: str) -> Config:
        """A copy with `section.field=value` texts applied, as on the command line; validated again.

        >>> Config().using("retrieval.top_k=3").retrieval.top_k
        3
        """
        tree = self.model_dump(mode="json")
        for override in overrides:
            _apply(tree, override)
        return _validated(tree, Source("overrides"))


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.field=value` overrides.

    Raises:
        ConfigError: the file cannot be read or is not a mapping, a name is unknown, or a value breaks its rule. The message
            names the file and line of the value, or the command line.
    """
    values, lines = read(path)
    for override in overrides:
        _apply(values, override)
    return _validated(values, Source(str(path), lines, tuple(overrides)))


def load_config(source: str | os.PathLike[str] | Mapping[str, Any], values: Mapping[str, Any] | None = None) -> Config:
    """Build a config from a YAML file, or from values by dotted name; `values` override those of the source.

    >>> load_config({"workspace": "here", "retrieval.top_k": 3}).retrieval.top_k
    3

    Raises:
        ConfigError: the file cannot be read or is not a mapping, a name is unknown, or a value breaks its rule.
    """
    settings = Config().with_values(source) if isinstance(source, Mapping) else load(os.fspath(source))
    return settings.with_values(values) if values else settings


def describe() -> Iterator[tuple[str, str, str]]:
    """Every setting as (dotted name, default, meaning), in the order of the tree."""
    yield from _describe(Config(), "")


def describe_section(section: str) -> list[tuple[str, str, str]]:
    """As `describe`, for the settings of one section, or one setting.

    >>> [name for name, _, _ in describe_section("index")][:2]
    ['index.kind', 'index.memory_bytes']

    Raises:
        ConfigError: there is no such section or setting.
    """
    every = list(describe())
    found = [each for each in every if each[0] == section or each[0].startswith(f"{section}.")]
    if not found:
        sections = list(dict.fromkeys(name.partition(".")[0] for name, _, _ in every))
        near = difflib.get_close_matches(section, [*sections, *(name for name, _, _ in every)], n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"no section or setting is named {section!r}; {meant}sections: {', '.join(sections)}")
    return found


def settings_page() -> str:
    """`docs/settings.md`: a table of settings for each section, in Markdown."""
    lines = [
        "# Settings",
        "",
        "For everyone who writes a config file: every setting, its default and its meaning.",
        "",
        "A config is a YAML file with one mapping per section. On the command line, `section.field=value` overrides the",
        "file: `ragtune index CONFIG.yaml retrieval.top_k=3`. Settings that are absent keep their defaults; unknown names",
        "are refused. This page is the output of `ragtune settings --markdown`.",
    ]
    section = None
    for name, default, meaning in describe():
        prefix = name.rpartition(".")[0]
        if prefix != section:
            section = prefix
            lines += ["", *_section_heading(prefix), "", "| setting | default | meaning |", "|---|---|---|"]
        cells = (text.replace("|", "\\|").replace("\n", " ") for text in (f"`{name}`", f"`{default}`", meaning))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _section_heading(prefix: str) -> tuple[str, str, str]:
    section: type[BaseModel] = Config
    text = ""
    for part in filter(None, prefix.split(".")):
        text = section.model_fields[part].description or ""
        section = _section_of(section.model_fields[part]) or section
    text = text or inspect.cleandoc(section.__doc__ or "").replace("\n\n", " ")
    return f"## {prefix or 'Top level'}", "", text.replace("\n", " ")


def _describe(section: BaseModel, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _describe(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _shown(value), _meaning(field)


def _meaning(field: FieldInfo) -> str:
    """The description of a field, and the values it allows where the description does not name all of them."""
    text = field.description or ""
    allowed = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return text if all(f"`{value}`" in text for value in allowed) else f"{text} One of: {', '.join(allowed)}."


def _shown(value: Any) -> str:
    """A value as YAML."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field contains, itself or in a mapping of names to sections."""
    kind = field.annotation
    if get_origin(kind) is dict:
        kind = get_args(kind)[1]
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _validated(values: dict[str, Any], source: Source) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, source) for item in error.errors())) from error


def _explain(item: Any, source: Source) -> str:
    place, field = source.place(item["loc"]), ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _known_fields(item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        return f"{place}: unknown setting {field!r}; {meant}known here: {', '.join(known)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "model_type":
        message = "must be a mapping of settings"
    given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
    return f"{place}: {field or 'config'}: {message}{given}"


def _known_fields(location: Sequence[Any]) -> list[str]:
    section: type[BaseModel] = Config
    for part in location:
        if part not in section.model_fields:  # a name in a mapping of sections
            continue
        nested = _section_of(section.model_fields[part])
        if nested is None:
            return []
        section = nested
    return list(section.model_fields)


def _apply(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(f"command line: {override!r} is not a setting, which is section.field=value")
    try:
        value = yaml.safe_load(text) if text.strip() else ""
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"command line: {override!r}: the value is not valid YAML; quote it") from error
    try:
        _set(values, name.strip(), value)
    except ConfigError as error:
        raise ConfigError(f"command line: {error}") from error


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, field = name.split(".")
    for section in sections:
        child = values.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{name}: {section!r} is not a section")
        values = child
    values[field] = value
