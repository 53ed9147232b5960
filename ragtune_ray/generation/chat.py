"""Messages -> the text that a model reads, and its token ids, safe against control tokens spelled out in documents.

In: messages and texts. Out: rendered prompts and token ids. This module knows nothing of weights or passages.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from ragtune_ray.generation.interface import GeneratorError

__all__ = ["ChatTokenizer"]

_LOOKS_SPECIAL = re.compile(r"^[<\[].+[>\]]$")


class ChatTokenizer:
    """A transformers tokenizer with its chat template.

    Args:
        tokenizer: as `AutoTokenizer` loads it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = _special_pattern(tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The chat template applied, ending where the answer begins; "role: content" lines if the model has none.

        Special tokens spelled out in a content ("<|im_end|>") get a space after their first character, so a document
        cannot end its message and speak as the system. No messages give the empty text.

        A template that refuses the messages gets those of one role that follow each other as one, with an empty line
        between, and if it refuses that too, the system's within the first of the others.

        Raises:
            GeneratorError: the template refuses them in every form; names the roles.
        """
        if not messages:
            return ""
        chat = [{"role": role, "content": self.defused(content)} for role, content in messages]
        if not self._tokenizer.chat_template:
            lines = [f"{message['role']}: {message['content']}" for message in chat]
            return self._beginning() + "\n".join([*lines, "assistant:"])
        # Gemma's template refuses the role `system`; its and Mistral's refuse two messages of one role after another.
        for form in (chat, _joined(chat)):
            with contextlib.suppress(TemplateError):
                return self._apply_template(form)
        try:
            return self._apply_template(_joined(_system_in_user(chat)))
        except TemplateError as error:
            roles = ", ".join(role for role, _ in messages)
            raise GeneratorError(
                f"the model's chat template refuses messages of the roles {roles}: {error}; begin with the user's, let the "
                f"user's and the assistant's alternate, or choose a model with another template"
            ) from error

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; nothing is put before or after it."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def defused(self, text: str) -> str:
        """The text with every spelled-out special token broken by a space."""
        while self._special is not None and self._special.search(text):
            text = self._special.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)
        return text

    def _apply_template(self, chat: list[dict[str, str]]) -> str:
        return str(self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def _beginning(self) -> str:
        """The token that this tokenizer puts before every text, if it does."""
        bos = self._tokenizer.bos_token_id
        return (
            str(self._tokenizer.bos_token) if bos is not None and self._tokenizer("")["input_ids"][:1] == [bos] else ""
        )


def _special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches every text that the tokenizer would read as a control token."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special or _LOOKS_SPECIAL.match(token.content)}
    texts |= set(tokenizer.all_special_tokens)
    # A one-character special token has no inside to break; none is known to mark a turn.
    longest_first = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _joined(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """The chat with messages of one role that follow each other made one."""
    return [
        {"role": role, "content": "\n\n".join(message["content"] for message in messages)}
        for role, messages in itertools.groupby(chat, key=lambda message: message["role"])
    ]


def _system_in_user(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    system = "\n\n".join(message["content"] for message in chat if message["role"] == "system")
    others = [message for message in chat if message["role"] != "system"]
    if not system or not others:
        return others or chat
    first = {"role": others[0]["role"], "content": f"{system}\n\n{others[0]['content']}"}
    return [first, *others[1:]]
