"""Continuous batching and LoRA adapters against bulk generation, transformers and PEFT."""

import asyncio
import copy
import functools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ragtune_ray.generation import continuous, request
from ragtune_ray.generation.continuous import ContinuousGenerator
from ragtune_ray.generation.decoding import DecodingBatch
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.generation.interface import GeneratorError, Prompt
from ragtune_ray.generation.request import Overloaded, Request, RequestFailed
from ragtune_ray.generation.running_batch import RunningBatch
from ragtune_ray.models import packing
from tests.support.models import prompt_of, save_adapter, some_prompts

LONG = 1500  # tokens; the tiny model needs a second or two for them


def load(directory: Path, batch_tokens: int = 4000) -> TransformersGenerator:
    torch.set_num_threads(1)
    return TransformersGenerator(directory, precision="float32", batch_tokens=batch_tokens, device="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, generator_directory: Path) -> TransformersGenerator:
    return load(generator_directory)


@pytest.fixture(scope="module")
def endless(generator_directory: Path) -> TransformersGenerator:
    """Like `tiny`, but it never ends an answer by itself."""
    generator = load(generator_directory)
    generator.end_tokens = frozenset()
    return generator


@pytest.fixture
def start(tiny: TransformersGenerator) -> Iterator[Callable[..., ContinuousGenerator]]:
    """Starts engines, and closes them after the test."""
    started = []

    def start(generator: TransformersGenerator = tiny, **options: Any) -> ContinuousGenerator:
        started.append(ContinuousGenerator(generator, **options))
        return started[-1]

    yield start
    for engine in started:
        engine.close(0)
        assert not engine.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.001)


class Gate:
    """Blocks every step until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        step = RunningBatch.step

        def held(batch: RunningBatch) -> None:
            assert self.open.wait(60)
            step(batch)

        monkeypatch.setattr(RunningBatch, "step", held)


class Clock:
    """The time that requests see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(request, "time", self)

    def monotonic(self) -> float:
        return self.now


# The parameters of a request: prompt, longest answer, temperature, seed.
ASKED = st.tuples(st.integers(0, 7), st.integers(1, 9), st.sampled_from([0.0, 0.0, 1.3]), st.integers(0, 2))
PROMPTS = some_prompts(8)


@functools.cache
def alone(generator: TransformersGenerator, asked: tuple[int, int, float, int]) -> str:
    number, longest, temperature, seed = asked
    (made,) = generator.generate([PROMPTS[number]], max_new_tokens=longest, temperature=temperature, seed=seed)
    return made.text


def row_request(generator: TransformersGenerator, asked: tuple[int, int, float, int]) -> Request:
    number, longest, temperature, seed = asked
    return Request(generator.to_row(PROMPTS[number], max_new_tokens=longest, temperature=temperature, seed=seed))


@settings(max_examples=40)
@given(st.lists(ASKED, min_size=1, max_size=9), st.lists(st.integers(0, 11), max_size=60), st.integers(300, 900))
def test_a_text_does_not_depend_on_other_requests(
    tiny: TransformersGenerator, asked: list[tuple[int, int, float, int]], plan: list[int], batch_tokens: int
) -> None:
    """For any order of arrivals, steps (also during a prefill) and cancellations, and any memory limit."""
    tiny._batch_tokens, before = batch_tokens, tiny._batch_tokens
    batch = RunningBatch(tiny, 4)
    tiny._batch_tokens = before
    waiting = [row_request(tiny, one) for one in asked]
    everyone = list(waiting)
    moves = iter([*plan, *[0, 1] * 2000])

    def play(move: int) -> None:
        batch.release()
        if move >= 8:
            everyone[move % len(everyone)].cancel()
        elif move % 2:
            batch.step()
        assert len(batch) <= 4
        for layer in batch._batch._layers:
            assert len(batch) == 1 or layer.keys.shape[0] * layer.keys.shape[2] <= batch_tokens

    while not all(one.is_over for one in everyone):
        move = next(moves)
        play(move)
        if move % 2 == 0 and waiting and batch.has_room(waiting[0]):
            batch.admit(waiting.pop(0), lambda: play(next(moves)))
    for one, wanted in zip(everyone, asked, strict=True):
        if one.failure is None:
            assert one.completion().text == alone(tiny, wanted)
        else:
            assert one.failure == "cancelled"


