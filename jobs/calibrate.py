"""Finds how confident the generator must be to skip retrieval.

    python -m jobs.calibrate configs/space.yaml answer.arm=rag [section.field=value ...]
    ray job submit --working-dir . -- python jobs/calibrate.py configs/space.yaml workspace=/shared/workspace

Arguments and output are those of `ragtune calibrate`.
"""

import sys

from ragtune_ray.cli import main

if __name__ == "__main__":
    main(["calibrate", *sys.argv[1:]])
