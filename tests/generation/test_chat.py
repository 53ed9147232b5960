"""Chat templates that refuse some orders of roles."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ragtune_ray.generation.chat import ChatTokenizer, answer_end
from ragtune_ray.generation.interface import GeneratorError

TURNS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m.role }}={{ m.content }};{% endfor %}"
)
GEMMA = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
MISTRAL = (
    "{% if messages[0].role == 'system' %}system={{ messages[0].content }};{% set messages = messages[1:] %}{% endif %}"
    + TURNS
)


def chat_with(template: str) -> ChatTokenizer:
    tokenizer = Tokenizer(models.WordLevel({"x": 0}, "x"))
    return ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template))


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (GEMMA, [("user", "a"), ("user", "b")], "user=a\n\nb;"),
        (GEMMA, [("system", "S"), ("user", "a"), ("user", "b")], "user=S\n\na\n\nb;"),
        (GEMMA, [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")], "user=S\n\na;assistant=b;user=c;"),
        (
            GEMMA,
            [("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")],
            "user=a;assistant=b\n\nc;user=d;",
        ),
        (MISTRAL, [("system", "S"), ("user", "a"), ("user", "b")], "system=S;user=a\n\nb;"),
        ("{% for m in messages %}{{ m.content }};{% endfor %}", [("user", "a"), ("user", "b")], "a;b;"),
    ],
)
def test_consecutive_messages_are_joined_if_roles_must_alternate(template: str, messages: Any, text: str) -> None:
    assert chat_with(template).render(messages) == text


QWEN3 = (
    "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}assistant="
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
DEEPSEEK_R1 = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}assistant=<think>\n"


@pytest.mark.parametrize("template", [QWEN3, DEEPSEEK_R1])
def test_models_that_reason_are_made_to_answer_at_once(template: str) -> None:
    assert chat_with(template).render([("user", "a")]) == "user=a;assistant=<think>\n\n</think>\n\n"


LLAMA3 = "{% for m in messages %}{{ m.role }} {{ m.content | trim }} <|eot|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA3, "<|eot|>"),
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "<|eos|>"),
        ("{{ raise_exception('no') }}", "<|eos|>"),
        (None, "<|eos|>"),
    ],
)
def test_an_answer_ends_as_the_template_ends_it(template: str | None, expected: str) -> None:
    words = ["<|eot|>", "<|eos|>", "an", "answer", "x"]
    fast = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "x"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=template, eos_token="<|eos|>")
    ends = frozenset(words.index(word) for word in ("<|eot|>", "<|eos|>"))
    assert answer_end(tokenizer, ends) == words.index(expected)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for m in messages %}{{ m.__init__.__globals__ }}{% endfor %}",
        "{{ messages.append(1) }}",
        "{% for n in range(1000000000) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[99].content.x }}",
        "{{ 'a' + 1 }}",
        "{% if %}",
    ],
)
def test_a_hostile_template_runs_no_code_and_is_an_error(attack: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(GeneratorError, match="the model's chat template refuses messages of the roles user"):
        chat_with(attack.replace("CANARY", str(canary))).render([("user", "a")])
    assert not canary.exists()


def test_messages_that_the_template_refuses_are_an_error_with_their_roles() -> None:
    with pytest.raises(
        GeneratorError, match=r"roles assistant, user: .*must alternate.*begin with the user's"
    ) as caught:
        chat_with(GEMMA).render([("assistant", "secret"), ("user", "b")])
    assert "secret" not in str(caught.value)
