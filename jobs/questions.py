"""Writes questions about the documents of the index.

    python -m jobs.questions configs/space.yaml questions.count=50 [section.field=value ...]
    ray job submit --working-dir . -- python jobs/questions.py configs/space.yaml workspace=/shared/workspace

Arguments and output are those of `ragtune questions`.
"""

import sys

from ragtune_ray.cli import main

if __name__ == "__main__":
    main(["questions", *sys.argv[1:]])
