"""An error names where the wrong value was given: file and line, or the command line."""

from pathlib import Path

import pytest

from ragtune_ray import config


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        pytest.param("seed: 1\nindex: {kind: tree}\n", [], "c.yaml:2: index.kind: Input should be", id="file and line"),
        pytest.param("retrieval:\n  mode: dense\n  topk: 2\n", [], "c.yaml:3: unknown setting 'retrieval.topk'; did you mean 'top_k'?", id="unknown"),
        pytest.param("compare:\n  arms:\n  - base\n  - rga\n", [], "c.yaml:4: compare.arms.1", id="item of a list"),
        pytest.param("corpus: here\n", [], "c.yaml:1: corpus: must be a mapping of settings (given: 'here')", id="no section"),
        pytest.param("seed: 1\n", ["seed=x"], "command line: seed: Input should be a valid integer", id="override"),
        pytest.param("retrieval: {mode: dense}\n", ["retrieval.top_k=0"], "command line: retrieval.top_k: ", id="override in a section of the file"),
        pytest.param("", ["retreival.k=1"], "command line: unknown setting 'retreival'; did you mean 'retrieval'?", id="override of an unknown section"),
        pytest.param("seed: 1\n", ["seed.x=1"], "command line: seed.x: 'seed' is not a section", id="override of no section"),
        pytest.param("", ["seed"], "command line: 'seed' is not a setting", id="no override"),
        pytest.param("answer: {reading: apart}\n", ["generator.engine=openai"], "c.yaml with generator.engine=openai: ", id="both"),
        pytest.param("chunking: {size_tokens: 64}\n", ["chunking.overlap_tokens=60"], "c.yaml:1 with chunking.overlap_tokens=60: ", id="both in a section"),
    ],
)  # fmt: skip
def test_the_place_of_a_wrong_value_is_named(tmp_path: Path, text: str, overrides: list[str], expected: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(config.ConfigError) as error:
        config.load(path, overrides)
    assert expected in str(error.value).splitlines()[0]
    assert ("c.yaml" in str(error.value)) is ("c.yaml" in expected)


def test_a_setting_that_is_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("retrieval: {top_k: 3}\nseed: 1\nretrieval:\n  mode: dense\n")
    with pytest.raises(config.ConfigError, match=r"c\.yaml:3: retrieval is given a second time, after line 1"):
        config.load(path)


def test_aliases_and_merge_keys_are_no_repetitions_and_end(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("compare: {variants: {a: &a {retrieval.top_k: 3}, b: {<<: *a, retrieval.top_k: 4}, c: *a}}\n")
    assert config.load(path).compare.variants["b"] == {"retrieval.top_k": 4}
    nested = "".join(f"x{number}: &x{number} [{f'*x{number - 1}, ' * 9 if number else 0}]\n" for number in range(12))
    path.write_text(nested)
    with pytest.raises(config.ConfigError, match="unknown setting 'x0'"):
        config.load(path)
