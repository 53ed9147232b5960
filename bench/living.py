"""Measures how an index of growing size behaves: build time per passage, time until an upsert is found, deletes.

    python -m bench.living [--sizes 10000,100000,1000000] [--kind auto]

For each size, `ragtune index` builds an index of a generated JSONL file (one passage per document, a Zipf-like
vocabulary) with the hashing encoder, which takes almost no time. Then, `--repeats` times, `ragtune index upsert` adds
100 documents in a process of its own. When it ends, a reader that has the previous version open switches to the new
version, reusing what it has loaded, and asks for one of the new documents, dense and lexical. The benchmark also
measures a query in a new process and a delete.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ragtune_ray.index import snapshot
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.storage import filesystem

DIMENSION = 384


def main() -> None:
    """Measure every size; print its row, then the ratios to the smallest size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--kind", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
            rows.append(_measure(Path(folder), size, options.kind, options.repeats))
            _show(rows[-1])
    for row in rows[1:]:
        names = ("build_ms_per_passage", "upsert_seconds", "refresh_seconds", "until_found_seconds")
        ratios = "  ".join(f"{name} {row[name] / rows[0][name]:.2f}" for name in names)
        print(f"{row['passages']:,} / {rows[0]['passages']:,}: {ratios}")


def _show(row: dict[str, Any]) -> None:
    for name, value in row.items():
        print(f"  {name:26} {value:,.4f}" if isinstance(value, float) else f"  {name:26} {value}")
    print(flush=True)


def _measure(folder: Path, size: int, kind: str, repeats: int) -> dict[str, Any]:
    source = np.random.default_rng(0)
    write_documents(folder / "corpus.jsonl", source, size, "d")
    config = folder / "config.yaml"
    settings = {
        "workspace": str(folder / "workspace"),
        "corpus": {"path": str(folder / "corpus.jsonl")},
        "encoder": {"model": f"hashing-{DIMENSION}", "unit_passages": 2048},
        "index": {"kind": kind},
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    started = time.perf_counter()
    _ragtune("index", config)
    wall = time.perf_counter() - started
    workspace = settings["workspace"]
    assert isinstance(workspace, str)
    opened = snapshot.open_index(workspace)
    manifest = opened.manifest
    found: list[dict[str, float]] = []
    encoder = HashingEncoder(f"hashing-{DIMENSION}")
    opened.vectors.search(encoder.encode_queries(["warm"]), 1, opened.alive)
    opened.lexical.search(["warm"], 1, opened.alive)
    for number in range(repeats):
        write_documents(folder / "new.jsonl", source, 100, f"new{number}-")
        started = time.perf_counter()
        _ragtune("index", "upsert", config, folder / "new.jsonl")
        upserted = time.perf_counter()
        opened = snapshot.open_index(workspace, reuse=opened)
        question = f"marker{f'new{number}-42'.replace('-', 'x')}"
        dense = opened.vectors.search(encoder.encode_queries([question]), 5, opened.alive)[1][0]
        lexical = opened.lexical.search([question], 5, opened.alive)[1][0]
        ended = time.perf_counter()
        ids = opened.passages["document_id"].take(np.concatenate([dense[:1], lexical[:1]])).to_pylist()
        assert ids[1] == f"new{number}-42", ids
        found.append({"upsert": upserted - started, "refresh": ended - upserted, "until_found": ended - started})
    started = time.perf_counter()
    _ragtune("index", "delete", config, "d5", "d6")
    deleted = time.perf_counter() - started
    started = time.perf_counter()
    fresh = (
        "import sys; from ragtune_ray.index import snapshot; "
        "snapshot.open_index(sys.argv[1]).lexical.search(['warm'], 1)"
    )
    subprocess.run([sys.executable, "-c", fresh, workspace], check=True)
    median = {name: float(np.median([each[name] for each in found])) for name in found[0]}
    return {
        "passages": manifest["num_passages"],
        "kind": manifest["index_kind"],
        "recall": str(manifest["calibration"]),
        "stages": str(manifest["seconds"]),
        "build_seconds": wall,
        "build_ms_per_passage": manifest["seconds"]["total"] * 1000 / manifest["num_passages"],
        "upsert_seconds": median["upsert"],
        "refresh_seconds": median["refresh"],
        "until_found_seconds": median["until_found"],
        "delete_seconds": deleted,
        "fresh_process_seconds": time.perf_counter() - started,
        "stored_bytes_per_passage": _stored_bytes(workspace) / manifest["num_passages"],
    }


def _stored_bytes(workspace: str) -> int:
    return sum(path.stat().st_size for path in Path(filesystem.join(workspace, "index")).rglob("*") if path.is_file())


def write_documents(path: Path, source: np.random.Generator, count: int, prefix: str) -> None:
    """Write documents of 60 words, one passage each; only document N contains the word `markerPREFIXN`."""
    words = np.array([f"w{number}" for number in range(200_000)])
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, count, 10_000):
            picked = words[np.minimum(source.zipf(1.15, size=(min(10_000, count - first), 60)) - 1, len(words) - 1)]
            for number, row in enumerate(picked, start=first):
                name = f"{prefix}{number}"
                text = f"marker{name.replace('-', 'x')} {' '.join(row)}."
                file.write(json.dumps({"document_id": name, "text": text}) + "\n")


def _ragtune(*arguments: object) -> None:
    command = [sys.executable, "-m", "ragtune_ray.cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])


if __name__ == "__main__":
    main()
