"""MCP with the official SDK as its client: over HTTP with keys and tenants, and on stdio."""

import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult, TextContent

from ragtune_ray.index import filters
from ragtune_ray.serving import mcp
from ragtune_ray.storage import artifacts
from tests.support.gateways import FakeBackend, Served, bearer, client, keys
from tests.support.index_changes import build_standing, settings_of, upsert

pytestmark = pytest.mark.anyio
TENANTS = ("index.tenant_field=owner",)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    build_standing(tmp_path)
    settings = settings_of(tmp_path).using(*TENANTS)
    running = Served(FakeBackend(), keys(user="a", other="b"), settings)
    yield running
    running.stop()


@asynccontextmanager
async def connected(served: Served, name: str, mode: str = "auto") -> AsyncIterator[Client]:
    async with (
        httpx.AsyncClient(headers=bearer(name), timeout=30) as http,
        Client(streamable_http_client(f"{served.address}/mcp", http_client=http), mode=mode) as session,
    ):
        yield session


def text_of(result: CallToolResult) -> str:
    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_the_tools_work_for_a_key_over_http(served: Served, mode: str) -> None:
    async with connected(served, "user", mode) as session:
        assert session.server_info.name == "ragtune-ray"
        tools = (await session.list_tools()).tools
        assert {tool.name: tool.input_schema.get("required", []) for tool in tools} == {
            "search": ["query"],
            "ask": ["question"],
            "list_versions": [],
        }
        assert all(tool.annotations and tool.annotations.read_only_hint for tool in tools)
        found = await session.call_tool("search", {"query": "vessel0", "top_k": 2, "filter": {"year": 2020}})
        assert not found.is_error, text_of(found)
        passages = found.structured_content["passages"]
        assert [(row["document_id"], row["text"][:23]) for row in passages] == [
            ("d0", "The code of vessel0 is "),
            ("d1", "The code of vessel1 is "),
        ]
        _, query, top_k, visible, _ = served.backend.asked[-1]
        assert (query, top_k) == ("vessel0", 2)
        assert visible == filters.combine(filters.tenant_filter("owner", "a"), filters.parse_filter({"year": 2020}))
        asked = await session.call_tool("ask", {"question": "What is the code of vessel0?"})
        assert asked.structured_content["answer"] == "It is secret0."
        assert asked.structured_content["citations"] == [{"id": "d0#0", "document_id": "d0", "start": 0, "end": 33}]
        assert [row["id"] for row in asked.structured_content["sources"]] == ["d0#0", "d1#0", "d2#0"]
        listed = (await session.call_tool("list_versions", {"limit": 2})).structured_content
        assert [(row["version"], row["operation"]) for row in listed["versions"]] == [
            ("000003", "delete"),
            ("000002", "upsert"),
        ]
        assert listed["current"] == "000003"
        assert "num_documents" not in listed["versions"][0], "which would count the documents of other tenants"


async def test_an_admin_sees_how_many_documents_there_are(served: Served) -> None:
    async with connected(served, "admin") as session:
        listed = (await session.call_tool("list_versions")).structured_content
        assert [row["num_documents"] for row in listed["versions"]] == [3, 4, 3]
        refused = await session.call_tool("search", {"query": "x"})
        assert (refused.is_error, text_of(refused)) == (
            True,
            "documents here belong to tenants, and this key has no tenant",
        )


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("search", {}, "query: Field required"),
        ("search", {"query": " "}, "query: must not be empty"),
        ("search", {"query": "x", "top_k": 0}, "top_k: Input should be greater than or equal to 1"),
        ("search", {"query": "x", "top_k": 1000}, "top_k: 1000; the limit is 50"),
        ("search", {"query": "x", "limit": 3}, "limit: Extra inputs are not permitted"),
        ("search", {"query": "x", "filter": {"a": []}}, "filter field 'a': [] allows no value"),
        ("ask", {"question": "x" * 9000}, "9,000 characters; the limit is 8,000"),
        ("list_versions", {"limit": 101}, "limit: Input should be less than or equal to 100"),
    ],
)
async def test_wrong_arguments_are_told_to_the_assistant(
    served: Served, tool: str, arguments: Any, message: str
) -> None:
    async with connected(served, "user") as session:
        refused = await session.call_tool(tool, arguments)
        assert refused.is_error
        assert message in text_of(refused)


