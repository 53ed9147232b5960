"""The house law: three floors, imports only downward, Ray only in cluster/, thin imports; and the README's list of modules."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ragtune_ray"

# Lowest first: a module imports only modules above it in this list.
ORDER = [
    "config",
    "schema",
    "failpoints",
    "checksums",
    "filesystem",
    "storage",
    "models",
    "pairs",
    "model_card",
    "progress",
    "hardware",
    "packing",
    "abstention",
    "parsers",
    "rows",
    "inputs",
    "parquet",
    "planning",
    "readers",
    "queries",
    "splitting",
    "chunking",
    "encoder",
    "words",
    "lexical",
    "selection",
    "index",
    "vectors",
    "calibration",
    "segments",
    "versions",
    "contents",
    "snapshot",
    "retention",
    "retriever",
    "citations",
    "prompts",
    "completion",
    "chat",
    "sampling",
    "key_values",
    "decoding",
    "adapters",
    "openai_client",
    "shared_prefixes",
    "generator",
    "request",
    "running",
    "continuous",
    "passthrough",
    "answering",
    "asking",
    "examples",
    "batching",
    "objectives",
    "encoder_objectives",
    "query_side_objective",
    "joint_objective",
    "fitting",
    "trainable",
    "metrics",
    "scoring",
    "routing",
    "pseudo_labels",
    "teaching",
    "intervals",
    "significance",
    "costs",
    "decision",
    "adaptive",
    "gates",
    "ledger",
    "side_by_side",
    "probing",
    "forecast",
    "comparison",
    "comparison_table",
    "plots",
    "report",
    "display",
    "comparison_display",
    "verification",
    "api",
    "responses",
    "access",
    "sanitizing",
    "following",
    "backend",
    "telemetry",
    "admission",
    "gatekeeping",
    "gateway",
    "routes",
    "cluster.session",
    "cluster.stages",
    "cluster.reading",
    "cluster.embedding",
    "cluster.structures",
    "cluster.building",
    "cluster.compaction",
    "cluster.corpus",
    "cluster.updates",
    "cluster.questions",
    "cluster.generating",
    "cluster.runs",
    "cluster.scatter",
    "cluster.retrieval",
    "cluster.answers",
    "cluster.example_units",
    "cluster.preparation",
    "cluster.feeding",
    "cluster.training_worker",
    "cluster.training",
    "cluster.evaluation",
    "cluster.calibrating",
    "cluster.latency",
    "cluster.freshness",
    "cluster.measuring",
    "cluster.judging",
    "cluster.rounds",
    "cluster.labelling",
    "cluster.tuning",
    "cluster.comparing",
    "cluster.doctor",
    "cluster.replicas",
    "cluster.retriever_replica",
    "cluster.generator_replica",
    "cluster.ingress",
    "cluster.service",
    "cli",
]


def _modules() -> dict[str, Path]:
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_list_of_modules_is_the_folder() -> None:
    assert sorted(ORDER) == sorted(_modules())


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_those_before_it(name: str) -> None:
    later = {f"ragtune_ray.{module}" for module in ORDER[ORDER.index(name) :]}
    assert not _imports(_modules()[name]) & later


@pytest.mark.parametrize("name", [module for module in ORDER if not module.startswith("cluster.")])
def test_ray_is_imported_in_the_cluster_floor_and_nowhere_else(name: str) -> None:
    assert not {module for module in _imports(_modules()[name]) if module == "ray" or module.startswith("ray.")}


@pytest.mark.parametrize(
    "statement", ["import ragtune_ray.config", "import ragtune_ray.cli", "import ragtune_ray.schema"]
)
def test_config_and_command_load_neither_torch_nor_ray(statement: str) -> None:
    heavy = "{'torch', 'ray', 'faiss', 'transformers'} & set(sys.modules)"
    code = f"import sys; {statement}; print({heavy})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_readme_lists_the_modules_in_this_order() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("<!-- modules -->")[1]
    listed = re.findall(r"^ {2,}(\w+)\.py\b", block, re.MULTILINE)
    assert listed == [module.rsplit(".", 1)[-1] for module in ORDER]


def test_no_module_unpickles_or_trusts_remote_code() -> None:
    forbidden = re.compile(r"\bpickle\b\.|trust_remote_code=True|allow_pickle=True|torch\.load\(|\beval\(|\bexec\(")
    for name, path in _modules().items():
        assert not forbidden.search(path.read_text(encoding="utf-8").replace(".eval()", "")), name
