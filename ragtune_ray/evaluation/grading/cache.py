"""Keeps grades in the workspace, by the content of what was graded, so that nothing is graded, or paid, twice.

`grades/IDENTITY/` has the grades of one grader, in files of JSON lines. A file is written once, under a name of its own, and
appears whole: runs at the same time do not disturb each other, and a killed run keeps what it wrote.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping
from typing import Any

from ragtune_ray import progress
from ragtune_ray.evaluation.grading.task import Grade, grade_from
from ragtune_ray.storage import checksums, filesystem


class Grades:
    """The grades of one grader.

    Args:
        workspace: local or s3://.
        identity: JSON values on which its grades depend, beside the task.
    """

    def __init__(self, workspace: str, identity: Mapping[str, Any]) -> None:
        self.folder = filesystem.join(workspace, "grades", checksums.digest(identity))
        self._identity = identity
        self._is_named = False  # listing the folder before each file would take a request per file

    def read(self) -> dict[str, Grade]:
        """Task key -> grade. A line that cannot be read is counted in a progress line and graded again."""
        found: dict[str, Grade] = {}
        damaged = []
        for name in filesystem.list_names(self.folder):
            if name.endswith(".jsonl"):
                for number, line in enumerate(
                    filesystem.read_bytes(filesystem.join(self.folder, name)).splitlines(), 1
                ):
                    try:
                        row = json.loads(line)
                        key = row.pop("key")
                        found[key] = grade_from(row)
                    except (ValueError, KeyError, TypeError, AttributeError):
                        damaged.append(f"{name}:{number}")
        if damaged:
            progress.say(
                f"grades: {len(damaged):,} lines in {self.folder} are damaged and graded again; the first: {damaged[0]}"
            )
        return found

    def write(self, graded: Mapping[str, Grade]) -> None:
        """Keep these grades, by task key; failed ones are not kept, so that the next run tries them again."""
        rows = [{"key": key, **dataclasses.asdict(grade)} for key, grade in graded.items() if not grade.error]
        if not rows:
            return
        if not self._is_named and "identity.json" not in filesystem.list_names(self.folder):
            text = json.dumps(self._identity, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
            filesystem.replace_text(filesystem.join(self.folder, "identity.json"), text)
        self._is_named = True
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        filesystem.replace_text(filesystem.join(self.folder, f"{uuid.uuid4().hex}.jsonl"), lines)