async def test_keys_limits_and_content_types_apply_as_elsewhere() -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    accepted = {"accept": "application/json, text/event-stream"}
    async with client("serve.max_body_bytes=200", keys=keys()) as http:
        assert (await http.post("/mcp", json=message, headers=accepted)).status_code == 401
        for method in ("GET", "DELETE"):  # no streams of the server, and no sessions
            assert (await http.request(method, "/mcp", headers=bearer("user"))).status_code == 405
        headers = {**accepted, **bearer("user")}
        assert (
            await http.post("/mcp", json=message | {"params": {"x": "y" * 200}}, headers=headers)
        ).status_code == 413
        reply = await http.post("/mcp", json=message, headers=headers)
        assert {tool["name"] for tool in reply.json()["result"]["tools"]} == {"search", "ask", "list_versions"}
        notified = await http.post(
            "/mcp", json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=headers
        )
        assert (notified.status_code, notified.content) == (202, b"")
        assert (await http.post("/mcp", json=[], headers=headers)).status_code == 400


async def test_a_failure_inside_reaches_neither_the_client_nor_the_log(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("cannot encode SECRET with /home/x/model")

    monkeypatch.setattr(served.backend, "retrieve", broken)
    with caplog.at_level(logging.INFO):
        async with connected(served, "user") as session:
            failed = await session.call_tool("search", {"query": "SECRET"})
    assert (failed.is_error, text_of(failed)) == (True, "internal error; see the log of the endpoint")
    assert "the MCP tool search failed: RuntimeError" in caplog.text
    assert "SECRET" not in caplog.text
    assert "/home/x" not in caplog.text


async def test_without_the_extra_the_endpoint_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp.server.streamable_http_manager", None)
    monkeypatch.delitem(sys.modules, "ragtune_ray.serving.mcp.endpoint", raising=False)
    async with client() as http:
        reply = await http.post("/mcp", json={})
        assert (reply.status_code, reply.json()["error"]["code"]) == (501, "mcp_missing")
        assert "installing ragtune-ray[mcp]" in reply.json()["error"]["message"]
        assert (await http.get("/v1/models")).status_code == 200


def test_without_the_extra_the_command_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp.server.stdio", None)
    monkeypatch.delitem(sys.modules, "ragtune_ray.serving.mcp.local", raising=False)
    with pytest.raises(
        mcp.McpMissingError, match=r"needs the package mcp\S*, which is missing; run: .*pip install .*mcp"
    ):
        mcp.load("local")


def test_a_workspace_without_an_index_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(artifacts.ArtifactError, match=r"has no index; run: ragtune index"):
        mcp.load("local").serve_stdio(settings_of(tmp_path))


async def test_the_command_serves_a_workspace_on_stdio(tmp_path: Path, generator_directory: Path) -> None:
    """Also with a version that is published while it runs, and with other text written to stdout."""
    build_standing(tmp_path)
    settings = settings_of(tmp_path).using(f"generator.model={generator_directory}", "generator.max_new_tokens=4")
    path = tmp_path / "my.yaml"
    path.write_text(settings.model_dump_json())
    arguments = ["-m", "ragtune_ray.cli", "mcp", str(path)]
    async with Client(StdioServerParameters(command=sys.executable, args=arguments, cwd=str(Path.cwd()))) as session:
        found = await session.call_tool("search", {"query": "dust storms", "top_k": 1})
        assert [row["document_id"] for row in found.structured_content["passages"]] == ["mars"], text_of(found)
        assert found.structured_content["index_version"] == "000003"
        upsert(tmp_path, {"comet": "a comet has a tail of dust storms"})
        again = await session.call_tool("search", {"query": "a comet has a tail", "top_k": 1})
        assert [row["document_id"] for row in again.structured_content["passages"]] == ["comet"]
        listed = (await session.call_tool("list_versions", {"limit": 1})).structured_content
        assert listed["versions"][0] | {"created": ""} == {
            "version": "000004",
            "created": "",
            "operation": "upsert",
            "num_documents": 4,
            "num_passages": listed["versions"][0]["num_passages"],
        }
        asked = await session.call_tool("ask", {"question": "Who has a tail?"})
        assert not asked.is_error, text_of(asked)
        assert asked.structured_content["index_version"] == "000004"
        assert asked.structured_content["sources"][0]["document_id"] == "comet"
        assert isinstance(asked.structured_content["answer"], str)
        narrowed = await session.call_tool("search", {"query": "dust", "filter": {"year": 2020}})
        assert narrowed.structured_content["passages"] == []
        refused = await session.call_tool("ask", {"question": "word " * 5000})
        assert refused.is_error
