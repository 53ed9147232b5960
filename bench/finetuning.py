"""What fine-tuned models answer on test questions: every arm, and the tuned generator with the gold passage given.

    python -m bench.finetuning CONFIG [section.field=value ...]

The models must have been trained (`ragtune train CONFIG ...`) and the corpus indexed. The gold passage is what retrieval would
have to find: the row says how far the reader alone would come. Nothing is asserted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ragtune_ray import (
    answering,
    config,
    examples,
    generator,
    intervals,
    metrics,
    models,
    pairs,
    schema,
    snapshot,
    splitting,
)
from ragtune_ray.cluster.evaluation import evaluate, report_lines


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    settings = config.load(options.config, ["queries.split=test", *options.overrides])
    run = str(evaluate(settings))
    print("\n".join(report_lines(run, 0)))
    tuned = pairs.with_tuned_models(settings.using("answer.arm=rag+ft"))
    rows = [
        row for row in splitting.selected_queries(settings.queries) if isinstance(row, schema.Query) and row.answers
    ]
    answers = _with_gold(tuned, rows[: settings.queries.limit or None])
    scores = metrics.score_answers(rows, answers, settings.evaluate.language)
    summary = intervals.summarize(scores, settings.evaluate.resamples, settings.evaluate.confidence, settings.seed)
    print(f"\nrag+ft, the gold passage given ({len(answers)} questions)")
    for name in ("EM", "token_F1", "contains_answer"):
        print(f"{name:16} {summary[name].value:.4f} [{summary[name].low:.4f}, {summary[name].high:.4f}]")


def _with_gold(settings: config.Config, rows: Sequence[schema.Query]) -> list[schema.Answer]:
    opened = snapshot.open_index(settings.workspace)
    model = models.resolve(settings.generator.model)
    loaded = generator.load_generator(settings.generator, model.directory)
    gold = opened.of_documents([splitting.positives(row) for row in rows])
    tasks = []
    for row, ordinals in zip(rows, gold, strict=True):
        passages = tuple(opened.take(ordinals.tolist()))
        passage = examples.positive_passage(row, examples.Candidates(passages, (), ()))
        assert passage is not None
        tasks.append(answering.Task(row, (passage,), (1.0,), opened.version, ""))
    found = []
    for start in range(0, len(tasks), settings.answer.unit_queries):
        unit = tasks[start : start + settings.answer.unit_queries]
        found += answering.answer_tasks(unit, loaded, settings, model.fingerprint)
    return found


if __name__ == "__main__":
    main()
