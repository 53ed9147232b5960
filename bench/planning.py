"""Measures how long planning an input takes, and its memory: a folder of small files, and one file of JSON lines.

    python -m bench.planning --files 100000 --lines 1000000

Planning lists; it opens no file, so that a file of JSON lines costs nothing however long it is. Each row of the table is a
process of its own; its memory is the peak of the resident set, less that of planning a single file.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ragtune_ray.ingest import input_units

FILES_PER_FOLDER, FILE_BYTES, LINE_BYTES = 1000, 150, 200


def main() -> None:
    """Write the inputs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        one, many, lines = Path(folder, "one"), Path(folder, "many"), Path(folder, "lines")
        write_files(one, 1)
        write_files(many, options.files)
        write_lines(lines, options.lines)
        least = _in_process(one)["peak_bytes"]
        print("| input | planned in | units | fingerprint | peak memory |")
        print("|---|---|---|---|---|")
        for name, path in ((f"{options.files:,} files", many), (f"{options.lines:,} lines of JSONL", lines)):
            found = _in_process(path)
            grown = max(0.0, found["peak_bytes"] - least) / 2**20
            seconds = f"{found['plan_seconds']:.2f} s | {found['units']:.0f} | {found['fingerprint_seconds']:.2f} s"
            print(f"| {name} | {seconds} | {grown:.0f} MiB |")


def measured(path: str) -> dict[str, float]:
    """Plan an input in this process and return what it took."""
    started = time.perf_counter()
    plan = input_units.plan_units(path)
    planned = time.perf_counter()
    input_units.input_fingerprint(plan)
    return {
        "plan_seconds": planned - started,
        "fingerprint_seconds": time.perf_counter() - planned,
        "units": len(plan.units),
        "files": len(plan.files),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def write_files(folder: Path, count: int) -> None:
    """Write small text files, a thousand in a folder."""
    for number in range(count):
        if number % FILES_PER_FOLDER == 0:
            (folder / f"{number // FILES_PER_FOLDER:05}").mkdir(parents=True)
        place = folder / f"{number // FILES_PER_FOLDER:05}" / f"document-{number:07}.txt"
        place.write_text("x" * FILE_BYTES, encoding="utf-8")


def write_lines(folder: Path, count: int) -> None:
    """Write one file of JSON lines."""
    folder.mkdir()
    with (folder / "corpus-of-lines.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"id": number, "text": "x" * LINE_BYTES}) + "\n")


def _in_process(path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.planning", "--measure", str(path)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


if __name__ == "__main__":
    main()
