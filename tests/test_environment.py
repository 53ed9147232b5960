"""The command where the surroundings are poor: a terminal of Western letters, the locale C, no home directory, an odd time zone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.support.processes import ROOT

DRIVER = """
import json, sys
from ragtune_ray import cli
for arguments in json.loads(sys.argv[1]):
    try:
        cli.main(arguments)
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)
"""


def test_an_index_is_built_and_described_whatever_the_surroundings(tmp_path: Path) -> None:
    surroundings = {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1", "TERM": "dumb", "TZ": "Pacific/Apia"}
    surroundings["HOME"] = "/dev/null/nobody"  # nothing can be created there, not even by root
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "嫦娥.md").write_text("# 嫦娥四号\n\n嫦娥四号在月球背面着陆。\n", encoding="utf-8")
    settings = {"workspace": str(tmp_path / "w"), "corpus": {"path": str(corpus)}, "encoder": {"model": "hashing-32"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    config = str(tmp_path / "c.yaml")
    commands = [["index", config], ["versions", config], ["index", "delete", config, "嫦娥.md"], ["diff", config, "1"]]
    kept = ("PATH", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | surroundings
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode("latin-1")
    assert "  \\u5ae6\\u5a25.md" in done.stdout.decode("latin-1").splitlines()
    assert "Traceback" not in done.stderr.decode("latin-1")


def test_text_files_of_the_package_are_opened_with_their_encoding() -> None:
    """Without one, Python takes the locale's, and a file written on one machine is garbage on another."""
    import ast

    wrong = []
    for path in (ROOT / "ragtune_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            is_pathlib = name in ("read_text", "write_text") and not owner.endswith(("filesystem", "resources"))
            modes = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            is_open = (
                name == "open" and (owner == "" or "path" in owner.lower()) and not {"b", "x"} & set("".join(modes))
            )
            if is_pathlib or is_open:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []
