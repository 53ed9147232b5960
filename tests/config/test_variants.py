"""Variants of retrieval in a config."""

from typing import Any

import pytest

from ragtune_ray import config


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"retrieval.topk": 10}, ["compare.variants.v", "retrieval.topk", "top_k"]),
        ({"retrieval.top_k": 0}, ["compare.variants.v", "retrieval.top_k", "greater than 0"]),
        ({"chunking.size_tokens": 40}, ["compare.variants.v", "overlap_tokens"]),
        ({"generator.model": "x"}, ["compare.variants.v", "generator.model", "chunking, encoder, index"]),
        ({"prompt.system_without_passages": "x"}, ["prompt.system_without_passages"]),
        ({"retrieval": {"top_k": 3}}, ["compare.variants.v", "retrieval", "section.field"]),
    ],
)
def test_a_wrong_variant_of_retrieval_is_refused(values: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(config.ConfigError) as error:
        config.load_config({"compare.variants": {"v": values}})
    for part in named:
        assert part in str(error.value)


def test_variants_may_not_be_named_like_the_config_or_a_path() -> None:
    for name in ("config", "a/b", ".."):
        with pytest.raises(config.ConfigError, match=r"compare"):
            config.load_config({"compare.variants": {name: {"retrieval.top_k": 3}}})
    settings = config.Config().using("compare.variants.long={retrieval.top_k: 9, chunking.size_tokens: 64}")
    assert settings.compare.variants == {"long": {"retrieval.top_k": 9, "chunking.size_tokens": 64}}
