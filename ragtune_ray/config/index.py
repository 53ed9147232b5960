"""Settings of `index`: how vectors are stored and how hits are found."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ragtune_ray.config.section import Section

__all__ = ["Index", "IndexKind", "Retrieval", "RetrievalMode"]

RetrievalMode = Literal["dense", "lexical", "hybrid"]
IndexKind = Literal["auto", "flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"]


class Index(Section):
    """The searchable whole."""

    kind: IndexKind = "auto"
    """FAISS structure; `auto`: exact (flat) up to 100,000 vectors of 384 dimensions, beyond that inverted lists of 8-bit codes
    (ivf_sq), or of product-quantised codes (ivf_pq) where the former exceed `memory_bytes`; both are re-scored exactly."""
    memory_bytes: int = Field(8 * 2**30, gt=0)
    """Memory that what is searched of the vectors may take, for `auto` to choose by."""
    target_recall: float = Field(0.95, gt=0, le=1)
    """Share of the true ten nearest vectors that an approximate index must find; how much it looks at is calibrated to it."""
    segment_passages: int = Field(250_000, gt=0)
    """Passages per segment: the parallel, immutable piece of an index."""
    compact_segments: int = Field(8, ge=2)
    """More small segments than this, left by upserts, are merged at the end of the next upsert or index."""
    compact_deleted_share: float = Field(0.2, gt=0, le=1)
    """A segment of which more than this share is deleted is rewritten without it at the same occasion."""
    tenant_field: str = ""
    """Metadata field that says whose a document is; with it, every retrieval must name a `retrieval.tenant`."""
    language: Literal["en", "none"] = "en"
    """Stop words and stemming of the lexical index; `none` for neither. Unspaced scripts are always cut into bigrams."""


class Retrieval(Section):
    """How hits are found."""

    mode: RetrievalMode = "hybrid"
    """Dense vectors, BM25, or both fused by reciprocal rank."""
    top_k: int = Field(5, gt=0)
    """Hits per query, and passages per prompt."""
    candidates: int = Field(50, gt=0)
    """Hits taken from each of dense and lexical before they are fused or reranked."""
    fusion_constant: float = Field(5.0, ge=0)
    """The k of reciprocal-rank fusion, 1 / (k + rank)."""
    reranker: str = ""
    """A cross-encoder (directory or hub name) that re-scores the candidates; empty means none."""
    filter: dict[str, Any] = {}  # noqa: RUF012  # pydantic copies it
    """Conditions on documents' metadata, all of which must hold: `{product: pump, year: {gte: 2020}, language: [de, en]}`."""
    tenant: str = ""
    """Find only documents of this tenant; wanted where `index.tenant_field` is set."""
