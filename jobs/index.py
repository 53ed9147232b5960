"""Indexes the corpus: documents -> passages -> embeddings -> a new index version.

    python -m jobs.index configs/space.yaml [section.field=value ...]
    ray job submit --working-dir . -- python jobs/index.py configs/space.yaml workspace=/shared/workspace

Arguments and output are those of `ragtune index`.
"""

import sys

from ragtune_ray.cli import main

if __name__ == "__main__":
    main(["index", *sys.argv[1:]])
