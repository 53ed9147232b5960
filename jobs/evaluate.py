"""Answers every query in each arm of evaluate.arms, and scores it.

    python -m jobs.evaluate configs/space.yaml [section.field=value ...]
    ray job submit --working-dir . -- python jobs/evaluate.py configs/space.yaml workspace=/shared/workspace

Arguments and output are those of `ragtune evaluate`.
"""

import sys

from ragtune_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