def test_requests_of_many_threads_equal_bulk_answers(
    tiny: TransformersGenerator, start: Callable[..., ContinuousGenerator]
) -> None:
    engine = start(max_running=5)
    source = random.Random(1)
    asked = [(n % 8, source.randint(1, 30), source.choice([0.0, 1.1]), n) for n in range(32)]
    made: dict[int, Any] = {}

    def ask(number: int) -> None:
        which, longest, temperature, seed = asked[number]
        one = engine.submit(PROMPTS[which], max_new_tokens=longest, temperature=temperature, seed=seed)
        if number % 4 == 3:
            for _ in one.pieces():
                break  # leaves early
        made[number] = one

    threads = [threading.Thread(target=ask, args=(number,)) for number in source.sample(range(32), 32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    served = {number: one for number, one in made.items() if number % 4 != 3}
    for number, one in served.items():
        pieces = list(one.pieces())
        bulk = tiny.generate(
            [PROMPTS[asked[number][0]]],
            max_new_tokens=asked[number][1],
            temperature=asked[number][2],
            seed=asked[number][3],
        )[0]
        done = one.completion()
        assert "".join(pieces) == done.text == bulk.text
        assert (done.prompt_tokens, done.completion_tokens) == (bulk.prompt_tokens, bulk.completion_tokens)
        assert (done.finish, done.error) == (bulk.finish, "")
        assert done.seconds > 0
    wait_until(lambda: sum((engine.stats().finished, engine.stats().cancelled)) == 32)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.failed, stats.expired, stats.refused) == (0, 0, 0, 0, 0)
    assert stats.finished >= len(served)


def test_greedy_served_answers_equal_a_bulk_batch(
    tiny: TransformersGenerator, start: Callable[..., ContinuousGenerator]
) -> None:
    stop = [tiny.generate(PROMPTS[:1], max_new_tokens=20)[0].text[4:6]]
    engine = start()
    served = [engine.submit(prompt, max_new_tokens=20, stop=stop) for prompt in PROMPTS]
    bulk = tiny.generate(PROMPTS, max_new_tokens=20, stop=stop)
    assert [one.completion().text for one in served] == [one.text for one in bulk]


def test_a_full_queue_refuses_until_a_request_leaves(
    start: Callable[..., ContinuousGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    engine = start(max_running=1, max_waiting=2)
    running = engine.submit(PROMPTS[0], max_new_tokens=3)
    wait_until(lambda: engine.stats().prompt_tokens > 0)
    waiting = [engine.submit(PROMPTS[1], max_new_tokens=3) for _ in range(2)]
    with pytest.raises(Overloaded, match="2 requests wait"):
        engine.submit(PROMPTS[1], max_new_tokens=3)
    assert (engine.stats().waiting, engine.stats().refused) == (2, 1)
    waiting[0].cancel()
    late = engine.submit(PROMPTS[1], max_new_tokens=3)
    gate.open.set()
    assert running.completion().text
    assert late.completion().text == waiting[1].completion().text
    with pytest.raises(RequestFailed, match="cancelled"):
        waiting[0].completion()


def test_room_in_a_batch_follows_its_longest_row(tiny: TransformersGenerator) -> None:
    batch = DecodingBatch(tiny._model, [], 0, 512, max_rows=3, max_tokens=300)
    assert batch.has_room(1000), "a first row always fits"
    for length in (5, 20, 30):
        batch.join([[1] * length], 6)
    assert not batch.has_room(5), "three rows are the limit"
    batch.drop(2)
    assert batch.has_room(100 - 36)
    assert not batch.has_room(129), "three times 192 positions"
    batch.join([[1] * 150], 6)
    batch.drop(0)  # the row of 150 tokens moves to its position
    batch.drop(1)
    assert len(batch) == 1
    assert not batch.has_room(5), "twice 192 positions"
    batch.drop(0)
    batch.join([[1] * 20], 6)
    assert batch.has_room(128)


def test_requests_join_in_order_even_a_large_one(
    generator_directory: Path, start: Callable[..., ContinuousGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    admitted = []
    admit = RunningBatch.admit

    def watched(batch: RunningBatch, one: Request, *rest: Any) -> None:
        admitted.append(one)
        admit(batch, one, *rest)

    monkeypatch.setattr(RunningBatch, "admit", watched)
    gate = Gate(monkeypatch)
    engine = start(load(generator_directory, 600))
    texts = ["a" * 20, "b" * 20, "c" * 700, "d" * 20]
    asked = [engine.submit(prompt_of(text), max_new_tokens=5) for text in texts]
    gate.open.set()
    for one in asked:
        one.completion()
    assert admitted == asked


def test_a_request_that_expires_in_the_queue_is_never_computed(
    start: Callable[..., ContinuousGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, gate = Clock(monkeypatch), Gate(monkeypatch)
    engine = start(max_running=1)
    running = engine.submit(PROMPTS[0], max_new_tokens=5)
    wait_until(lambda: engine.stats().prompt_tokens > 0)
    before = engine.stats().prompt_tokens
    late = engine.submit(PROMPTS[1], max_new_tokens=5, deadline_seconds=2)
    clock.now = 2.0
    gate.open.set()
    with pytest.raises(RequestFailed, match="no answer within 2 seconds") as failed:
        late.completion()
    assert failed.value.reason == "deadline"
    assert running.completion().text
    wait_until(lambda: engine.stats().expired == 1)
    assert engine.stats().prompt_tokens == before


def test_a_running_request_ends_at_its_deadline(
    endless: TransformersGenerator, start: Callable[..., ContinuousGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    engine = start(endless)
    late = engine.submit(PROMPTS[2], max_new_tokens=LONG, deadline_seconds=3)
    pieces = late.pieces()
    next(pieces)
    clock.now = 3.0
    with pytest.raises(RequestFailed, match="3 seconds"):
        list(pieces)
    wait_until(lambda: engine.stats().expired == 1)
    assert engine.stats().generated_tokens < LONG


def test_a_cancelled_row_leaves_before_the_next_step(endless: TransformersGenerator) -> None:
    batch = RunningBatch(endless, 4)
    asked = [row_request(endless, (number, 30, 1.0, 1)) for number in range(3)]
    for one in asked:
        batch.admit(one, lambda: None)
    assert batch.generated_tokens == 3
    asked[0].cancel()
    asked[0].cancel()
    assert batch.release() == [asked[0]]
    batch.step()
    assert batch.generated_tokens == 5
    assert len(asked[0].row.generated) == 1


def test_a_client_that_leaves_frees_its_row(
    endless: TransformersGenerator, start: Callable[..., ContinuousGenerator]
) -> None:
    engine = start(endless, max_running=1)
    gone = engine.submit(PROMPTS[2], max_new_tokens=LONG)
    pieces = gone.pieces()
    next(pieces)
    pieces.close()
    wait_until(lambda: engine.stats().cancelled == 1)
    assert engine.stats().running == 0
    assert engine.submit(PROMPTS[0], max_new_tokens=2).completion().completion_tokens == 2
    assert engine.stats().generated_tokens < LONG


def test_a_request_cancelled_during_a_prefill_skips_the_next_step(
    endless: TransformersGenerator, start: Callable[..., ContinuousGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, step = DecodingBatch._prefill, DecodingBatch.step
    sizes: list[int] = []

    def leaving(batch: DecodingBatch, *arguments: Any) -> Any:
        if len(batch):
            sizes.clear()
            first.cancel()
        return prefill(batch, *arguments)

    def watched(batch: DecodingBatch, tokens: torch.Tensor) -> None:
        sizes.append(len(tokens))
        step(batch, tokens)

    monkeypatch.setattr(continuous, "_PREFILL_SECONDS", 1e9)
    monkeypatch.setattr(DecodingBatch, "_prefill", leaving)
    monkeypatch.setattr(DecodingBatch, "step", watched)
    engine = start(endless)
    first = engine.submit(PROMPTS[2], max_new_tokens=LONG)
    pieces = first.pieces()
    next(pieces)
    engine.submit(PROMPTS[1], max_new_tokens=4).completion()
    assert sizes == [1, 1, 1]


def test_a_prefill_stops_when_its_request_is_cancelled(tiny: TransformersGenerator) -> None:
    batch = RunningBatch(tiny, 2)
    one = row_request(tiny, (0, 5, 0.0, 0))
    layers = []

    def leave() -> None:
        layers.append(1)
        one.cancel()

    batch.admit(one, leave)
    assert len(layers) == 1, "the second of two layers was computed"
    assert batch.release() == [one]
    assert len(batch) == batch.generated_tokens == 0


def test_steps_continue_during_a_prefill(
    tiny: TransformersGenerator, start: Callable[..., ContinuousGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous, "_PREFILL_SECONDS", 0.0)
    prefilling, seen = [], []
    join, step = DecodingBatch.join, DecodingBatch.step

    def watched_join(batch: DecodingBatch, *arguments: Any) -> None:
        prefilling.append(1)
        join(batch, *arguments)
        prefilling.clear()

    def watched_step(batch: DecodingBatch, tokens: torch.Tensor) -> None:
        seen.append(len(prefilling))
        step(batch, tokens)

    monkeypatch.setattr(DecodingBatch, "join", watched_join)
    monkeypatch.setattr(DecodingBatch, "step", watched_step)
    engine = start()
    asked = [engine.submit(prompt, max_new_tokens=20) for prompt in PROMPTS]
    texts = [one.completion().text for one in asked]
    assert seen.count(1) > len(PROMPTS)
    monkeypatch.undo()
    assert texts == [one.text for one in tiny.generate(PROMPTS, max_new_tokens=20)]


def test_a_failing_prefill_fails_only_its_request(
    tiny: TransformersGenerator, start: Callable[..., ContinuousGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = DecodingBatch._prefill

    def failing(batch: DecodingBatch, prompts: Any, *rest: Any) -> Any:
        if len(prompts[0]) > 200:
            raise KeyError("no such thing")
        return prefill(batch, prompts, *rest)

    expected = [one.text for one in tiny.generate(PROMPTS, max_new_tokens=9)]
    monkeypatch.setattr(DecodingBatch, "_prefill", failing)
    engine = start()
    good = [engine.submit(prompt, max_new_tokens=9) for prompt in PROMPTS]
    bad = engine.submit(prompt_of("b" * 300), max_new_tokens=9)
    with pytest.raises(RequestFailed, match=r"KeyError.*no such thing") as failed:
        bad.completion()
    assert failed.value.reason == "failed"
    assert [one.completion().text for one in good] == expected
    assert engine.is_alive()


def test_nan_logits_fail_only_their_row(generator_directory: Path) -> None:
    """A prompt whose keys and values are NaN affects neither other rows nor the rows that reuse its memory."""
    poisoned = load(generator_directory)
    expected = [one.text for one in poisoned.generate(PROMPTS, max_new_tokens=9)]
    (z,) = poisoned._chat.encode(["z"])[0]
    with torch.no_grad():
        poisoned._model.get_input_embeddings().weight[z] = float("nan")
    engine = ContinuousGenerator(poisoned, max_running=2)
    asked = [
        (engine.submit(prompt_of("z" * 150), max_new_tokens=9), engine.submit(prompt, max_new_tokens=9))
        for prompt in PROMPTS
    ]
    for (bad, good), text in zip(asked, expected, strict=True):
        with pytest.raises(RequestFailed, match="not numbers"):
            bad.completion()
        assert good.completion().text == text
    assert "not numbers" in poisoned.generate([prompt_of("z")], max_new_tokens=2)[0].error
    engine.close()
    assert engine.stats().failed == engine.stats().finished == 8


def test_an_error_in_a_shared_step_fails_only_its_requests(
    tiny: TransformersGenerator, start: Callable[..., ContinuousGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DecodingBatch.step
    broken = threading.Event()

    def failing(batch: DecodingBatch, tokens: torch.Tensor) -> None:
        if not broken.is_set():
            broken.set()
            raise torch.OutOfMemoryError("no memory")
        step(batch, tokens)

    monkeypatch.setattr(DecodingBatch, "step", failing)
    engine = start()
    with pytest.raises(RequestFailed, match="OutOfMemoryError: no memory"):
        engine.submit(PROMPTS[0], max_new_tokens=5).completion()
    again = engine.submit(PROMPTS[0], max_new_tokens=5)
    assert again.completion().text == tiny.generate(PROMPTS[:1], max_new_tokens=5)[0].text
    assert engine.stats().failed == 1


def test_when_the_thread_dies_every_request_fails(
    start: Callable[..., ContinuousGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    engine = start(max_running=1)
    asked = [engine.submit(PROMPTS[0], max_new_tokens=5) for _ in range(3)]

    def dying(batch: RunningBatch) -> list[Request]:
        raise MemoryError

    monkeypatch.setattr(RunningBatch, "release", dying)
    gate.open.set()
    for one in asked:
        with pytest.raises(RequestFailed, match="thread has died"):
            one.completion()
    wait_until(lambda: not engine.is_alive())
    with pytest.raises(RequestFailed, match="new replica"):
        engine.submit(PROMPTS[0], max_new_tokens=5)
    assert (engine.stats().running, engine.stats().waiting, engine.stats().failed) == (0, 0, 3)


def test_closing_finishes_present_requests_and_refuses_new_ones(start: Callable[..., ContinuousGenerator]) -> None:
    engine = start(max_running=1)
    asked = [engine.submit(PROMPTS[0], max_new_tokens=5) for _ in range(3)]
    engine.close()
    assert len({one.completion().text for one in asked}) == 1
    assert not engine.is_alive()
    with pytest.raises(Overloaded, match="closing"):
        engine.submit(PROMPTS[0], max_new_tokens=5)


def test_requests_that_outlast_the_grace_period_fail(
    endless: TransformersGenerator, start: Callable[..., ContinuousGenerator]
) -> None:
    engine = start(endless)
    cut = engine.submit(PROMPTS[2], max_new_tokens=LONG)
    engine.close(0)
    with pytest.raises(RequestFailed, match="closed before"):
        cut.completion()
    assert not engine.is_alive()


def test_asyncio_readers_get_the_same_text_and_can_cancel(
    endless: TransformersGenerator, start: Callable[..., ContinuousGenerator]
) -> None:
    engine = start(endless)

    async def read(one: Request) -> str:
        return "".join([piece async for piece in one.apieces()])

    async def talk() -> list[str]:
        asked = [engine.submit(prompt, max_new_tokens=12) for prompt in PROMPTS]
        gone = engine.submit(PROMPTS[2], max_new_tokens=LONG)
        reading = asyncio.create_task(read(gone))
        texts = await asyncio.gather(*(read(one) for one in asked))
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert gone.failure == "cancelled"
        with pytest.raises(RequestFailed):
            await read(gone)
        return list(texts)

    assert asyncio.run(talk()) == [one.text for one in endless.generate(PROMPTS, max_new_tokens=12)]


def test_closing_a_readers_event_loop_cancels_its_request(
    endless: TransformersGenerator, start: Callable[..., ContinuousGenerator]
) -> None:
    engine = start(endless)
    one = engine.submit(PROMPTS[2], max_new_tokens=LONG)
    pieces = one.apieces()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(anext(pieces))
    loop.close()
    wait_until(lambda: one.failure == "cancelled")
    assert engine.submit(PROMPTS[0], max_new_tokens=2).completion().completion_tokens == 2


def test_invalid_requests_are_refused_with_the_reason(start: Callable[..., ContinuousGenerator]) -> None:
    engine = start()
    with pytest.raises(GeneratorError, match="empty"):
        engine.submit(Prompt((), (), 0), max_new_tokens=5)
    with pytest.raises(GeneratorError, match="context 2048"):
        engine.submit(prompt_of("a" * 3000), max_new_tokens=5)
    with pytest.raises(GeneratorError, match="max_new_tokens=0"):
        engine.submit(PROMPTS[0], max_new_tokens=0)
    with pytest.raises(GeneratorError, match="adapter 'x' is not served; available: none"):
        engine.submit(PROMPTS[0], max_new_tokens=5, adapter="x")


def test_a_failed_request_survives_pickling() -> None:
    failure = copy.copy(RequestFailed("deadline", "too late"))  # copy uses the same protocol as pickle
    assert (failure.reason, str(failure)) == ("deadline", "too late")


@pytest.mark.parametrize("temperature", [1e-45, 1e-8])
def test_a_temperature_near_zero_is_greedy(tiny: TransformersGenerator, temperature: float) -> None:
    greedy = tiny.generate(PROMPTS, max_new_tokens=5)
    made = tiny.generate(PROMPTS, max_new_tokens=5, temperature=temperature)
    assert [one.text for one in made] == [one.text for one in greedy]


# LoRA adapters


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, generator_directory: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    attention = ["q_proj", "v_proj"]
    return {
        "a": save_adapter(generator_directory, folder / "a", 1),
        "b": save_adapter(generator_directory, folder / "b", 2, r=2, use_rslora=True, target_modules=attention),
    }


def peft_texts(generator: TransformersGenerator, model_directory: Path, adapter: Path, longest: int) -> list[str]:
    """The texts of transformers and PEFT, one prompt at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor(generator._chat.encode([generator.render(prompt.messages)]))
        made = model.generate(input_ids=ids, max_new_tokens=longest, do_sample=False, pad_token_id=257)
        texts.append(generator._chat.decode([token for token in made[0, ids.shape[1] :].tolist() if token != 257]))
    return texts


@pytest.mark.parametrize("packed", [False, True])
def test_base_and_adapters_in_one_batch_answer_as_each_alone(
    generator_directory: Path,
    adapters: dict[str, Path],
    start: Callable[..., ContinuousGenerator],
    monkeypatch: pytest.MonkeyPatch,
    packed: bool,
) -> None:
    monkeypatch.setattr(continuous, "_PREFILL_SECONDS", 0.0)  # so that steps interrupt prefills of other adapters
    adapted = load(generator_directory)
    if packed:  # in float32, for which every processor has the operators
        packing._pack_children(adapted._model)
    expected = {"": [one.text for one in adapted.generate(PROMPTS, max_new_tokens=15)]}
    expected |= {name: peft_texts(adapted, generator_directory, path, 15) for name, path in adapters.items()}
    assert len({texts[0] for texts in expected.values()}) == 3
    engine = start(adapted, adapters=adapters)
    asked = [
        (name, number, engine.submit(prompt, max_new_tokens=15, adapter=name))
        for number, prompt in enumerate(PROMPTS)
        for name in expected
    ]
    for name, number, one in asked:
        # A character that was cut is no part of an answer.
        assert one.completion().text == expected[name][number].rstrip("\ufffd"), name
    bulk = adapted.generate(PROMPTS, max_new_tokens=15)
    assert [one.text for one in bulk] == expected[""], "adapters of one thread do not affect another"
    with pytest.raises(GeneratorError, match="available: a, b"):
        engine.submit(PROMPTS[0], max_new_tokens=5, adapter="c")


def edit_settings(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"something_new": [1]}, "something_new"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(
    tiny: TransformersGenerator, adapters: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    for path in adapters["b"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_settings(tmp_path, **changes)
    with pytest.raises(GeneratorError, match=f"not a plain LoRA adapter.*{message}"):
        tiny.load_adapters({"x": tmp_path})


def test_adapters_that_do_not_fit_are_refused_by_name(
    tiny: TransformersGenerator, generator_directory: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(GeneratorError, match=r"'x'.*cannot be loaded"):
        tiny.load_adapters({"x": tmp_path})
    for path in adapters["b"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    good = load_file(weights)
    first = next(key for key in good if key.endswith("q_proj.lora_B.weight"))
    for key, value, message in [
        (first, torch.zeros(7, 2), "made for another model"),
        (first, good[first] * float("inf"), "not numbers"),
        (first.replace("layers.0", "layers.9"), good[first], "not a plain LoRA"),
        ("lm_head.weight", good[first], "other tensors"),
    ]:
        save_file(good | {key: value.clone()}, weights)
        with pytest.raises(GeneratorError, match=message):
            tiny.load_adapters({"x": tmp_path})
    save_file({key: value for key, value in good.items() if "layers.1.self_attn.v_proj" not in key}, weights)
    with pytest.raises(
        GeneratorError, match=r"no weights for 1 of its layers, such as model\.layers\.1\.self_attn\.v_proj"
    ):
        tiny.load_adapters({"x": tmp_path})
    edit_settings(tmp_path, layers_to_transform=[0])
    save_file({key: value for key, value in good.items() if "layers.1." not in key}, weights)
    copy.deepcopy(tiny).load_adapters({"x": tmp_path})
    edit_settings(tmp_path, layers_to_transform=None)
    moved = {key.replace("layers.0", "layers.9"): value.clone() for key, value in good.items() if "layers.0" in key}
    save_file(good | moved, weights)
    with pytest.raises(GeneratorError, match=r"layers\.9.*not a linear layer of this model"):
        tiny.load_adapters({"x": tmp_path})
    weights.write_bytes(b"no weights")
    with pytest.raises(GeneratorError, match="cannot be loaded"):
        tiny.load_adapters({"x": tmp_path})
