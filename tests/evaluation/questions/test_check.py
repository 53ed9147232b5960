"""What `ragtune questions check` finds in questions made by script, with numbers counted by hand."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.cli import main
from ragtune_ray.evaluation.questions import repeats
from ragtune_ray.evaluation.questions.answer_kinds import kind_of_answer, num_words
from ragtune_ray.evaluation.questions.check import QuestionsCheck, check
from ragtune_ray.evaluation.questions.proposal import propose
from ragtune_ray.evaluation.questions.repeats import find_repeats
from ragtune_ray.schema import Query

SENTENCE = "Lorries enter the depot by the north gate with the code 4512, and the driver then reports to the office."


def ask(path: Path, *rows: dict[str, Any]) -> Path:
    full = ({"query_id": f"q{n}", "text": f"Which number has row {n}?", **row} for n, row in enumerate(rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in full))
    return path


def checked(tmp_path: Path, *rows: dict[str, Any], overrides: tuple[str, ...] = ()) -> QuestionsCheck:
    path = ask(tmp_path / "q.jsonl", *rows)
    return check(config.Config().using(f"workspace={tmp_path / 'none'}", f"queries.path={path}", *overrides))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Yes", "yes or no"),
        ("nein.", "yes or no"),
        ("4.5 million", "number"),
        ("-3 °C", "number"),
        ("1969", "number"),
        ("20 July 1969", "date"),
        ("July 20, 1969", "date"),
        ("1969-07-20", "date"),
        ("2019年7月20日", "date"),
        ("July", "date"),
        ("le 3 mars 1969", "date"),
        ("3 Sept. 1969", "date"),
        ("Mars", "short phrase"),
        ("Maine", "short phrase"),
        ("Decision", "short phrase"),
        ("Octopus", "short phrase"),
        ("Out", "short phrase"),
        ("Neil Armstrong", "short phrase"),
        ("the far side of the Moon", "short phrase"),
        ("阿波罗计划", "short phrase"),
        ("red, green and blue", "list"),
        ("- red\n- green", "list"),
        ("It opens at seven in the morning.", "sentence"),
        (SENTENCE, "sentence"),
        (f"{SENTENCE} {SENTENCE} {SENTENCE}", "long"),
    ],
)
def test_a_gold_answer_has_a_kind(text: str, kind: str) -> None:
    assert kind_of_answer(text, "en") == kind


def test_words_are_characters_where_there_are_no_spaces() -> None:
    assert num_words(["It is red, not blue.", "红色的。", "café au lait", ""]) == [5, 3, 3, 0]


def test_everything_is_counted(tmp_path: Path) -> None:
    found = checked(
        tmp_path,
        {"answers": ["Ann"], "split": "train"},
        {"answers": ["Ann Lee of Oslo"], "split": "train"},
        {"answers": [SENTENCE, "a longer one " * 30], "split": "test"},
        {"answers": 12, "split": "test", "note": "x"},
        {"answers": []},
        {"answers": None, "document_ids": ["a"]},
        {"answers": [""]},
    )
    assert (found.num_questions, found.num_rejects, found.num_compared) == (6, 1, 2)
    assert found.splits == {"train": 2, "test": 2, "all": 2}
    assert found.kinds == {
        "none known": 1,
        "unanswerable": 1,
        "number": 1,
        "short phrase": 2,
        "sentence": 1,
    }
    assert found.lengths is not None
    assert (found.lengths.median, found.lengths.longest) == (2.5, 20)  # 1, 4, 20 and 1 words
    assert found.documents.named == 1
    assert found.notices == {"numbers are read as text": 1, "not read: column `note`": 1}
    assert any("1 rows cannot be used" in text and "every answer is blank" in text for text in found.warnings)
    assert any("2 questions are fewer than 20" in text for text in found.warnings)


def test_repeats_contradictions_and_leaks_are_told_apart(tmp_path: Path) -> None:
    asked = "Who walked on the Moon before Aldrin in the summer of 1969?"
    rows = [
        Query("a", asked, ("Armstrong",), (), (), "train"),
        Query("b", asked.upper(), ("Neil", "armstrong."), (), (), "train"),
        Query("c", "Who is she?", ("Ann",), (), (), "train"),
        Query("d", "Who is she", ("Eve",), (), (), "test"),
        Query("e", asked.replace("Who", "And who"), ("Armstrong",), (), (), "test"),
        Query("f", asked.replace("Moon before Aldrin", "bridge before Scott"), ("x",), (), (), "test"),
        Query("g", "Who is she?", None, (), (), "train"),
    ]
    found = find_repeats(rows, lambda text: text.lower().strip("."))
    assert (found.texts, found.in_two_splits, found.contradicting) == (2, 1, 1)
    assert found.contradicting_examples == (("c", "d"),)
    assert (found.nearly_in_two_splits, found.near_examples) == (1, (("a", "e"),))


def test_questions_of_one_form_about_other_things_are_no_repeats() -> None:
    names = [f"site{number}" for number in range(400)]
    rows = [
        Query(
            name,
            f"How does a lorry get into the yard of {name} in the morning?",
            ("x",),
            (),
            (),
            ("train", "test")[n % 2],
        )
        for n, name in enumerate(names)
    ]
    assert find_repeats(rows, str).nearly_in_two_splits == 0


def test_near_repeats_are_found_without_spaces_between_words() -> None:
    train = Query("a", "阿波罗11号飞船是在哪一年登上月球的？", ("1969",), (), (), "train")
    test = Query("b", "阿波罗11号飞船是哪一年登上月球的？", ("1969",), (), (), "test")
    other = Query("c", "东京塔一共有多少米高？", ("333",), (), (), "test")
    found = find_repeats([train, test, other], str)
    assert (found.nearly_in_two_splits, found.near_examples) == (1, (("a", "b"),))


def test_near_repeats_are_those_that_comparing_all_pairs_finds() -> None:
    source = random.Random(0)
    words = [f"w{number}" for number in range(60)]
    rows = []
    for number in range(120):
        text = " ".join(source.choices(words, k=8))
        rows.append(Query(f"a{number}", text, ("x",), (), (), "train"))
        kept = text.split()
        kept[source.randrange(8)] = source.choice(words)
        rows.append(Query(f"b{number}", " ".join(kept), ("x",), (), (), "test"))
    first = {repeats._plain(row): row for row in reversed(rows)}
    bags = {text: frozenset(text.split()) for text in first}
    counts = {word: sum(word in bag for bag in bags.values()) for word in words}
    weights = {word: math.log1p(len(bags) / count) for word, count in counts.items() if count}
    pairs = {
        (a, b)
        for a in bags
        for b in bags
        if a < b and first[a].split != first[b].split and repeats._overlap(bags[a], bags[b], weights) >= repeats.NEAR
    }
    found = repeats.find_repeats(rows, str)
    assert len(pairs) > 20
    # A question counts once, however many it nearly repeats.
    assert len({text for pair in pairs for text in pair}) / 2 <= found.nearly_in_two_splits <= len(pairs)


def test_gold_answers_that_no_metric_tells_apart_are_named(tmp_path: Path) -> None:
    rows = ({"answers": [text]} for text in ("4.5", "45", "C", "C#", "Paris", "paris.", "the Paris"))
    found = checked(tmp_path, *rows, overrides=("evaluate.normalization=squad",))
    assert found.alike == (("4.5", "45"), ("C", "C#"))
    assert any("'4.5' = '45'" in text and "strict tells more apart" in text for text in found.warnings)
    assert checked(tmp_path, {"answers": ["4.5"]}, {"answers": ["45", "C#", "c"]}).alike == ()
    same = checked(
        tmp_path, {"answers": ["1,731 grams", "98 per cent", "Ｃ"]}, {"answers": ["1731 grams", "98%", "the c"]}
    )
    assert same.alike == ()


def test_the_language_of_answers_is_compared_with_the_config(tmp_path: Path) -> None:
    rows = [{"answers": ["Das ist die Brücke von Oslo und nicht der Turm."]}] * 30
    asked = [{**row, "text": f"Wo ist das {number}?"} for number, row in enumerate(rows)]
    assert any("set evaluate.language=de" in text for text in checked(tmp_path, *asked).warnings)
    same = checked(tmp_path, *asked, overrides=("evaluate.language=de",))
    assert not any("evaluate.language" in text for text in same.warnings)


@pytest.mark.parametrize(
    ("kinds", "has_judge", "metric"),
    [
        ({"short phrase": 90, "sentence": 10}, False, "token_F1"),
        ({"number": 95, "date": 5, "unanswerable": 400}, False, "numeric_match"),
        ({"number": 80, "date": 20}, False, "token_F1"),
        ({"sentence": 30, "list": 20, "long": 10, "number": 40}, True, "judge"),
        ({"sentence": 60, "number": 40}, False, "ROUGE_L"),
        ({"none known": 100}, True, "judge"),
        ({"none known": 100, "unanswerable": 3}, False, "groundedness"),
    ],
)
def test_the_metric_follows_from_the_kinds(kinds: Any, has_judge: bool, metric: str) -> None:
    found = propose(kinds, has_judge=has_judge)
    assert found.metric == metric
    assert metric in found.fitting


def test_a_person_reads_it_at_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ask(tmp_path / "q.jsonl", *({"answer": SENTENCE, "contexts": ["c"]} for _ in range(30)))
    with pytest.raises(SystemExit) as ended:
        main(["questions", "check", str(path), f"workspace={tmp_path}"])
    assert ended.value.code == 0
    shown = capsys.readouterr()
    assert shown.out == f"{path}\n"
    lines = shown.err.splitlines()[1:]
    assert max(map(len, lines)) <= 80
    assert lines[:3] == [
        "questions  30",
        "answers    30 sentence",
        "lengths    median 20 words, 95 of 100 at most 20, longest 20; median 104",
    ]
    assert any(line.startswith("metric     ROUGE_L: 30 of 30 gold answers are sentences") for line in lines)
    assert any(line.startswith("read as    `contexts` is not read") for line in lines)


def test_the_command_takes_a_config_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ask(tmp_path / "q.jsonl", {"answers": ["1,5"]}, {"answers": ["15"]})
    (tmp_path / "c.yaml").write_text(f"workspace: {tmp_path}\nqueries: {{path: {path}}}\nevaluate: {{language: de}}\n")
    for arguments in ([str(tmp_path / "c.yaml")], [str(path), str(tmp_path / "c.yaml")]):
        with pytest.raises(SystemExit):
            main(["questions", "check", *arguments, "--json"])
        facts = json.loads(capsys.readouterr().out)
        assert (facts["path"], facts["num_questions"], facts["proposal"]["metric"]) == (str(path), 2, "numeric_match")
    with pytest.raises(SystemExit) as ended:
        main(["questions", "check", str(tmp_path / "none.csv")])
    assert ended.value.code == 1
    assert "no such file" in capsys.readouterr().err


def test_an_index_that_nobody_named_is_not_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ask(tmp_path / "q.jsonl", {"answers": ["x"], "document_ids": ["a"]})
    monkeypatch.chdir(tmp_path)
    index = tmp_path / "workspace" / "index"
    index.mkdir(parents=True)
    (index / "CURRENT").write_text("000001\n")  # of an index that is not there
    with pytest.raises(SystemExit) as ended:
        main(["questions", "check", str(path)])
    assert ended.value.code == 0
    assert "not looked up without an index" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["questions", "check", str(path), "workspace=workspace"])
    assert ended.value.code == 1


def test_twenty_thousand_questions_are_looked_at_in_seconds(tmp_path: Path) -> None:
    source = random.Random(0)
    words = [f"word{number}" for number in range(5000)]
    rows = (
        {"text": " ".join(source.choices(words, k=9)), "answers": [" ".join(source.choices(words, k=4))]}
        for _ in range(20_000)
    )
    started = time.process_time()
    assert checked(tmp_path, *rows).num_questions == 20_000
    assert time.process_time() - started < 20


def test_questions_without_gold_answers_count_where_a_judge_is_set(tmp_path: Path) -> None:
    rows = [{"answers": None} for _ in range(30)]
    found = checked(tmp_path, *rows, overrides=("evaluate.judge.model=m",))
    assert (found.proposal.metric, found.num_compared) == ("judge", 30)
    assert not any("fewer than 20" in text for text in found.warnings)
    assert checked(tmp_path, *rows).num_compared == 0, "without a judge nothing scores them"


def test_only_numbers_count_where_numbers_are_compared(tmp_path: Path) -> None:
    rows = [{"answers": ["7" if number < 5 else "red"]} for number in range(30)]
    assert checked(tmp_path, *rows, overrides=("compare.metric=numeric_match",)).num_compared == 5
    assert checked(tmp_path, *rows).num_compared == 30
