"""Handles `/v1/documents`: adds, replaces, deletes and lists documents."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import AliasChoices, Field, StrictInt
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ragtune_ray import config, schema
from ragtune_ray.index import filters
from ragtune_ray.ingest import rows
from ragtune_ray.ingest.parsing.text import ParseError, clean
from ragtune_ray.serving import requests
from ragtune_ray.serving.admission import Load
from ragtune_ray.serving.answers import timeout_as_504
from ragtune_ray.serving.api_keys import Key, requested_filter, visible_filter
from ragtune_ray.serving.backend import Backend, Change, Listed
from ragtune_ray.serving.requests import ApiError, RequestBody

CHANGE_SECONDS = 600.0
MAX_LISTED = 1000
LISTED = 100
"""Documents per page if a request names no limit."""
PARAMETERS = {
    "limit": f"Maximum number of documents, from 1 to {MAX_LISTED}; default {LISTED}.",
    "after": "The last_id of the previous page.",
    "filter": "Conditions on metadata as a JSON object, as in requests that retrieve.",
}
"""Query parameters of GET /v1/documents."""
SHOWN_REFUSALS = 100
"""How many refused documents a response lists."""
SHOWN_ID_CHARACTERS = 512
"""How much of the id of each a response repeats."""


class DocumentBody(RequestBody):
    """A document to add or replace."""

    document_id: str | StrictInt = Field(validation_alias=AliasChoices(*rows.DOCUMENT_IDS))
    """May also be named `_id` or `id`."""
    text: str
    title: str | None = None
    metadata: dict[str, Any] | None = None


class DocumentsRequest(RequestBody):
    """The body of POST /v1/documents."""

    documents: list[DocumentBody] = Field(min_length=1)


class DeletedDocuments(RequestBody):
    """The body of DELETE /v1/documents and of POST /v1/documents/delete."""

    document_ids: list[str | StrictInt] = Field(min_length=1, max_length=10_000)


@dataclass(frozen=True, slots=True)
class DocumentHandlers:
    """The handlers, one method per route. Keys are already checked."""

    settings: config.Config
    backend: Backend
    load: Load
    """The requests that retrieve, embed or list without generating."""

    async def upsert(self, body: bytes, _: Key) -> Response:
        """POST /v1/documents. If one document is refused, none is changed."""
        request = requests.parse(DocumentsRequest, body)
        return await self._publish(Change(upserted=tuple(checked_documents(request.documents, self.settings))))

    async def delete(self, body: bytes, _: Key) -> Response:
        """DELETE /v1/documents and POST /v1/documents/delete."""
        request = requests.parse(DeletedDocuments, body)
        ids = [_checked_id(number, given) for number, given in enumerate(request.document_ids, start=1)]
        return await self._publish(Change(deleted=tuple(dict.fromkeys(ids))))

    async def _publish(self, change: Change) -> Response:
        with timeout_as_504():
            return JSONResponse(dict(await self.backend.change_documents(change, CHANGE_SECONDS)))

    async def list_documents(self, request: Request, key: Key) -> Response:
        """GET /v1/documents?limit=...&after=...&filter=..."""
        parameters = _parameters(request.query_params)
        visible = listed_filter(self.settings, key, parameters["filter"])
        after = requests.checked_text(parameters["after"], "after", rows.MAX_ID_CHARACTERS)
        seconds = self.settings.serve.timeout_seconds
        with self.load.admit(seconds), timeout_as_504():
            listed = await self.backend.list_documents(visible, after, parameters["limit"], seconds)
        return JSONResponse(listed_body(listed))


def checked_documents(given: Sequence[DocumentBody], settings: config.Config) -> list[Mapping[str, Any]]:
    """Check documents by the rules for rows of files, and return them as such rows.

    Raises:
        ApiError: 400; `rejected` lists the number, id and reason of each document that is refused.
    """
    found: dict[str, Mapping[str, Any]] = {}
    rejected: list[dict[str, Any]] = []
    tenantless: list[dict[str, Any]] = []
    tenant_field = settings.index.tenant_field
    for number, body in enumerate(given, start=1):
        named = clean(body.document_id[:SHOWN_ID_CHARACTERS]) if isinstance(body.document_id, str) else body.document_id
        refused = {"number": number, "document_id": named}
        try:
            document = _checked_document(body, settings, found)
        except ParseError as error:
            rejected.append({**refused, "reason": str(error)})
            continue
        found[document.document_id] = {
            "document_id": document.document_id,
            "text": document.text,
            "title": document.title,
            "metadata": json.loads(document.metadata),
        }
        if tenant_field and (reason := rows.missing_tenant(document, tenant_field)):
            tenantless.append({**refused, "reason": reason})
    if rejected or tenantless:
        raise _refusal(rejected + tenantless, len(given), "documents_rejected" if rejected else "tenant_missing")
    return list(found.values())


def _checked_document(body: DocumentBody, settings: config.Config, earlier: Container[str]) -> schema.Document:
    try:
        requests.checked_text(str(body.document_id), "document_id", rows.MAX_ID_CHARACTERS)
    except ApiError as error:
        raise ParseError(error.message) from None
    document = rows.document_from_row(body.model_dump(), "", settings.corpus.max_document_bytes)
    if document.document_id in earlier:
        raise ParseError("an earlier document of this request has the same id")
    return document


def _refusal(rejected: Sequence[dict[str, Any]], num_given: int, code: str) -> ApiError:
    message = (
        f"documents: {len(rejected)} of {num_given} refused, so nothing was changed; number {rejected[0]['number']}: "
        f"{rejected[0]['reason']}"
    )
    return ApiError(400, message, code=code, param="documents", details={"rejected": rejected[:SHOWN_REFUSALS]})


def _checked_id(number: int, given: str | int) -> str:
    try:
        return rows.checked_id(given, "document_id")
    except ParseError as error:
        raise requests.invalid("document_ids", f"number {number}: {error}") from None


def listed_filter(settings: config.Config, key: Key, requested: dict[str, Any] | None) -> filters.Filter:
    """Which documents a key may list: an admin key all, since it may change all; another key those that it may search."""
    return requested_filter(requested) if key.admin else visible_filter(settings, key, requested)


def _parameters(given: QueryParams) -> dict[str, Any]:
    unknown = sorted(given.keys() - PARAMETERS.keys())
    if unknown:
        raise requests.invalid(unknown[0][:200], f"supported are {', '.join(PARAMETERS)}", code="unknown_parameter")
    limit = given.get("limit", str(LISTED))
    if not limit.isdecimal() or len(limit) > 9 or not 1 <= int(limit) <= MAX_LISTED:
        raise requests.invalid("limit", f"must be a number from 1 to {MAX_LISTED}")
    try:
        chosen = json.loads(given.get("filter", "{}"))
    except (ValueError, RecursionError):
        chosen = None
    if not isinstance(chosen, dict):
        raise requests.invalid("filter", 'must be a JSON object, such as {"year": 2020}', code="invalid_filter")
    return {"limit": int(limit), "after": given.get("after", ""), "filter": chosen}


def listed_body(listed: Listed) -> dict[str, Any]:
    """A page of documents as a list in OpenAI's format; `last_id` is the `after` of the next page."""
    data = [
        {
            "object": "document",
            "document_id": document.document_id,
            "title": document.title,
            "metadata": None if document.metadata is None else json.loads(document.metadata),
            "num_passages": document.num_passages,
        }
        for document in listed.documents
    ]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["document_id"] if data else None,
        "last_id": data[-1]["document_id"] if data else None,
        "has_more": listed.has_more,
        "index_version": listed.index_version,
    }
