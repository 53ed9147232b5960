"""Fine-tunes the generator or the retriever.

    python -m jobs.train configs/space.yaml [section.field=value ...]
    ray job submit --working-dir . -- python jobs/train.py configs/space.yaml workspace=/shared/workspace

Arguments and output are those of `ragtune train`.
"""

import sys

from ragtune_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
