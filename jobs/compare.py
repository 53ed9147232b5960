"""Compares the arms on held-out queries, and recommends one.

    python -m jobs.compare configs/space.yaml [section.field=value ...]
    ray job submit --working-dir . -- python jobs/compare.py configs/space.yaml workspace=/shared/workspace

Arguments and output are those of `ragtune compare`.
"""

import sys

from ragtune_ray.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
