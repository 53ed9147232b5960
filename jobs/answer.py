"""Answers every query, with citations.

    python -m jobs.answer configs/space.yaml [section.field=value ...]
    ray job submit --working-dir . -- python jobs/answer.py configs/space.yaml workspace=/shared/workspace

Arguments and output are those of `ragtune answer`.
"""

import sys

from ragtune_ray.cli import main

if __name__ == "__main__":
    main(["answer", *sys.argv[1:]])
