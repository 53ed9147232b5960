"""What is published: extras, requirements, hints that install them, and the bill of materials."""

import ast
import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {name: list(map(Requirement, texts)) for name, texts in PROJECT["optional-dependencies"].items()}
SOURCES = sorted((ROOT / "ragtune_ray").rglob("*.py"))


def test_the_extra_all_has_every_extra_for_users_and_dev_has_all() -> None:
    (everything,) = EXTRAS["all"]
    # vLLM pins versions of its own, of other builds for GPUs and CPUs.
    assert everything.extras == EXTRAS.keys() - {"all", "dev", "vllm"}
    assert {"all"} in [requirement.extras for requirement in EXTRAS["dev"]]


def test_every_imported_library_is_a_declared_requirement() -> None:
    """A library that only development or another library installs would be missing from a user's environment."""
    declared = {
        canonicalize_name(requirement.name)
        for requirement in [
            *map(Requirement, PROJECT["dependencies"]),
            *(requirement for name, each in EXTRAS.items() if name != "dev" for requirement in each),
        ]
    }
    distributions = importlib.metadata.packages_distributions()
    imported = {
        name.partition(".")[0]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    outside = imported - set(sys.stdlib_module_names) - {"ragtune_ray"}
    undeclared = {
        name for name in outside if not {canonicalize_name(each) for each in distributions.get(name, [])} & declared
    }
    # Ray Data installs pandas; where it is missing, `to_pandas` says so. The next two are parts of pydantic and mcp. vLLM is
    # declared, but not installed here.
    assert "vllm" in declared
    assert sorted(undeclared - {"pandas", "pydantic_core", "mcp_types", "vllm"}) == []


def test_no_hint_needs_this_package_on_an_index() -> None:
    """`pip install 'ragtune-ray[pdf]'` fails where ragtune-ray comes from a clone; `extras.install_command` does not."""
    wrong = [path.name for path in SOURCES if re.search(r"pip install '?ragtune-ray", path.read_text(encoding="utf-8"))]
    assert wrong == []


def test_the_bill_of_materials_is_in_step_with_the_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line for line in lines if line and not line.startswith("#")}
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (\S+) \| .+ \| (?:runtime|extras|development) \|$", page, re.MULTILINE)
    bill = json.loads((ROOT / "deploy" / "sbom.cdx.json").read_text(encoding="utf-8"))
    advice = "run: python deploy/bill.py"
    assert {f"{name}=={version}" for name, version in rows} == pins, advice
    assert {f"{each['name']}=={each['version']}" for each in bill["components"]} == pins, advice


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_classifiers_name_the_versions_of_python(version: str) -> None:
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
