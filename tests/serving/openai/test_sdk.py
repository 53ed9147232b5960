"""The endpoint through OpenAI's own SDK: every format, plain and streamed, and what the SDK makes of errors."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from ragtune_ray.serving.backend import Failed
from tests.support.gateways import FakeBackend, client

pytestmark = pytest.mark.anyio

QUESTION = "What is the code of vessel0?"
ASKED = [{"role": "user", "content": QUESTION}]
ANSWER = "It is secret0."
URN = "urn:ragtune:d0"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def sdk(backend: FakeBackend) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client("generator.max_new_tokens=48", backend=backend) as http:
        yield openai.AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="x", http_client=http, max_retries=0)


async def test_a_chat_continues_with_the_message_as_it_was_received(
    sdk: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    first = await sdk.chat.completions.create(model="rag", messages=ASKED)
    message = first.choices[0].message
    assert (message.content, message.annotations[0].url_citation.url) == (ANSWER, URN)
    more = {"role": "user", "content": "And of vessel1?"}
    for sent in (message, message.model_dump(), json.loads(message.model_dump_json())):
        reply = await sdk.chat.completions.create(model="rag", messages=[*ASKED, sent, more])
        assert reply.choices[0].finish_reason == "stop"
        assert backend.asked[-1][1].history == (("user", QUESTION), ("assistant", ANSWER))


async def test_several_answers_have_consecutive_seeds_and_their_own_facts(
    sdk: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    reply = await sdk.chat.completions.create(model="rag", messages=ASKED, n=3, seed=7, temperature=0.5)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [job.seed for name, job, _ in backend.asked[1:]] == [7, 8, 9]
    assert [name for name, *_ in backend.asked].count("retrieve") == 1
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (11, 15, 26)
    assert all(choice.citations == reply.citations for choice in reply.choices)


async def test_a_chat_is_streamed(sdk: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    stream = await sdk.chat.completions.create(
        model="rag", messages=ASKED, stream=True, stream_options={"include_usage": True}, max_tokens=100_000
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert chunks[-1].usage.total_tokens == 16
    assert backend.asked[-1][1].max_new_tokens == 512


async def test_a_completion_is_plain_or_streamed(sdk: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    options: dict[str, Any] = {"model": "rag", "prompt": QUESTION, "top_p": 0.9, "extra_body": {"top_k": 2}}
    plain = await sdk.completions.create(**options)
    assert (plain.object, plain.choices[0].text, plain.choices[0].finish_reason) == ("text_completion", ANSWER, "stop")
    assert [source["id"] for source in plain.sources] == ["d0#0", "d1#0"]
    assert backend.asked[-1][1].top_p == 0.9
    chunks = [chunk async for chunk in await sdk.completions.create(**options, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[0].sources == plain.sources


async def test_several_prompts_are_retrieved_for_and_answered_each(
    sdk: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    reply = await sdk.completions.create(model="rag", prompt=["What is Mars?", "What is Venus?"], n=2, seed=7)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [asked[1] for asked in backend.asked if asked[0] == "retrieve"] == ["What is Mars?", "What is Venus?"]
    jobs = sorted((job.question, job.seed) for name, job, *_ in backend.asked if name == "complete")
    assert jobs == [(prompt, seed) for prompt in ("What is Mars?", "What is Venus?") for seed in (7, 8)]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (22, 20)


async def test_a_response_is_the_answer_with_its_citations_and_continues(
    sdk: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    first = await sdk.responses.create(
        model="rag",
        input=QUESTION,
        instructions="Be brief.",
        metadata={"a": "b"},
        max_output_tokens=100_000,
        store=True,
    )
    assert (first.status, first.output_text, first.store) == ("completed", ANSWER, False)
    assert (first.max_output_tokens, first.temperature, first.metadata) == (512, 0.0, {"a": "b"})
    assert (first.usage.input_tokens, first.usage.output_tokens, first.usage.total_tokens) == (11, 5, 16)
    (citation,) = first.output[0].content[0].annotations
    assert (citation.type, citation.url, citation.end_index) == ("url_citation", URN, len(ANSWER))
    assert first.index_version == "000007"
    job = backend.asked[-1][1]
    assert (job.instruction, job.max_new_tokens) == ("Be brief.", 512)
    turns = [{"role": "user", "content": QUESTION}, *first.output, {"role": "user", "content": "And of vessel1?"}]
    await sdk.responses.create(model="rag", input=turns, extra_body={"top_k": 1, "filter": {"year": 2020}})
    (_, searched, top_k, visible, _), (_, job, _) = backend.asked[-2:]
    assert (searched, top_k, len(visible.conditions)) == (f"{QUESTION}\nAnd of vessel1?", 1, 1)
    assert job.history == (("user", QUESTION), ("assistant", ANSWER))


async def test_a_streamed_response_has_the_events_of_the_sdk_in_order(sdk: openai.AsyncOpenAI) -> None:
    plain = await sdk.responses.create(model="rag", input=QUESTION)
    events = [event async for event in await sdk.responses.create(model="rag", input=QUESTION, stream=True)]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for kind in kinds if kind != "output_text.delta"] == [
        "created", "in_progress", "output_item.added", "content_part.added",
        "output_text.annotation.added", "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert kinds.count("output_text.delta") > 2
    assert events[0].response.sources == plain.sources
    last = events[-1].response
    assert (last.output_text, last.usage, last.citations) == (ANSWER, plain.usage, plain.citations)
    assert last.output[0].content == plain.output[0].content
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1
    async with sdk.responses.stream(
        model="rag", input=QUESTION
    ) as stream:  # the SDK's helper, which adds the events up
        assert [event async for event in stream][-1].type == "response.completed"
        assert (await stream.get_final_response()).output_text == ANSWER


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_was_cut_is_an_incomplete_response(
    sdk: openai.AsyncOpenAI, backend: FakeBackend, stream: bool
) -> None:
    backend.finish = "length"
    reply: Any = await sdk.responses.create(model="rag", input=QUESTION, stream=stream)
    if stream:
        last = [event async for event in reply][-1]
        assert last.type == "response.incomplete"
        reply = last.response
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert reply.output[0].status == "incomplete"


async def test_a_stream_that_fails_says_so(sdk: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    backend.failure, backend.fail_after = Failed(502, "the replica died", "replica_died"), 1
    events = [event async for event in await sdk.responses.create(model="rag", input=QUESTION, stream=True)]
    assert (events[-1].type, events[-1].response.status) == ("response.failed", "failed")
    assert (events[-1].response.error.code, events[-1].response.error.message) == ("server_error", "the replica died")
    for create, asked in (
        (sdk.chat.completions.create, {"messages": ASKED}),
        (sdk.completions.create, {"prompt": "x"}),
    ):
        with pytest.raises(openai.APIError, match="the replica died"):
            _ = [chunk async for chunk in await create(model="rag", stream=True, **asked)]


async def test_vectors_and_models(sdk: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    listed = {model.id: model.task async for model in sdk.models.list()}
    assert listed == {"rag": "answer", "base": "answer", "all-MiniLM-L6-v2": "embed"}
    names = list(listed)
    for name in names:
        assert (await sdk.models.retrieve(name)).id == name
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("gpt-5")
    made = await sdk.embeddings.create(model=names[-1], input=["a"] * 2048)  # the SDK asks for base64
    assert len(made.data) == 2048
    assert made.data[5].embedding == [0.0, 1.0, 0.0, 0.0]
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        await sdk.embeddings.create(model=names[-1], input=[[1, 2], [3]])
    with pytest.raises(openai.NotFoundError, match="this endpoint embeds with all-MiniLM-L6-v2"):
        await sdk.embeddings.create(model="text-embedding-3-small", input="a")
    assert [name for name, *_ in backend.asked] == ["embed"]


async def test_what_the_endpoint_does_not_keep_is_refused(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"previous_response_id.*send the earlier turns in input") as error:
        await sdk.responses.create(model="rag", input=QUESTION, previous_response_id="resp_1")
    assert (error.value.code, error.value.param) == ("unsupported_parameter", "previous_response_id")
    with pytest.raises(openai.NotFoundError, match="use one of: rag, base"):
        await sdk.responses.create(model="gpt-5", input=QUESTION)


async def test_a_conversation_over_the_limit_is_refused_before_anything_is_done_for_it(
    sdk: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    long = [*[{"role": "system", "content": "x" * 8000}] * 30, *ASKED]
    for create, asked in ((sdk.chat.completions.create, {"messages": long}), (sdk.responses.create, {"input": long})):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="the limit is 100,000") as error:
                await create(model="rag", stream=stream, **asked)
            assert error.value.code == "text_too_long"
    assert backend.asked == []


async def test_a_slash_at_the_end_of_a_path_changes_nothing() -> None:
    async with client() as http:
        for method, path in (("GET", "/v1/models/"), ("GET", "/v1/models/rag/"), ("GET", "/"), ("GET", "/healthz//")):
            assert (await http.request(method, path)).status_code == 200, path
        reply = await http.post("/v1/chat/completions/", json={"messages": ASKED})
        assert reply.json()["choices"][0]["message"]["content"] == ANSWER
