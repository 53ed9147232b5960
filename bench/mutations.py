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
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ragtune_ray"
DECISION = ("decision", "verdict", "significance", "intervals", "halving", "adaptive", "reasons", "retrieval_fit")

ROOMS: dict[str, tuple[list[str], list[str]]] = {
    "storage": (["storage/*.py"], ["tests/storage", "tests/index/test_versions.py", "tests/index/test_retention.py"]),
    "index": (["index/*.py"], ["tests/index"]),
    "serving": (["serving/*.py"], ["tests/serving", "tests/cluster/serving/test_ingress.py"]),
    "training": (["training/*.py", "training/objectives/*.py"], ["tests/training"]),
    "decision": ([f"evaluation/{name}.py" for name in DECISION], ["tests/evaluation"]),
}
"""Per room: the modules that are broken, and the tests that should notice."""


@dataclass(frozen=True, slots=True)
class Known:
    """How the tests of a room end without a break."""

    failing: list[str]
    limit_seconds: float


SWAPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
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


def caught_by(tree: Path, mutation: Mutation, known: Known) -> str:
    """The first test that fails with this break, "time-out", or "" if all pass."""
    broken = tree / mutation.path
    sound = broken.read_text(encoding="utf-8")
    broken.write_text(mutation.source, encoding="utf-8")
    try:
        module = Path(mutation.path).stem
        named = sorted(
            str(path.relative_to(tree)) for path in tree.glob(f"{ROOMS[mutation.room][1][0]}/**/test_{module}.py")
        )
        deselected = [f"--deselect={test}" for test in known.failing]
        failed = _failed_tests(tree, ["-x", *deselected, *named, *ROOMS[mutation.room][1]], known.limit_seconds)
        return ", ".join(failed)
    finally:
        broken.write_text(sound, encoding="utf-8")


def _failed_tests(tree: Path, arguments: list[str], limit_seconds: float) -> list[str]:
    """Run tests that are not slow; the names of those that fail."""
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "--timeout=300"]
    command = [sys.executable, "-B", "-m", "pytest", *options, *arguments]
    try:
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=limit_seconds, check=False)
    except subprocess.TimeoutExpired:
        return ["time-out"]
    if done.returncode == 0:
        return []
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE) or [f"pytest: exit code {done.returncode}"]


def main() -> None:
    """Draw breaks, try each, and print a row per break as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=40, help="breaks in all, as many in each room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", default=",".join(ROOMS))
    parser.add_argument("--list", action="store_true", help="only print the draw")
    given = parser.parse_args()
    rooms = given.rooms.split(",")
    source = random.Random(given.seed)
    drawn = [
        each for room in rooms for each in source.sample(list(mutations(room)), max(1, given.number // len(rooms)))
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
    known: dict[str, Known] = {}
    for room in dict.fromkeys(each.room for each in drawn):
        started = time.monotonic()
        failing = _failed_tests(tree, ROOMS[room][1], 3600)
        seconds = time.monotonic() - started
        known[room] = Known(failing, 60 + 4 * seconds)
        left_out = f"; left out, since they fail without a break: {', '.join(failing)}" if failing else ""
        print(f"{room}: {seconds:.0f} s{left_out}", flush=True)
    print("\n| place | before | after | caught by |\n|---|---|---|---|", flush=True)
    num_caught = 0
    for each in drawn:
        found = caught_by(tree, each, known[each.room])
        num_caught += bool(found)
        row = (f"{each.path}:{each.line}", f"`{each.before}`", f"`{each.after}`", found or "**survived**")
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |", flush=True)
    print(f"\n{num_caught} of {len(drawn)} caught")


if __name__ == "__main__":
    main()
