"""How many single-line breaks of the code the fast tests notice: mutation testing.

    python -m bench.mutations [--number 40] [--seed 0] [--rooms storage,index,serving,training,decision]

The script lists all breaks that it knows in the chosen rooms (a swapped comparison, a dropped `not`, `and` for `or`, another
constant, a removed call), draws some of them by a seed, and tries each in a copy of the last commit: it changes the line and runs
the fast tests of the room until the first fails. What no test notices has *survived*: either a test is missing, or the
break changes nothing that anyone can see. Tests that take too long count as a catch, since a hang is noticed; the table says so.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ragtune_ray"
DECISION = ("decision", "verdict", "significance", "intervals", "halving", "adaptive", "reasons", "retrieval_fit")

ROOMS: dict[str, tuple[list[str], list[str]]] = {
    "storage": (["storage/*.py"], ["tests/storage", "tests/index/test_versions.py", "tests/index/test_retention.py"]),
    "index": (["index/*.py"], ["tests/index"]),
    "serving": (["serving/*.py"], ["tests/serving", "--ignore=tests/serving/openai"]),
    "training": (["training/*.py", "training/objectives/*.py"], ["tests/training"]),
    "decision": ([f"evaluation/{name}.py" for name in DECISION], ["tests/evaluation"]),
}
"""Per room: the modules that are broken, and the tests that should notice."""


SWAPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
LIMIT_SECONDS = 1800
LIBRARIES = (
    "faiss",
    "torch",
    "transformers",
    "sentence_transformers",
    "peft",
    "pyarrow.parquet",
    "fastapi",
    "hypothesis",
)
"""Imported once; the tests of each break run in a fork."""
SILENT = re.compile(r"(logger|logging|progress|warnings)\.")
"""Calls that only tell something; removing one is not drawn."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """A break of one line."""

    room: str
    path: str
    line: int
    before: str
    after: str
    """The whole line, without indentation."""
    source: str
    """The whole broken module."""


def mutations(room: str) -> Iterator[Mutation]:
    """Every break of a room, in the order of its modules and lines."""
    for pattern in ROOMS[room][0]:
        for path in sorted(PACKAGE.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            lines = text.split("\n")
            for node, broken in _breaks(ast.parse(text)):
                row = node.lineno - 1
                changed = _replaced(lines[row], node.col_offset, node.end_col_offset or 0, broken)
                source = "\n".join([*lines[:row], changed, *lines[row + 1 :]])
                place = path.relative_to(ROOT).as_posix()
                yield Mutation(room, place, node.lineno, lines[row].strip(), changed.strip(), source)


def _replaced(line: str, start: int, end: int, text: str) -> str:
    data = line.encode()  # ast counts bytes
    return (data[:start] + text.encode() + data[end:]).decode()


def _breaks(tree: ast.Module) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """The nodes that stand on one line and can be broken, each with its new text."""
    unseen = {id(each) for node in ast.walk(tree) for part in _without_effect(node) for each in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in unseen or not isinstance(node, ast.expr | ast.stmt) or node.lineno != node.end_lineno:
            continue
        broken = _broken_expression(node) if isinstance(node, ast.expr) else _broken_statement(node)
        if broken is not None:
            yield node, broken


def _without_effect(node: ast.AST) -> list[ast.AST]:
    """Parts of a node that do nothing, or nothing but tell something: annotations, decorators, messages, our own checks."""
    match node:
        case ast.AnnAssign(annotation=annotation):
            return [annotation]
        case ast.arg(annotation=ast.expr() as annotation):
            return [annotation]
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return [*node.decorator_list, *filter(None, [node.returns])]
        case ast.ClassDef(decorator_list=decorators):
            return [*decorators]
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Raise() | ast.Assert() | ast.JoinedStr():
            return [node]
        case ast.Expr(value=ast.Call(func=called)) if SILENT.match(ast.unparse(called)):
            return [node]
        case _:
            return []


def _broken_expression(node: ast.expr) -> str | None:
    node = copy.deepcopy(node)
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPPED:
            node.ops = [SWAPPED[type(op)]()]
        case ast.BoolOp(op=op):
            node.op = ast.Or() if isinstance(op, ast.And) else ast.And()
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return f"({ast.unparse(operand)})"
        case ast.BinOp(op=ast.Add(), right=ast.Constant(value=int())):
            node.op = ast.Sub()
        case ast.BinOp(op=ast.Sub(), right=ast.Constant(value=int())):
            node.op = ast.Add()
        case ast.Constant(value=bool(value)):
            return str(not value)
        case ast.Constant(value=int(value)):
            return str(value + 1)
        case ast.Constant(value=float(value)):
            return repr(value * 10 if value else 1.0)
        case _:
            return None
    return f"({ast.unparse(node)})"


def _broken_statement(node: ast.stmt) -> str | None:
    match node:
        case ast.Expr(value=ast.Call() | ast.Await()):
            return "pass"
        case ast.AugAssign(op=ast.Add()):
            return ast.unparse(node).replace("+=", "-=", 1)
        case ast.Continue() | ast.Break():
            return "pass"
        case _:
            return None


class Tests:
    """Runs the tests in a copy of the project."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._sound: set[str] = set()
        self.unsound: set[str] = set()
        """Tests that fail without any break; they catch nothing."""

    def catch(self, mutation: Mutation) -> str:
        """The first test that fails with this break and not without it, or "time-out"; "" if all pass."""
        broken = self._tree / mutation.path
        before = broken.read_text(encoding="utf-8")
        folders = ROOMS[mutation.room][1]
        named = [
            str(path.relative_to(self._tree)) for path in self._tree.glob(f"{folders[0]}/**/test_{broken.stem}.py")
        ]
        while True:
            broken.write_text(mutation.source, encoding="utf-8")
            failed = self._first_failure([*(f"--deselect={test}" for test in self.unsound), *sorted(named), *folders])
            broken.write_text(before, encoding="utf-8")
            if "::" not in failed or failed in self._sound:
                return failed
            if not self._first_failure([failed]):
                self._sound.add(failed)
                return failed
            self.unsound.add(failed)
            print(f"fails without a break, too: {failed}", file=sys.stderr, flush=True)

    def _first_failure(self, arguments: list[str]) -> str:
        """The first of these tests that fails, without those that are slow."""
        options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "--timeout=300"]
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if child == 0:
                os.setpgid(0, 0)
                for descriptor in (1, 2):
                    os.dup2(said.fileno(), descriptor)
                os.chdir(self._tree)
                sys.path[0] = str(self._tree)
                sys.dont_write_bytecode = True
                os._exit(pytest.main([*options, *arguments]))
            code = _exit_code(child)
            if code is None:
                return "time-out"
            said.seek(0)
            found = re.search(r"^(?:FAILED|ERROR) (\S+)", said.read().decode(), re.MULTILINE)
        return found[1] if found else f"pytest: exit code {code}" if code else ""


