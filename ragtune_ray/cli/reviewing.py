"""Reviews questions in the terminal."""

from __future__ import annotations

from collections.abc import Callable

from ragtune_ray.evaluation.comparison import printable
from ragtune_ray.evaluation.questions.writing.review import Desk, ReviewError

KEYS = "a accept, m mend, r reject, s skip, b back, q quit"


def question_lines(desk: Desk, place: int) -> list[str]:
    """A question with its answers, evidence and passages, as lines of text."""
    row = desk.questions[place]
    lines = ["", f"{place + 1} of {len(desk.questions)}, {desk.num_done()} decided ({row['kind']})"]
    lines += [f"  {each['role']}: {each['content']}" for each in row.get("messages", [])]
    text, answers = desk.words_at(place)
    lines.append(f"Question: {text}")
    lines.append(f"Answer:   {' | '.join(answers) or 'none: no document answers it'}")
    lines += [f"Evidence: {each['text']}" for each in row["evidence"]]
    for passage in (desk.passages[name] for name in row["passage_ids"]):
        lines += ["", f"[{passage['title'] or passage['document_id']}]", passage["text"]]
    if decision := desk.decision_at(place):
        lines.append(f"({decision.verdict} by {decision.reviewer})")
    return [printable(line) for line in lines]


def review(desk: Desk, read: Callable[[str], str], say: Callable[[str], None]) -> None:
    """Show one question after the other and keep what is decided, until all are, or the person quits.

    Args:
        desk: the questions.
        read: asks for a line, like `input`; an EOFError quits.
        say: shows a line.
    """
    skipped: set[int] = set()
    seen: list[int] = []
    place = desk.next_place()
    while place is not None:
        for line in question_lines(desk, place):
            say(line)
        try:
            key = read(f"{KEYS}: ").strip().casefold()[:1]
            if key == "q":
                return
            if key == "b":
                place = seen.pop() if seen else place
                continue
            if not _decided(desk, place, key, read, say):
                continue
        except EOFError:
            return
        if key == "s":
            skipped.add(place)
        seen.append(place)
        place = desk.next_place(skipped)
        if place in skipped:
            return


def _decided(desk: Desk, place: int, key: str, read: Callable[[str], str], say: Callable[[str], None]) -> bool:
    """Do what a key says; returns whether to go on with the next question."""
    match key:
        case "a":
            desk.decide(place, "accepted")
        case "r":
            desk.decide(place, "rejected")
        case "m":
            text, answers = desk.words_at(place)
            text = read(f"Question [{text}]: ").strip() or text
            given = read(f"Answers, separated by | [{' | '.join(answers)}]: ").strip()
            answers = given.split("|") if given else answers
            try:
                desk.decide(place, "mended", text, answers)
            except ReviewError as error:
                say(str(error))
                return False
        case "s":
            return True
        case _:
            say(f"press one of: {KEYS}")
            return False
    return True
