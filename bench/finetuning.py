"""Evaluates fine-tuned models on test questions: every arm, and the tuned generator with the gold passage given.

    python -m bench.finetuning CONFIG [section.field=value ...]

Train the models (`ragtune train CONFIG ...`) and index the corpus first. The row with the gold passage shows how well
the generator answers when retrieval makes no mistake.
"""

from __future__ import annotations

import argparse

from ragtune_ray import config
from ragtune_ray.cluster import session
from ragtune_ray.cluster.answering.evaluate import evaluate
from ragtune_ray.terminal import evaluation_lines


def main() -> None:
    """Evaluate with retrieved passages, then with the gold passage, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    settings = config.load(options.config, ["queries.split=test", *options.overrides])
    with session.ray_session(settings.cluster):
        print("\n".join(evaluation_lines(str(evaluate(settings)), 0)))
        given = settings.using("evaluate.arms=[rag+ft]", "answer.arm=rag+ft", "answer.gold_passage=true")
        print("\nWith the gold passage:\n" + "\n".join(evaluation_lines(str(evaluate(given)), 0)))


if __name__ == "__main__":
    main()
