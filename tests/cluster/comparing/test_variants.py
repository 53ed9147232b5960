"""Variants of retrieval are searched on validation questions, and the best is used on the test questions."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.cluster.answering import answer, evaluate
from ragtune_ray.cluster.comparing import variants
from ragtune_ray.cluster.comparing.compare import compare, read_comparison
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.indexing.update import delete_documents
from ragtune_ray.index import versions
from ragtune_ray.schema import Query
from ragtune_ray.storage import artifacts
from tests.support.comparisons import answer_row

OPTIONS = (
    "queries.split_by=document",
    "queries.split_shares=[0, 3, 1]",
    "compare.arms=[base, rag]",
    "retrieval.mode=dense",
)


@pytest.fixture
def settings(settings_for, tmp_path: Path) -> config.Config:
    return settings_for(tmp_path / "workspace", *OPTIONS)


class Answerer:
    """In place of `answer`: a question is answered rightly if `is_right(top_k, number of the question)`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_right: Any) -> None:
        self.is_right = is_right
        self.asked: list[tuple[int, list[str]]] = []
        self.runs: dict[str, list[Any]] = {}
        monkeypatch.setattr(answer, "answer", self.answer)
        monkeypatch.setattr(evaluate, "read_answers", self.runs.__getitem__)

    def answer(self, settings: config.Config) -> str:
        assert settings.answer.arm == "rag"
        top_k = settings.retrieval.top_k
        lines = Path(settings.queries.path).read_text(encoding="utf-8").splitlines()
        names = [json.loads(line)["query_id"] for line in lines]
        self.asked.append((top_k, names))
        run = f"run {len(self.runs)}"
        texts = {name: f"secret{name[1:]}" if self.is_right(top_k, int(name[1:])) else "none" for name in names}
        self.runs[run] = [answer_row(name, text) for name, text in texts.items()]
        return run


def with_top_k(settings: config.Config, *counts: int) -> config.Config:
    return settings.with_values({"compare.variants": {f"top{count}": {"retrieval.top_k": count} for count in counts}})


