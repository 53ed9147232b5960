"""Measures the peak memory of every process while a large JSONL file is indexed.

    python -m bench.memory --megabytes 1000

The file is generated (Zipf-like vocabulary, one document of about 1,000 characters per line) and indexed with the
hashing encoder. The benchmark reads the resident set of the command and its child processes five times per second.
Shared memory that a process maps counts for that process too, so the figures are upper bounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import yaml

SAMPLES_PER_SECOND = 5


def main() -> None:
    """Index a generated file and print the largest processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--encoder", default="hashing-384")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        corpus = Path(folder) / "corpus.jsonl"
        rows = write_corpus(corpus, options.megabytes * 10**6)
        config = Path(folder) / "config.yaml"
        settings = {
            "workspace": f"{folder}/workspace",
            "corpus": {"path": str(corpus)},
            "encoder": {"model": options.encoder},
        }
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "ragtune_ray.cli", "index", str(config)])
        peaks: dict[str, int] = {}
        watch = threading.Thread(target=_watch, args=(process, peaks))
        watch.start()
        status = process.wait()
        watch.join()
        print(
            f"{corpus.stat().st_size / 1e6:.0f} MB, {rows} documents, exit {status}, {time.perf_counter() - started:.0f} s"
        )
        for name, peak in sorted(peaks.items(), key=lambda item: -item[1])[:8]:
            print(f"{peak / 2**30:6.2f} GiB  {name}")


def write_corpus(path: Path, num_bytes: int) -> int:
    """Write documents until the file has `num_bytes` and return their number."""
    source = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    words = np.array(
        ["".join(letters[np.minimum(source.geometric(0.12, source.integers(2, 10)) - 1, 25)]) for _ in range(50_000)]
    )
    rows = written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            picked = words[np.minimum(source.zipf(1.15, size=(500, 165)) - 1, len(words) - 1)]
            for row in picked:
                sentences = ". ".join(" ".join(part) for part in np.array_split(row, 11))
                written += file.write(json.dumps({"document_id": f"d{rows}", "text": f"{sentences}."}) + "\n")
                rows += 1
    return rows


def _watch(process: subprocess.Popen[bytes], peaks: dict[str, int]) -> None:
    """Record the largest resident set per process name until the command ends."""
    top = psutil.Process(process.pid)
    while process.poll() is None:
        for each in [top, *top.children(recursive=True)]:
            try:
                name = " ".join(each.cmdline())[:60] or each.name()
                peaks[name] = max(peaks.get(name, 0), each.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        time.sleep(1 / SAMPLES_PER_SECOND)


if __name__ == "__main__":
    main()
