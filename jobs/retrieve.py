"""Finds the hits of every query, and scores them if the queries have qrels.

    python -m jobs.retrieve configs/space.yaml [section.field=value ...]
    ray job submit --working-dir . -- python jobs/retrieve.py configs/space.yaml workspace=/shared/workspace

Arguments and output are those of `ragtune retrieve`.
"""

import sys

from ragtune_ray.cli import main

if __name__ == "__main__":
    main(["retrieve", *sys.argv[1:]])
