"""Calibrate when an arm may answer without retrieval, on the validation questions.

    python -m jobs.calibrate configs/space.yaml answer.arm=rag [section.field=value ...]
    ray job submit --working-dir . -- python jobs/calibrate.py configs/space.yaml workspace=/shared/workspace

The arguments and the last line of the output are those of `ragtune calibrate`.
"""

import sys

from ragtune_ray.cli import main

if __name__ == "__main__":
    main(["calibrate", *sys.argv[1:]])
