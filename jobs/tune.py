"""Tunes retriever and generator in rounds.

    python -m jobs.tune configs/space.yaml tune.mode=staged [section.field=value ...]
    ray job submit --working-dir . -- python jobs/tune.py configs/space.yaml tune.mode=joint workspace=/shared/workspace

Arguments and output are those of `ragtune tune`.
"""

import sys

from ragtune_ray.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
