"""Compare the arms on held-out queries, and recommend one.

    python -m jobs.compare configs/space.yaml [section.field=value ...]
    ray job submit --working-dir . -- python jobs/compare.py configs/space.yaml workspace=/shared/workspace

The arguments and the last line of the output are those of `ragtune compare`.
"""

import sys

from ragtune_ray.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
