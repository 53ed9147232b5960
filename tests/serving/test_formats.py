"""Server-sent events: one line of JSON, for every client's idea of a line."""

import json

from ragtune_ray.serving import formats


def test_no_character_of_a_text_ends_the_line_of_an_event() -> None:
    value = {"a": "".join(map(chr, range(0x2030))) + "月\U0001f311"}
    sent = formats.event(value).decode()
    (line, _) = sent.splitlines()
    assert json.loads(line.removeprefix("data: ")) == value
    assert "月" in line, "other characters are not escaped"
