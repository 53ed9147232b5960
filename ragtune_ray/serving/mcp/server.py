"""The MCP server: three tools that only read. It knows neither HTTP nor models."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mcp_types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.shared.exceptions import MCPError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import ragtune_ray
from ragtune_ray import config
from ragtune_ray.index import versions
from ragtune_ray.serving.middleware import INTERNAL_ERROR, traceback_without_message
from ragtune_ray.serving.requests import ApiError
from ragtune_ray.storage import artifacts

INSTRUCTIONS = (
    "Answers from an index of documents. `search` returns passages to read; `ask` returns an answer that a language model "
    "wrote from such passages, with its sources. Name the sources (title or document_id) of what you use."
)
MAX_VERSIONS = 100

logger = logging.getLogger(__name__)


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)


class SearchArguments(_Arguments):
    """Find passages of the indexed documents, best first."""

    query: str = Field(min_length=1)
    """What to look for: a question or key words."""
    top_k: int | None = Field(None, ge=1)
    """Number of passages; leave it out for the default."""
    filter: dict[str, Any] | None = None
    """Conditions on the documents' metadata: a field and a value, a list of values, or bounds such as {"gte": 2020}."""


class AskArguments(_Arguments):
    """Answer a question from the indexed documents, with citations and sources; says so if they do not contain the answer."""

    question: str = Field(min_length=1)
    """One complete question; it cannot refer to earlier ones."""
    top_k: int | None = Field(None, ge=1)
    """Number of passages to read; leave it out for the default."""
    filter: dict[str, Any] | None = None
    """Conditions on the documents' metadata: a field and a value, a list of values, or bounds such as {"gte": 2020}."""


class VersionsArguments(_Arguments):
    """List the versions of the index, newest first: when each was published, by what, and which is current."""

    limit: int = Field(20, ge=1, le=MAX_VERSIONS)
    """Maximum number of versions."""


class Tools(Protocol):
    """What the tools do; methods raise `ApiError` with a message for the client."""

    async def search(self, given: SearchArguments) -> dict[str, Any]:
        """The passages found."""

    async def ask(self, given: AskArguments) -> dict[str, Any]:
        """The answer and its sources."""

    async def list_versions(self, given: VersionsArguments) -> dict[str, Any]:
        """The versions of the index."""


@dataclass(frozen=True, slots=True)
class _Tool:
    title: str
    arguments: type[_Arguments]
    run: Callable[[Any], Awaitable[dict[str, Any]]]

    def described(self, name: str) -> mcp_types.Tool:
        return mcp_types.Tool(
            name=name,
            title=self.title,
            description=self.arguments.__doc__,
            input_schema=self.arguments.model_json_schema(),
            annotations=mcp_types.ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False),
        )


def build_server(tools: Tools) -> Server[Any]:
    """The server of these tools; it keeps no state, so one can be built for each request."""
    known = {
        "search": _Tool("Search the documents", SearchArguments, tools.search),
        "ask": _Tool("Ask the documents", AskArguments, tools.ask),
        "list_versions": _Tool("List index versions", VersionsArguments, tools.list_versions),
    }

    async def list_tools(_: ServerRequestContext[Any], __: Any) -> mcp_types.ListToolsResult:
        return mcp_types.ListToolsResult(tools=[tool.described(name) for name, tool in known.items()])

    async def call_tool(
        _: ServerRequestContext[Any], call: mcp_types.CallToolRequestParams
    ) -> mcp_types.CallToolResult:
        if call.name not in known:
            raise MCPError(mcp_types.INVALID_PARAMS, f"unknown tool; this server has {', '.join(known)}")
        return await _called(call.name, known[call.name], call.arguments or {})

    return Server(
        "ragtune-ray",
        version=ragtune_ray.__version__,
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


async def _called(name: str, tool: _Tool, given: dict[str, Any]) -> mcp_types.CallToolResult:
    try:
        found = await tool.run(tool.arguments.model_validate(given))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return _failed(f"{'.'.join(str(part) for part in first['loc'])[:200]}: {first['msg']}")
    except ApiError as error:
        return _failed(error.message)
    except Exception as error:  # noqa: BLE001  # at the outer boundary, any exception becomes a result
        logger.error("the MCP tool %s failed: %s", name, traceback_without_message(error))  # noqa: TRY400  # see there
        return _failed(INTERNAL_ERROR.message)
    text = mcp_types.TextContent(text=json.dumps(found, ensure_ascii=False))
    return mcp_types.CallToolResult(content=[text], structured_content=found)


def _failed(message: str) -> mcp_types.CallToolResult:
    return mcp_types.CallToolResult(content=[mcp_types.TextContent(text=message)], is_error=True)


def index_versions(settings: config.Config, limit: int, *, counted: bool) -> dict[str, Any]:
    """The newest versions of a workspace's index, as JSON values.

    Args:
        settings: names the workspace.
        limit: maximum number of versions.
        counted: also tell the numbers of documents and passages of all tenants.

    Raises:
        ApiError: 409, there is no index.
    """
    try:
        current = versions.current_version(settings.workspace)
        names = versions.list_versions(settings.workspace)[-limit:]
        manifests = [versions.read_version(settings.workspace, name).manifest for name in reversed(names)]
    except artifacts.ArtifactError:
        raise ApiError(409, "there is no index, or it is damaged", code="no_index") from None
    shown = ("version", "created", "operation", *(("num_documents", "num_passages") if counted else ()))
    rows = [{name: manifest.get(name) for name in shown} for manifest in manifests]
    return {"current": current, "versions": rows}
