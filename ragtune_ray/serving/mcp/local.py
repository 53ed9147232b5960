"""MCP on stdio: `ragtune mcp CONFIG` searches and answers in its own process, as `ragtune ask` does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
from mcp.server.stdio import stdio_server

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.answering import rewriting
from ragtune_ray.answering.pipeline import Task, answer_tasks
from ragtune_ray.answering.searching import Texts, search_passages
from ragtune_ray.generation.generator import open_generator
from ragtune_ray.generation.interface import Generator
from ragtune_ray.index import filters, snapshot, versions
from ragtune_ray.index.retriever import Retriever, load_reranker, visible
from ragtune_ray.models import arms
from ragtune_ray.models.encoder import Encoder, load_encoder
from ragtune_ray.models.reranker import Reranker
from ragtune_ray.serving import sources
from ragtune_ray.serving.api_keys import requested_filter
from ragtune_ray.serving.mcp.server import (
    AskArguments,
    SearchArguments,
    VersionsArguments,
    build_server,
    index_versions,
)
from ragtune_ray.serving.requests import ApiError, top_k_of
from ragtune_ray.serving.sanitizing import without_links


class LocalTools:
    """The tools over the workspace of a config; one call runs at a time, and the generator is loaded at the first question."""

    def __init__(self, settings: config.Config) -> None:
        self._settings = arms.with_tuned_models(settings)
        self._visible = visible(self._settings)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mcp")
        self._models: tuple[Encoder | None, Reranker | None] | None = None
        self._index: snapshot.Index | None = None
        self._generator: tuple[Generator, str] | None = None

    def load_ahead(self) -> None:
        """Begin to load what a search needs, so that the first call waits less; it raises what fails."""
        self._thread.submit(self._opened, self._visible)

    async def search(self, given: SearchArguments) -> dict[str, Any]:
        """The passages found, from the current index version."""
        return await self._in_thread(lambda: self._search(given))

    async def ask(self, given: AskArguments) -> dict[str, Any]:
        """The answer in the arm that `answer.arm` names."""
        return await self._in_thread(lambda: self._ask(given))

    async def list_versions(self, given: VersionsArguments) -> dict[str, Any]:
        """The versions of the index."""
        return await self._in_thread(lambda: index_versions(self._settings, given.limit, counted=True))

    async def _in_thread(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            try:
                return work()
            except ApiError:
                raise
            except RagtuneError as error:
                raise ApiError(422, str(error), code="failed") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _search(self, given: SearchArguments) -> dict[str, Any]:
        passages, scores, version = self._retrieve((given.query,), given.top_k, given.filter)
        return {"index_version": version, "passages": sources.sources(passages, scores)}

    def _retrieve(
        self, texts: Texts, top_k: int | None, chosen: dict[str, Any] | None
    ) -> tuple[list[schema.Passage], list[float], str]:
        if not texts[0].strip():
            raise ApiError(400, "the query is empty", code="invalid_value")
        retriever = self._opened(filters.combine(self._visible, requested_filter(chosen)))
        retrieval = self._settings.retrieval
        ((passages, scores),) = search_passages(retriever, [texts], retrieval, top_k_of(top_k, self._settings))
        return passages, scores, retriever.index.version

    def _opened(self, chosen: filters.Filter) -> Retriever:
        """A retriever on the current version, with the models and the segments that are already open."""
        settings = self._settings
        if self._index is None or self._index.version != versions.current_version(settings.workspace):
            self._index = snapshot.open_index(settings.workspace, reuse=self._index)
        if self._models is None:
            encoder = None if settings.retrieval.mode == "lexical" else load_encoder(settings.encoder)
            self._models = encoder, load_reranker(settings.retrieval)
        encoder, reranker = self._models
        return Retriever(self._index, encoder, settings.retrieval, reranker, chosen)

    def _ask(self, given: AskArguments) -> dict[str, Any]:
        query = schema.Query("ask", given.question, None, (), (), "all")
        task = Task(query)
        if self._settings.answer.shows_passages:
            passages, scores, version = self._retrieve(self._texts(query), given.top_k, given.filter)
            task = Task(query, tuple(passages), tuple(scores), version)
        generator, fingerprint = self._opened_generator()
        (answer,) = answer_tasks([task], generator, self._settings, fingerprint)
        if answer.status != "ok":
            raise ApiError(422, answer.error, code="failed")
        by_id = {passage.passage_id: passage for passage in task.passages}
        return {
            "answer": without_links(answer.answer, self._settings.serve.link_hosts),
            "abstained": answer.abstained,
            "sources": sources.sources([by_id[name] for name in answer.passage_ids], answer.scores),
            "citations": sources.citations_body(answer),
            "index_version": answer.index_version,
            "arm": self._settings.answer.arm,
        }

    def _texts(self, query: schema.Query) -> Texts:
        """What to search for; the generator is asked only if the config lets it split questions."""
        retrieval = self._settings.retrieval
        if not query.text.strip() or not rewriting.steps(query, retrieval):
            return rewriting.begun(query, retrieval).texts
        (searches,) = rewriting.write_searches([query], self._opened_generator()[0], self._settings)
        return searches.texts

    def _opened_generator(self) -> tuple[Generator, str]:
        self._generator = self._generator or open_generator(self._settings)
        return self._generator


def serve_stdio(settings: config.Config) -> None:
    """Serve MCP over stdin and stdout until the client closes stdin.

    Raises:
        ConfigError: the filter or the tenant of the config is invalid.
        ArtifactError: there is no index.
        ModelError: a tuned model that `answer.arm` names is missing.
    """
    versions.current_version(settings.workspace)
    tools = LocalTools(settings)
    tools.load_ahead()
    server = build_server(tools)
    progress.say("mcp: answering on stdin and stdout; an assistant starts this command and speaks to it")

    async def run() -> None:
        async with stdio_server() as (read, write):
            await server.run(read, write, server.create_initialization_options())

    anyio.run(run)
