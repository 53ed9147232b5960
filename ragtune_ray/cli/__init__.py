"""The `ragtune` command: `ragtune VERB CONFIG.yaml [section.field=value ...]`.

Progress goes to stderr. The last line of stdout is the path of the artifact or, with --json, one JSON object.
Exit codes: 0 done, 1 failed, 2 wrong usage or config. A verb imports what it needs, so that `ragtune --help` is fast.
"""

from ragtune_ray.cli.command import app, main

__all__ = ["app", "main"]
