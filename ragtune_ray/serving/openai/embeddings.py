"""POST /v1/embeddings: the request, and the vectors in OpenAI's format."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse, Response

from ragtune_ray import config
from ragtune_ray.serving.answers import timeout_as_504
from ragtune_ray.serving.backend import Backend
from ragtune_ray.serving.openai import fields
from ragtune_ray.serving.requests import RequestBody, checked_text, invalid, limited


def _texts_alone(given: Any) -> Any:
    if isinstance(given, list) and not all(isinstance(each, str) for each in given):
        raise PydanticCustomError(
            "token_ids",
            "must be a text or a list of texts; token ids are those of another model's tokenizer; with LangChain, set "
            "OpenAIEmbeddings(check_embedding_ctx_length=False)",
        )
    return [given] if isinstance(given, str) else given


class EmbeddingsRequest(RequestBody):
    """The body of POST /v1/embeddings."""

    input: Annotated[
        list[str], Field(min_length=1), BeforeValidator(_texts_alone, json_schema_input_type=str | list[str])
    ]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    input_type: Literal["query", "passage"] = "query"
    """Extension: selects the encoder's prompt prefix (and model) for queries or passages."""


def embedding_model(settings: config.Config) -> str | None:
    """The name of the model that embeds; None if there is none, because retrieval is lexical.

    >>> embedding_model(config.Config())
    'all-MiniLM-L6-v2'
    """
    return None if settings.retrieval.mode == "lexical" else settings.encoder.model.rstrip("/").rsplit("/", 1)[-1]


async def embed(settings: config.Config, backend: Backend, body: bytes) -> Response:
    """POST /v1/embeddings."""
    request = fields.parse(EmbeddingsRequest, body, fields.EMBEDDINGS)
    limits, model = settings.serve, embedding_model(settings)
    if request.model and model and request.model != model:
        raise invalid("model", f"this endpoint embeds with {model}", status=404, code="model_not_found")
    limited(len(request.input), limits.max_texts, "input")
    texts = [checked_text(text, "input", limits.max_question_characters) for text in request.input]
    if not all(text.strip() for text in texts):
        raise invalid("input", "texts must not be empty")
    with timeout_as_504():
        found = await backend.embed(texts, request.input_type, limits.timeout_seconds)
    dimension = found.vectors.shape[1]
    if request.dimensions not in (None, dimension):
        raise invalid("dimensions", f"must be {dimension} for this encoder")
    return JSONResponse(embeddings_body(found.vectors, found.model, request.encoding_format, found.num_tokens))


def embeddings_body(vectors: np.ndarray, model: str, encoding: str, num_tokens: int) -> dict[str, Any]:
    """Vectors (num_texts, dimension) in OpenAI's format; `base64` means little-endian float32."""
    rows: list[Any] = (
        [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
        if encoding == "base64"
        else vectors.astype(np.float32).tolist()
    )
    return {
        "object": "list",
        "model": model,
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
