"""Estimates what indexing the corpus would take: documents, passages, bytes, time, cost.

    python -m jobs.plan configs/space.yaml [section.field=value ...]
    ray job submit --working-dir . -- python jobs/plan.py configs/space.yaml workspace=/shared/workspace

Arguments and output are those of `ragtune plan`.
"""

import sys

from ragtune_ray.cli import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])
