"""The verb `label`: people grade answers in the browser or in the terminal."""

from __future__ import annotations

import contextlib
import getpass
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ragtune_ray import progress
from ragtune_ray.cli.common import AsJson, ConfigPath, Overrides, begin, load, print_lines

if TYPE_CHECKING:
    from ragtune_ray.evaluation.labelling.desk import Desk

label_app = typer.Typer(rich_markup_mode=None)


@label_app.command()
def label(
    path: ConfigPath,
    overrides: Overrides = None,
    questions: Annotated[
        int, typer.Option(min=1, help="Questions to label in all, those of earlier sessions included.")
    ] = 50,
    labeller: Annotated[str, typer.Option(help="Who labels; default: the user's login name.")] = "",
    run: Annotated[str, typer.Option(help="Directory of a run of evaluate; default: the newest.")] = "",
    port: Annotated[int, typer.Option(help="Port of the page; 0: a free one.", min=0, max=65535)] = 0,
    terminal: Annotated[bool, typer.Option("--terminal", help="Ask here instead of in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Grade answers of all arms yourself, unnamed and in random order, to check and correct a judge."""
    settings = load(path, overrides)
    begin("label", settings, settings.queries.path)
    from ragtune_ray.cluster.comparing.labelling import open_desk

    desk = open_desk(settings, labeller.strip() or getpass.getuser(), questions, run)
    if terminal:
        ask(desk)
    else:
        from ragtune_ray.serving.local.label import app

        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            app.serve(desk, port, lambda address: progress.say(f"label: open {address} and press Ctrl-C at the end"))
    done, total = desk.num_done(), len(desk.items)
    progress.say(f"label: {done:,} of {total:,} labelled by {desk.labeller}; `ragtune compare` uses them")
    facts = {"path": str(desk.path), "labeller": desk.labeller, "done": done, "total": total}
    typer.echo(json.dumps(facts, ensure_ascii=False) if as_json else desk.path)


def ask(desk: Desk) -> None:
    """Ask in the terminal until everything is labelled or skipped, or the person ends it with q or Ctrl-D."""
    skipped, visited = set[int](), list[int]()
    place = desk.next_place()
    while place is not None:
        print_lines(_item_lines(desk, place))
        match _read_grades(len(desk.items[place].answers)):
            case "q":
                return
            case "u":
                place = visited.pop() if visited else place
                skipped.discard(place)
                continue
            case "s":
                skipped.add(place)
            case grades:
                desk.grade(place, [float(word) for word in grades.split()])
        visited.append(place)
        place = desk.next_place(skipped)
    if skipped:
        progress.say(f"label: {len(skipped)} skipped; run the same command again to label them")


def _item_lines(desk: Desk, place: int) -> Iterator[str]:
    from ragtune_ray.evaluation.comparison import printable
    from ragtune_ray.evaluation.report.plain_text import wrapped

    item = desk.items[place]
    yield f"-- {desk.num_done():,} of {len(desk.items):,} labelled"
    for source in desk.sources(item.query_id):
        yield from wrapped("source    ", printable(f"{source.title or source.document_id}: {source.text}"))
    for role, content in item.history:
        yield from wrapped(f"{role:<10}", printable(content))
    yield from wrapped("question  ", printable(item.query))
    if item.golds is not None:
        yield from wrapped("gold      ", printable(" | ".join(item.golds)) or "the documents contain no answer")
    for number, answer in enumerate(item.answers, start=1):
        yield from wrapped(f"answer {number}  ", printable(answer) or "(no answer)")


def _read_grades(num_answers: int) -> str:
    """One grade per answer, joined by spaces; or a command: s, u or q."""
    from ragtune_ray.evaluation.labelling.labels import GRADES

    words, values = ", ".join(f"{number} {word}" for number, word in enumerate(GRADES, start=1)), list(GRADES.values())
    found: list[str] = []
    while len(found) < num_answers:
        typer.echo(f"answer {len(found) + 1}: {words}; s skip, u back, q quit > ", nl=False, err=True)
        try:
            typed = input().strip().lower()
        except EOFError:
            return "q"
        if typed in ("s", "u", "q"):
            return typed
        if typed in ("1", "2", "3"):
            found.append(str(values[int(typed) - 1]))
    return " ".join(found)
