"""MCP over streamable HTTP: `POST /mcp` of the endpoint. Each request is complete in itself, so any replica can answer it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ragtune_ray.serving.answers import Answerer
from ragtune_ray.serving.api_keys import Key
from ragtune_ray.serving.handlers import Handlers
from ragtune_ray.serving.mcp.server import (
    AskArguments,
    SearchArguments,
    VersionsArguments,
    build_server,
    index_versions,
)
from ragtune_ray.serving.openai.chat import answer_chat

SHOWN = ("abstained", "sources", "citations", "index_version", "arm")
"""Fields of a chat completion that an answer keeps."""


@dataclass(frozen=True, slots=True)
class EndpointTools:
    """The tools for one key: the same handlers, limits and filters as for other requests."""

    answerer: Answerer
    handlers: Handlers
    key: Key

    async def search(self, given: SearchArguments) -> dict[str, Any]:
        """As POST /v1/retrieve."""
        response = await self.handlers.retrieve(given.model_dump_json().encode(), self.key)
        found = json.loads(bytes(response.body))
        return {"index_version": found["index_version"], "passages": found["data"]}

    async def ask(self, given: AskArguments) -> dict[str, Any]:
        """As POST /v1/chat/completions."""
        message = {"role": "user", "content": given.question}
        request = {"messages": [message], "top_k": given.top_k, "filter": given.filter}
        response = await answer_chat(self.answerer, json.dumps(request).encode(), self.key)
        answered = json.loads(bytes(response.body))
        text = answered["choices"][0]["message"]["content"]
        return {"answer": text, **{name: answered[name] for name in SHOWN}}

    async def list_versions(self, given: VersionsArguments) -> dict[str, Any]:
        """Without numbers for the key of a tenant, which would tell of the documents of others."""
        settings = self.handlers.settings
        counted = self.key.admin or not settings.index.tenant_field
        return await asyncio.to_thread(index_versions, settings, given.limit, counted=counted)


class McpResponse(Response):
    """Answers one MCP message."""

    def __init__(self, tools: EndpointTools, body: bytes) -> None:
        super().__init__()
        self._tools, self._message = tools, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response of the SDK, which reads the body once more."""
        # A manager that is stateless is as short-lived as its request; the access middleware has limited the body.
        manager = StreamableHTTPSessionManager(
            build_server(self._tools),
            json_response=True,
            stateless=True,
            max_request_body_size=max(1, len(self._message)),
        )
        async with manager.run():
            await manager.handle_request(scope, _replayed(self._message, receive), send)


def _replayed(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
