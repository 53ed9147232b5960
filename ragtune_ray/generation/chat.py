"""Renders chat messages with a model's template, and keeps documents from forging its control tokens."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from ragtune_ray.generation.interface import THINK, THINK_END, GeneratorError, Prompt

# Besides its own, a template raises what its expressions do: those of the sandbox are TemplateErrors, too.
_TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_LOOKS_SPECIAL = re.compile(r"^[<\[].+[>\]]$")


class ChatTokenizer:
    """A transformers tokenizer, as `AutoTokenizer` loads it, with its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = _special_pattern(tokenizer)
        # Models that can reason before they answer, such as Qwen3, are asked not to.
        can_choose = "enable_thinking" in str(tokenizer.chat_template)
        self._reasoning = {"enable_thinking": False} if can_choose else {}

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text, without adding special tokens."""
        return [len(ids) for ids in self.encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Apply the chat template up to where the answer begins; without a template, write "role: content" lines.

        `escape_special_tokens` is applied to every content. No messages render to the empty text.

        If the template refuses the messages, consecutive messages of one role are joined with an empty line between
        them. If it still refuses them, the system message also moves into the first other message.

        Raises:
            GeneratorError: the template refuses every form; the message names the roles.
        """
        if not messages:
            return ""
        chat = [{"role": role, "content": self.escape_special_tokens(content)} for role, content in messages]
        if not self._tokenizer.chat_template:
            lines = [f"{message['role']}: {message['content']}" for message in chat]
            return self._bos_token() + "\n".join([*lines, "assistant:"])
        # Gemma's template refuses the role `system`; Gemma's and Mistral's refuse consecutive messages of one role.
        for form in (chat, _join_consecutive(chat)):
            with contextlib.suppress(*_TEMPLATE_ERRORS):
                return self._apply_template(form)
        try:
            return self._apply_template(_join_consecutive(_system_into_first(chat)))
        except _TEMPLATE_ERRORS as error:
            roles = ", ".join(role for role, _ in messages)
            raise GeneratorError(
                f"the model's chat template refuses messages of the roles {roles}: {error}; begin with the user's "
                f"message and alternate user and assistant, or choose a model with another template"
            ) from error

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without adding special tokens."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def encode_pairs(
        self, prompts: Sequence[Prompt], answers: Sequence[str], context_tokens: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of rendered prompts, and of the answers that follow them.

        Raises:
            GeneratorError: a prompt is empty, or prompt and answer exceed `context_tokens`.
        """
        answer_ids = self.encode([self.escape_special_tokens(answer) for answer in answers])
        prompt_ids = self.encode([self.render(prompt.messages) for prompt in prompts])
        for index, (before, after) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
            if not before or len(before) + len(after) > context_tokens:
                raise GeneratorError(
                    f"prompt {index}: {len(before)} tokens and {len(after)} of the answer do not fit 1 to "
                    f"{context_tokens}; lower prompt.max_tokens"
                )
        return prompt_ids, answer_ids

    def escape_special_tokens(self, text: str) -> str:
        """Put a space after the first character of every special token that the text spells out, such as "<|im_end|>".

        Otherwise a document could end its message and begin one of the system.
        """
        while self._special is not None and self._special.search(text):
            text = self._special.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)
        return text

    def _apply_template(self, chat: list[dict[str, str]]) -> str:
        options = {"tokenize": False, "add_generation_prompt": True, **self._reasoning}
        text = str(self._tokenizer.apply_chat_template(chat, **options))
        # Some templates of models that always reason open the block, as those distilled from DeepSeek-R1.
        return f"{text.rstrip()}\n\n{THINK_END}\n\n" if text.rstrip().endswith(THINK) else text

    def _bos_token(self) -> str:
        """The token that this tokenizer puts before every text; empty if there is none."""
        bos = self._tokenizer.bos_token_id
        has_bos = bos is not None and self._tokenizer("")["input_ids"][:1] == [bos]
        return str(self._tokenizer.bos_token) if has_bos else ""


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """The token ids that end an answer, of a model's generation config and tokenizer of transformers."""
    given = generation_config.eos_token_id
    ends = set(given) if isinstance(given, list) else {given}
    return frozenset(token for token in ends | {tokenizer.eos_token_id} if token is not None)


def answer_end(tokenizer: Any, ends: frozenset[int]) -> int | None:
    """The token of `ends` that the chat template writes after an answer, else the tokenizer's; None if it has none.

    Llama 3 Instruct and Gemma 3 end a text and an answer with different tokens, and name both.
    """
    if tokenizer.chat_template:
        content = "an answer"
        chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": content}]
        with contextlib.suppress(*_TEMPLATE_ERRORS):
            _, _, rest = str(tokenizer.apply_chat_template(chat, tokenize=False)).rpartition(content)
            ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
            found = next((token for token in ids if token in ends), None)
            if found is not None:
                return int(found)
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def _special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches every text that the tokenizer would read as a special token."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special or _LOOKS_SPECIAL.match(token.content)}
    texts |= set(tokenizer.all_special_tokens)
    # A space cannot break a special token of one character, but no model is known to use one as a mark of a turn.
    longest_first = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _join_consecutive(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """The chat with consecutive messages of one role joined."""
    return [
        {"role": role, "content": "\n\n".join(message["content"] for message in messages)}
        for role, messages in itertools.groupby(chat, key=lambda message: message["role"])
    ]


def _system_into_first(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """The chat with the system message moved to the beginning of the first other message."""
    system = "\n\n".join(message["content"] for message in chat if message["role"] == "system")
    others = [message for message in chat if message["role"] != "system"]
    if not system or not others:
        return others or chat
    first = {"role": others[0]["role"], "content": f"{system}\n\n{others[0]['content']}"}
    return [first, *others[1:]]