def _exit_code(child: int) -> int | None:
    """The exit code of a process; None if it was ended at the time limit."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    """Draw breaks, try each, and print a row per break as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=40, help="breaks in all, as many in each room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", default=",".join(ROOMS))
    parser.add_argument("--list", action="store_true", help="only print the draw")
    given = parser.parse_args()
    rooms = given.rooms.split(",")
    number = max(1, given.number // len(rooms))
    drawn = [
        each for room in rooms for each in random.Random(f"{given.seed} {room}").sample([*mutations(room)], number)
    ]
    if given.list:
        for each in drawn:
            print(f"{each.path}:{each.line}: {each.before}  ->  {each.after}")
        return
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree)], cwd=ROOT, check=True, capture_output=True)
        try:
            _try_all(tree, drawn)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def _try_all(tree: Path, drawn: list[Mutation]) -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    tests = Tests(tree)
    print("| place | before | after | caught by |\n|---|---|---|---|", flush=True)
    num_caught = 0
    for each in drawn:
        found = tests.catch(each)
        num_caught += bool(found)
        row = (f"{each.path}:{each.line}", f"`{each.before}`", f"`{each.after}`", found or "**survived**")
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |", flush=True)
    print(f"\n{num_caught} of {len(drawn)} caught")
    if tests.unsound:
        print(f"left out, since they fail without any break: {', '.join(sorted(tests.unsound))}")


if __name__ == "__main__":
    main()
