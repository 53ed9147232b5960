"""The law of rooms: a room imports only rooms before it, Ray stays in `cluster/`, and imports stay light."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from ragtune_ray import RagtuneError

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ragtune_ray"

# A room imports only rooms to its left.
ORDER = (
    "config schema progress storage ingest models index generation answering evaluation training tuning serving asking"
    " cluster terminal cli"
).split()


def _modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `ragtune_ray.`; a folder's `__init__.py` has the folder's name."""
    paths = (path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__").replace("/", "."): path
        for path in paths
    }


MODULES = _modules()


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _own_imports(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    return {found.removeprefix("ragtune_ray.") for found in _imports(MODULES[name])} & set(MODULES)


def _room(module: str) -> str:
    return module.partition(".")[0]


def test_the_rooms_are_the_entries_of_the_package() -> None:
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert entries - {"__init__", "__pycache__"} == set(ORDER)
    assert len(ORDER) <= 17


def test_no_room_is_crowded() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert {folder.name: count for folder in folders if (count := len(list(folder.glob("*.py")))) > 16} == {}


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_rooms_before_it(room: str) -> None:
    allowed = set(ORDER[: ORDER.index(room) + 1])
    wrong = {
        f"{name} imports {found}"
        for name in MODULES
        if _room(name) == room
        for found in _own_imports(name)
        if _room(found) not in allowed
    }
    assert wrong == set()


def test_imports_make_no_circle() -> None:
    graph = {name: _own_imports(name) - {name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import each other in a circle: {error.args[1]}")


def test_ray_is_imported_in_cluster_alone() -> None:
    wrong = {
        name
        for name, path in MODULES.items()
        if _room(name) != "cluster" and any(found == "ray" or found.startswith("ray.") for found in _imports(path))
    }
    assert wrong == set()


@pytest.mark.parametrize("module", ["ragtune_ray", "ragtune_ray.config", "ragtune_ray.cli", "ragtune_ray.schema"])
def test_importing_package_config_or_command_loads_neither_torch_nor_ray(module: str) -> None:
    heavy = "{'torch', 'ray', 'faiss', 'transformers'} & set(sys.modules)"
    code = f"import sys; import {module}; print({heavy})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_every_room_says_what_it_is_for() -> None:
    silent = {
        name
        for name, path in MODULES.items()
        if path.name == "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    }
    assert silent == set()


def test_no_module_unpickles_or_trusts_remote_code() -> None:
    forbidden = re.compile(
        r"\bpickle\b\.|trust_remote_code=True|allow_pickle=True|\btorch\.load\(|read_pickle|weights_only|\beval\(|\bexec\("
    )
    unpicklers = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pickletools", "_pickle"}
    for name, path in MODULES.items():
        assert not forbidden.search(path.read_text(encoding="utf-8").replace(".eval()", "")), name
        assert not {found.partition(".")[0] for found in _imports(path)} & unpicklers, name


def test_every_error_class_derives_from_the_packages_base_error() -> None:
    classes = [
        (f"{name}.{node.name}", {ast.unparse(base).rpartition(".")[2] for base in node.bases})
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    raised = {"RagtuneError"}
    while more := {name.rpartition(".")[2] for name, bases in classes if bases & raised} - raised:
        raised |= more
    builtin = {"Exception", "ValueError", "RuntimeError", "TypeError", "OSError", "KeyError", "LookupError"}
    assert [name for name, bases in classes if bases & builtin and name.rpartition(".")[2] not in raised] == []
    drawn = set(re.findall(r"\w+", RagtuneError.__doc__ or ""))
    assert {name for name in raised if not name.startswith("_")} <= drawn, "the docstring of RagtuneError lists all"
    assert len(raised) > 20


def test_tests_share_helpers_through_support_alone() -> None:
    """No file imports a test module or a conftest: shared helpers are in `tests/support/`."""
    wrong = {
        f"{path.relative_to(ROOT)} imports {found}"
        for path in (ROOT / "tests").rglob("*.py")
        for found in _imports(path)
        if re.match(r"tests\.(.*\.)?(test_\w+|conftest)\b", found)
    }
    assert wrong == set()


def test_the_readme_lists_the_rooms_in_their_order() -> None:
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- rooms -->")[1]
    assert re.findall(r"^  (\w+)(?:/|\.py) ", block, re.MULTILINE) == ORDER


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_links_of_the_docs_exist(page: Path) -> None:
    text, rooms = page.read_text(encoding="utf-8"), "|".join(ORDER)
    named = re.findall(rf"(?<![\w./])((?:{rooms})/[\w/]*\w\.py)", text)
    assert [path for path in named if not (PACKAGE / path).exists()] == []
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
