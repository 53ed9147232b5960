"""Opens the generator that a config names, and runs a causal language model of transformers in this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator as Stream
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, Unpack

import torch

from ragtune_ray import config
from ragtune_ray.generation import shared_prefixes
from ragtune_ray.generation.chat import ChatTokenizer, end_tokens
from ragtune_ray.generation.decoding import DecodingBatch, batch_context_tokens, check_architecture
from ragtune_ray.generation.interface import Completion, DecodingOptions, Finish, GeneratorError, Prompt
from ragtune_ray.generation.lora import Adapters
from ragtune_ray.generation.openai_client import OpenAIGenerator
from ragtune_ray.generation.row import Row, failed_completion, to_rows
from ragtune_ray.generation.sampling import choose_tokens
from ragtune_ray.generation.shared_prefixes import IGNORED, num_common, prefix_cache
from ragtune_ray.models import loading, weights
from ragtune_ray.models.hardware import Precision, choose_device, resolve_precision
from ragtune_ray.models.packing import pack

if TYPE_CHECKING:
    from ragtune_ray.generation.vllm_generator import VllmGenerator

_logger = logging.getLogger(__name__)
_PREFIX_SHARE = 4  # beginnings kept: at most one part in four of `batch_tokens`
_SYSTEM_TEXTS = 64  # of which the tokens are remembered
_FORWARD_TOKENS = {"cpu": 512, "cuda": 16384}  # padded tokens per prefill pass; on a CPU larger passes gain 10 %


AnyGenerator: TypeAlias = "TransformersGenerator | VllmGenerator | OpenAIGenerator"


class OpenedGenerator(NamedTuple):
    """A generator that is ready to answer, and what identifies its answers."""

    generator: AnyGenerator
    fingerprint: str
    """Of the model's files; with engine `openai`, the server's name for the model."""


def open_generator(settings: config.Config, model: str | None = None) -> OpenedGenerator:
    """Find and load the model that a config names (or `model`, if given), or connect to its server with engine `openai`.

    Raises:
        weights.ModelError: the model cannot be found, fetched or loaded.
        GeneratorError: this engine cannot run the model, or the server's API key is missing.
    """
    if settings.generator.engine == "openai":
        return OpenedGenerator(load_generator(settings.generator, None), settings.generator.model)
    found = weights.resolve(settings.generator.model if model is None else model)
    return OpenedGenerator(load_generator(settings.generator, found.directory), found.fingerprint)


def load_generator(settings: config.Generator, directory: Path | None) -> AnyGenerator:
    """Load a model from its local directory; with engine `openai`, where `directory` is None, connect to the server.

    Raises:
        weights.ModelError: the model cannot be loaded.
        GeneratorError: the directory or the key is missing, or the model cannot be run.
    """
    match settings.engine:
        case "transformers" | "vllm":
            if directory is None:
                raise GeneratorError(f"generator.engine={settings.engine} needs the model's directory, none was given")
            if settings.engine == "vllm":
                from ragtune_ray.generation.vllm_generator import VllmGenerator

                return VllmGenerator(directory, settings)
            return TransformersGenerator(directory, precision=settings.precision, batch_tokens=settings.batch_tokens)
        case "openai":
            return OpenAIGenerator(
                settings.base_url,
                settings.model,
                api_key_env=settings.api_key_env,
                concurrency=settings.concurrency,
                timeout_seconds=settings.timeout_seconds,
                max_attempts=settings.max_attempts,
            )


class TransformersGenerator:
    """A causal language model in this process.

    Args:
        directory: config, tokenizer and safetensors weights, as transformers saves them.
        precision: `auto` is bfloat16 if the hardware supports it, else float32.
        batch_tokens: limit for a batch: rows times (longest prompt + `max_new_tokens`).
        device: a torch device; `auto` is the GPU if there is one, else the CPU.

    Attributes:
        end_tokens: token ids that end an answer.

    Raises:
        weights.ModelError: the directory contains no such model, or lacks tensors of it.
        GeneratorError: this engine cannot run its architecture.
    """

    def __init__(self, directory: Path, *, precision: Precision, batch_tokens: int, device: str = "auto") -> None:
        self.device = choose_device(device)
        self._batch_tokens = batch_tokens
        self._forward_tokens = min(_FORWARD_TOKENS["cuda" if self.device.startswith("cuda") else "cpu"], batch_tokens)
        tokenizer = loading.load_tokenizer(directory)
        model = loading.load_causal_model(directory, resolve_precision(precision, self.device), "sdpa")
        check_architecture(model.config)
        self._model = model.to(self.device).eval()
        # Packed layers round differently in passes of other shapes. In bfloat16 that changes texts, so each prompt is prefilled
        # alone; see `decoding`.
        is_coarse = self._model.dtype == torch.bfloat16
        self._prefill_tokens = 0 if pack(self._model) and is_coarse else self._forward_tokens
        self.context_tokens = batch_context_tokens(model.config)
        self.end_tokens = end_tokens(self._model.generation_config, tokenizer)
        self._chat = ChatTokenizer(tokenizer)
        self._pad_token = int(tokenizer.pad_token_id or 0)
        self._prefixes = prefix_cache(self._model, batch_tokens // _PREFIX_SHARE)
        self._system_ids: dict[str, list[int]] = {}

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text, exactly as `generate` counts a rendered prompt."""
        return self._chat.count_tokens(texts)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Messages (role, content) in the model's chat template; see `ChatTokenizer.render`."""
        return self._chat.render(messages)

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text, without special tokens."""
        return self._chat.decode(ids)

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[DecodingOptions]) -> list[Completion]:
        """One completion per prompt, in the same order; it has an `error` if the prompt is empty, too long or fails.

        Rows are sorted by length and cut into batches of `batch_tokens`. A batch that fails (out of memory, for example)
        is halved and retried. For the influence of the batch on a text see `decoding`.
        """
        rows, completions = self._rows(prompts, **options)
        for batch in _batches(rows, self._batch_tokens):
            completions.update(self._complete(batch))
        return [completions[index] for index in range(len(prompts))]

    def stream(self, prompt: Prompt, **options: Unpack[DecodingOptions]) -> Stream[str, None, Finish]:
        """Yield the text that `generate` returns for this prompt in pieces of whole characters; return why it ended.

        Raises:
            GeneratorError: the prompt is empty or too long.
        """
        row = self.to_row(prompt, **options)
        shown = 0
        for _ in self._decode([row], watch=True):
            if len(row.text) > shown:
                yield row.text[shown:]
                shown = len(row.text)
        assert row.finish is not None
        return row.finish

    def to_row(self, prompt: Prompt, **options: Unpack[DecodingOptions]) -> Row:
        """Tokenize a prompt for a batch of `open_batch`; raises GeneratorError if it is empty or too long."""
        rows, failed = self._rows([prompt], **options)
        if failed:
            raise GeneratorError(failed[0].error)
        return rows[0]

    def open_batch(self, max_rows: int) -> DecodingBatch:
        """An empty batch that at most `max_rows` rows may join, within `batch_tokens`."""
        return DecodingBatch(
            self._model, [], 0, self._prefill_tokens, max_rows, self._batch_tokens, prefixes=self._prefixes
        )

    def load_adapters(self, directories: Mapping[str, Path]) -> Adapters:
        """Load LoRA adapters (name -> directory) for this model; batches that apply none compute the same bits as before."""
        return Adapters(self._model, directories)

    @torch.inference_mode()
    def log_likelihood(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[float, int]]:
        """For each answer, the sum of ln p over its tokens given its prompt, and the number of those tokens.

        An answer is tokenized by itself and follows its rendered prompt directly. No end token is added. An empty answer
        yields (0.0, 0).

        Raises:
            GeneratorError: a prompt is empty, or prompt and answer exceed the model's context.
        """
        prompt_ids, answer_ids = self._chat.encode_pairs(prompts, answers, self.context_tokens)
        nonempty = [index for index, ids in enumerate(answer_ids) if ids]
        values = self._answer_sums([prompt_ids[index] for index in nonempty], [answer_ids[index] for index in nonempty])
        sums = dict(zip(nonempty, values, strict=True))
        return [(sums.get(index, 0.0), len(ids)) for index, ids in enumerate(answer_ids)]

    def _answer_sums(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        """The sum of ln p of each answer, none empty; a beginning that prompts share is computed once."""
        sums = torch.zeros(len(prompts), dtype=torch.float64)
        for groups in shared_prefixes.batches(self._model, prompts, answers, self._forward_tokens):
            piece = shared_prefixes.collate(prompts, answers, groups, self._pad_token)
            logits = shared_prefixes.logits(self._model, {name: value.to(self.device) for name, value in piece.items()})
            for place, group in enumerate(groups):  # one by one: float32 logits of a whole batch may not fit in memory
                labelled = (piece["labels"][place] != IGNORED).nonzero().flatten()
                scores = logits[place, -len(labelled) :].float()
                tokens = piece["labels"][place, labelled].to(scores.device)
                each = (scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(1)).double().cpu()
                sums.index_add_(0, torch.tensor(group)[piece["segments"][place, labelled] - 1], each)
        return sums.tolist()

    def _rows(
        self, prompts: Sequence[Prompt], **options: Unpack[DecodingOptions]
    ) -> tuple[list[Row], dict[int, Completion]]:
        encoded = self._chat.encode([self.render(prompt.messages) for prompt in prompts])
        rows, failed = to_rows(encoded, self.context_tokens, **options)
        for row in rows:
            row.num_shared = self._num_shared(prompts[row.index].messages, row.ids)
        return rows, failed

    def _num_shared(self, messages: Sequence[tuple[str, str]], ids: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that only its system message decides; 0 if they are too few to be kept."""
        if self._prefixes is None or not messages or messages[0][0] != "system":
            return 0
        text = messages[0][1]
        if text not in self._system_ids:
            # The tokens that do not change with what the user says.
            one, other = self._chat.encode([self.render((("system", text), ("user", said))) for said in ("a", "9")])
            if len(self._system_ids) >= _SYSTEM_TEXTS:
                self._system_ids.clear()
            self._system_ids[text] = one[: num_common(one, other)]
        found = num_common(self._system_ids[text], ids[:-1])
        return found if self._prefixes.pays(found) else 0

    def _complete(self, batch: Sequence[Row]) -> dict[int, Completion]:
        started = time.perf_counter()
        try:
            for _ in self._decode(batch, watch=any(row.stop for row in batch)):
                pass
        except (RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
            if len(batch) == 1:
                return {batch[0].index: failed_completion(len(batch[0].ids), f"{type(error).__name__}: {error}")}
            _logger.warning("a batch of %d prompts failed (%s); halving it", len(batch), error)
            fresh = [row.fresh() for row in batch]
            half = len(fresh) // 2
            return self._complete(fresh[:half]) | self._complete(fresh[half:])
        seconds = (time.perf_counter() - started) / len(batch)
        return {row.index: row.completion(seconds) for row in batch}

    def _decode(self, batch: Sequence[Row], *, watch: bool) -> Iterator[None]:
        """Generate until every row of the batch is finished; yield after each token. For `watch` see `Row.append`."""
        alive = list(batch)
        room = max(row.room for row in alive)
        decoding = DecodingBatch(
            self._model,
            [row.ids for row in alive],
            room,
            self._prefill_tokens,
            prefixes=self._prefixes,
            num_shared=[row.num_shared for row in alive],
        )
        while True:
            for row, token in zip(alive, choose_tokens(decoding.logits, alive), strict=True):
                if token is None:
                    raise GeneratorError("the model's logits are not numbers")
                row.append(token, self.end_tokens, self.decode, watch=watch)
            yield
            for place in reversed(range(len(alive))):
                if alive[place].finish is not None:
                    decoding.drop(place)
                    alive[place] = alive[-1]
                    alive.pop()
            if not alive:
                return
            decoding.step(torch.tensor([row.generated[-1] for row in alive]))


def _batches(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Batches of at most `batch_tokens`, longest rows first, so that memory runs out early or never.

    All batches have about the same number of rows: a small last batch would read all weights for a few rows.
    """
    ordered = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    fewest = sum(1 for _ in _greedy_batches(ordered, batch_tokens, len(ordered)))
    yield from _greedy_batches(ordered, batch_tokens, -(-len(ordered) // fewest) if fewest else 0)


def _greedy_batches(rows: list[Row], batch_tokens: int, most_rows: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    widest = 0
    for row in rows:
        wide = max(widest, len(row.ids) + row.room)
        if batch and (wide * (len(batch) + 1) > batch_tokens or len(batch) == most_rows):
            yield batch
            batch, wide = [], len(row.ids) + row.room
        batch.append(row)
        widest = wide
    if batch:
        yield batch