def test_the_best_variant_is_found_on_the_validation_questions_alone(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = with_top_k(settings, 1, 2, 3)
    splits_of = {
        split: {row.query_id for row in variants.staged_queries.judged_queries(given.using(f"queries.split={split}"))}
        for split in ("validation", "test")
    }
    total = len(splits_of["validation"])
    assert 20 < total < 40
    answers = Answerer(monkeypatch, lambda top_k, number: number % 4 < top_k)  # the config's top_k is 5: always right
    chosen, found = variants.settle(given)
    assert found is not None
    assert (found.winner, chosen) == ("config", given)
    assert found.questions == total
    assert [(each.questions, set(each.scores)) for each in found.rounds] == [
        (20, {"config", "top1", "top2", "top3"}),
        (total, {"config", "top3"}),
    ]
    assert found.looks == 6
    seen = [(top_k, name) for top_k, names in answers.asked for name in names]
    assert len(seen) == len(set(seen)) == 4 * 20 + 2 * (total - 20), "no question is answered twice"
    assert {name for _, name in seen} == splits_of["validation"]
    shares = {
        top_k: sum(int(name[1:]) % 4 < top_k for name in names) / len(names)
        for top_k in (1, 2, 3, 5)
        if (names := [name for count, name in seen if count == top_k])
    }
    assert [found.variants[name].score.value for name in ("top1", "top2", "top3", "config")] == pytest.approx(
        [shares[top_k] for top_k in (1, 2, 3, 5)]
    )
    assert [found.variants[name].score.n for name in ("top1", "top3")] == [20, total]
    numbers = [int(name[1:]) for name in answers.asked[0][1]]
    assert numbers != sorted(numbers), "drawn from the whole file, not its beginning"
    assert variants._questions(given) != variants._questions(given.using("seed=1"))
    again = Answerer(monkeypatch, lambda top_k, number: number % 4 < top_k)
    assert variants.settle(given) == (chosen, found)
    assert again.asked == answers.asked


def test_the_config_of_the_winner_is_used_and_equal_variants_leave_the_config_as_it_is(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = with_top_k(settings, 9, 8)
    Answerer(monkeypatch, lambda top_k, _: top_k == 8)
    chosen, found = variants.settle(given)
    assert found is not None
    assert (found.winner, chosen) == ("top8", given.using("retrieval.top_k=8"))
    Answerer(monkeypatch, lambda *_: True)
    assert variants.settle(given)[0] == given


def test_without_variants_or_retrieval_nothing_is_searched(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = Answerer(monkeypatch, lambda *_: True)
    assert variants.settle(settings) == (settings, None)
    assert variants.held_out(settings) == settings
    unused = with_top_k(settings, 1).using("compare.arms=[base]")
    assert variants.held_out(unused) == unused
    assert variants.settle(unused) == (unused, None)
    assert not answers.asked
    assert capsys.readouterr().err == ""


def test_arms_are_compared_on_other_questions_than_those_that_chose(settings: config.Config) -> None:
    given = with_top_k(settings, 1)
    assert variants.held_out(given).queries.split == "test"
    assert variants.held_out(given.using("queries.split=test")).queries.split == "test"
    with pytest.raises(config.ConfigError, match=r"queries.split=validation: compare.variants are chosen on"):
        variants.held_out(given.using("queries.split=validation"))


def test_a_failed_grade_and_unknown_answers_leave_questions_out_of_every_variant(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    Answerer(monkeypatch, lambda top_k, _: top_k == 1)
    found = evaluate.scores_of

    def scores_of(questions: Any, run: str, given: config.Config) -> Any:
        scores = found(questions, run, given)
        if run == "run 0":
            scores[questions[0].query_id].pop("token_F1")
        return scores

    monkeypatch.setattr(evaluate, "scores_of", scores_of)
    _, search = variants.settle(with_top_k(settings, 1))
    assert search is not None
    assert search.winner == "top1"
    assert search.variants["config"].score.n == search.variants["top1"].score.n - 1
    unknown = Query("q", "Who?", None, (), (), "validation")
    known = Query("r", "Who?", ("me",), (), (), "validation")
    monkeypatch.setattr(variants.staged_queries, "judged_queries", lambda _: [unknown, known])
    assert variants._questions(settings) == [known]


@pytest.mark.parametrize("override", ["queries.split_by=given", "queries.split_shares=[1, 0, 1]"])
def test_variants_need_validation_questions(settings: config.Config, override: str) -> None:
    with pytest.raises(evaluate.EvaluationError, match="no validation question has gold answers"):
        variants.settle(with_top_k(settings, 1).using(override))


@pytest.mark.parametrize(
    ("values", "own"),
    [
        ({"chunking.size_tokens": 64}, True),
        ({"index.kind": "flat"}, True),
        ({"encoder.model": "hashing-32"}, True),
        ({"encoder.query_prefix": "query: "}, False),
        ({"retrieval.mode": "lexical", "prompt.max_tokens": 500}, False),
        ({"chunking.size_tokens": 32}, False),  # as in the config
    ],
)
def test_a_variant_has_its_own_workspace_only_if_it_needs_its_own_index(
    settings: config.Config, values: dict[str, Any], own: bool
) -> None:
    varied = variants._varied(settings.with_values({"compare.variants": {"v": values}}), "v")
    assert varied.workspace == (f"{settings.workspace}/variants/v" if own else settings.workspace)


def test_an_index_of_other_documents_is_refused(settings: config.Config) -> None:
    given = settings.with_values({"compare.variants": {"short": {"chunking.size_tokens": 16}}})
    build_index(given)
    delete_documents(given, ["d3", "d7"])
    with pytest.raises(evaluate.EvaluationError, match=r"variants/short: 2 documents of .*run: ragtune index"):
        variants.settle(given)


def secret_of(prompt: str) -> str:
    """What a perfect reader would answer: the code of the vessel that is asked for, if a passage states it."""
    (vessel,) = re.findall(r"code of vessel(\d+)\?", prompt)
    return f"secret{vessel} [1]" if f"The code of vessel{vessel} is" in prompt else "I don't know."


@pytest.mark.cluster
@pytest.mark.timeout(1500)
def test_a_planted_better_variant_wins_and_its_index_is_used_by_all_arms(
    settings: config.Config, openai_stub: Any, shared_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hashed dense hit rarely holds the answer, five do more often, and words in small passages find it always."""
    openai_stub.reply = secret_of
    given = settings.using(
        "retrieval.top_k=1",
        "generator.engine=openai",
        "generator.model=stub",
        f"generator.base_url={openai_stub.url}",
        "compare.latency_queries=1",
        "cluster.generator_workers=1",
    ).with_values(
        {
            "compare.variants": {
                "five": {"retrieval.top_k": 5},
                "words": {"retrieval.mode": "lexical", "retrieval.top_k": 3, "chunking.size_tokens": 24},
            }
        }
    )
    build_index(given)
    run = compare(given)
    found = read_comparison(run)
    searched = found["variants"]
    assert searched["winner"] == "words"
    assert searched["variants"]["words"]["score"]["value"] == 1.0
    assert searched["variants"]["words"]["workspace"] == f"{given.workspace}/variants/words"
    assert searched["variants"]["config"]["score"]["value"] < 0.7
    assert searched["looks"] == 5
    assert run.path.startswith(f"{given.workspace}/runs/compare-")
    answered = artifacts.read_manifest(run.manifest["evaluated"])["runs"]
    rows = evaluate.read_answers(answered["rag"])
    assert {len(row.passage_ids) for row in rows} == {3}
    assert found["arms"]["rag"]["quality"]["EM"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": len(rows)}
    assert found["config"]["retrieval"]["mode"] == "lexical"
    validation = {row.query_id for row in variants._questions(given)}
    assert not validation & {row.query_id for row in rows}
    assert versions.list_versions(f"{given.workspace}/variants/words") == ["000001"]
    assert "words" in (Path(run) / "report.html").read_text()

    monkeypatch.setattr(answer, "_generate", lambda *_: pytest.fail("a question was answered again"))
    assert compare(given) == run
    assert versions.list_versions(f"{given.workspace}/variants/words") == ["000001"], "the index is reused"
