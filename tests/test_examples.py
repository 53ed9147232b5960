"""The notebook of `examples/` runs from its first cell to its last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"

RUNNER = """
import json, sys

cells, changes = json.loads(sys.argv[1]), json.loads(sys.argv[2])
names = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    exec(compile(cell, f"cell {number}", "exec"), names)
    if number == 0:
        names["settings"].update(changes)
print("bars:", len(names["axes"].patches))
"""


def test_the_notebook_has_no_stored_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert [cell["outputs"] for cell in cells if cell["cell_type"] == "code" and cell["outputs"]] == []


@pytest.mark.cluster
def test_the_notebook_runs_with_tiny_models(tmp_path: Path, generator_directory: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (tmp_path / "workspace").mkdir()
    (tmp_path / "data").symlink_to(ROOT / "data")
    changes = {
        "queries.limit": 4,
        "encoder.model": "hashing-384",
        "generator.model": str(generator_directory),
        "generator.max_new_tokens": 4,
        "generator.stop": [],
        "evaluate.resamples": 200,
    }
    # As a user starts it: without what sessions of earlier tests in this process have set.
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(code), json.dumps(changes)],
        cwd=tmp_path,
        env={**own, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "The space quokka Rottnest" in run.stdout
    assert "bars: 6" in run.stdout
    assert (tmp_path / "workspace" / "notebook.png").stat().st_size > 1000
