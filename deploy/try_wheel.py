"""Tries a built wheel outside the repository: its files, its metadata and its command.

    python deploy/try_wheel.py dist/ragtune_ray-0.1.0-py3-none-any.whl

The wheel is installed into a fresh virtual environment, which takes everything else from the environment that runs this
script: installing torch and Ray again would take minutes. The new environment does not see this repository, so a file that the
wheel lacks is missed here. A library that the wheel's requirements lack is not; `tests/test_distribution.py` finds that.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ragtune_ray"
DOCUMENTS = {
    "pump.md": "# Pump\n\nTo reset the pump, hold the red button for seven seconds.\n",
    "valve.txt": "The valve opens at a pressure of four bar.\n",
    "motor.html": "<html><head><title>Motor</title></head><body><p>The motor weighs ninety kilograms.</p></body></html>",
}


def main(wheel: Path) -> None:
    """Check the wheel's list of files, then install and use it in a temporary folder."""
    check_files(wheel)
    with tempfile.TemporaryDirectory(prefix="ragtune-wheel-") as folder:
        here = Path(folder)
        python = install(wheel, here / "environment")
        for name, text in DOCUMENTS.items():
            (here / "documents").mkdir(exist_ok=True)
            (here / "documents" / name).write_text(text, encoding="utf-8")
        place = run(here, python, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)")
        if not Path(place).is_relative_to(here):
            sys.exit(f"{place} was imported, not the wheel")
        command = python.with_name("ragtune")
        run(here, command, "--version")
        run(here, command, "init", "documents")
        run(here, command, "index", "ragtune.yaml")
        answer = run(here, command, "ask", "ragtune.yaml", "How long must the red button be held?")
        if "pump.md" not in answer:
            sys.exit(f"pump.md is not among the sources of the answer:\n{answer}")
        run(here, command, "verify", "ragtune.yaml")
    print(f"{wheel.name}: installed, and three documents indexed and asked")


def check_files(wheel: Path) -> None:
    """Compare the wheel with the files of the package in the repository."""
    tracked = subprocess.run(["git", "ls-files", PACKAGE], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith(f"{PACKAGE}/")}
    if different := packed ^ set(tracked.stdout.split()):
        sys.exit(f"{wheel.name} and the repository differ in: {', '.join(sorted(different))}")


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel alone into a new environment beside the libraries of this one; returns its Python."""
    venv.create(folder)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    # A path in a .pth file is searched after the environment's own packages, and .pth files in it have no effect: the
    # repository, if it is installed as editable there, stays invisible.
    (Path(site) / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)
    return python


def run(folder: Path, *command: str | Path) -> str:
    """Run a command in a folder without this repository on Python's path; returns what it printed last, and to stdout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if finished.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {finished.returncode}:\n{finished.stdout}{finished.stderr}")
    return finished.stdout.strip()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("name one wheel: python deploy/try_wheel.py dist/NAME.whl")
    main(Path(sys.argv[1]).resolve())
