"""Settings of `index`: how vectors are stored and how hits are found."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ragtune_ray.config.section import Section

RetrievalMode = Literal["dense", "lexical", "hybrid"]
WordLanguage = Literal[
    "en", "none", "ar", "ca", "cs", "da", "de", "el", "es", "et", "eu", "fa", "fi", "fr", "ga", "hi", "hu", "hy", "id", "it",
    "lt", "ne", "nl", "no", "pl", "pt", "ro", "ru", "sr", "sv", "ta", "tr",
]  # fmt: skip
"""Languages with a stemmer, by their ISO 639-1 codes."""
Rewrite = Literal["none", "last_turns", "generator"]
IndexKind = Literal["auto", "flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"]


class Index(Section):
    """How the vectors and words of all passages are stored."""

    kind: IndexKind = "auto"
    """FAISS structure. `auto` uses exact search (`flat`) up to 100,000 vectors of 384 dimensions; beyond that, inverted
    lists of 8-bit codes (`ivf_sq`), or of product-quantized codes (`ivf_pq`) if 8-bit codes would exceed
    `index.memory_bytes`. Hits of both are re-scored exactly."""
    memory_bytes: int = Field(8 * 2**30, gt=0)
    """Memory for searching vectors, in bytes; `index.kind=auto` chooses a structure that fits."""
    target_recall: float = Field(0.95, gt=0, le=1)
    """Share of the ten nearest vectors that an approximate index must find. Search effort is calibrated to reach it."""
    segment_passages: int = Field(250_000, gt=0)
    """Passages per segment. A segment is an immutable part of the index; segments are built and searched in parallel."""
    compact_segments: int = Field(8, ge=2)
    """Merge small segments at the end of `ragtune index` or an upsert if there are more than this many."""
    compact_deleted_share: float = Field(0.2, gt=0, le=1)
    """At the same time, rewrite each segment if more than this share of its passages is deleted."""
    tenant_field: str = ""
    """Metadata field that names a document's tenant. If it is set, every retrieval must set `retrieval.tenant`. Empty: no
    tenants."""
    lexical_titles: bool = True
    """BM25 finds passages by the title of their document, too. This is decided when an index is first built; an index that was
    built without titles stays without them."""
    language: WordLanguage = "en"
    """Language whose endings the lexical index ignores (stemming) and whose stop words it drops from queries; `none`: neither.
    There are stop words for da, de, en, es, fr, it, nl, no, pt, ru, sv and tr. Text in scripts without spaces, such as Chinese,
    is always indexed by character bigrams. An index keeps its language until it is built again."""

    def identity(self) -> dict[str, Any]:
        """The part of a build's identity for these settings; without titles, the same as before titles could be searched."""
        return self.model_dump(mode="json", exclude=set() if self.lexical_titles else {"lexical_titles"})


class Retrieval(Section):
    """How hits are found."""

    mode: RetrievalMode = "hybrid"
    """`dense`: vectors. `lexical`: BM25. `hybrid`: both, fused (`retrieval.fusion`)."""
    top_k: int = Field(5, gt=0)
    """Hits per query, and passages per prompt."""
    candidates: int = Field(50, gt=0)
    """Hits taken from each of dense and lexical search before they are fused or reranked."""
    fusion: Literal["scores", "ranks"] = "scores"
    """How `hybrid` combines both searches. `scores`: a weighted mean of the cosine and of BM25 divided by the query's best
    BM25. `ranks`: reciprocal-rank fusion."""
    lexical_weight: float = Field(0.35, ge=0, le=1)
    """Weight of BM25 with `retrieval.fusion=scores`, from 0 (only the cosine) to 1 (only BM25)."""
    unknown_script_weight: float = Field(0.9, ge=0, le=1)
    """Weight of BM25 instead of `retrieval.lexical_weight`, for a query in a script that the encoder does not know.
    `ragtune index` measures which scripts it knows."""
    fusion_constant: float = Field(5.0, ge=0)
    """The constant k of `retrieval.fusion=ranks`, 1 / (k + rank). Smaller values give more weight to the first ranks."""
    reranker: str = ""
    """Model that re-scores the candidates: the directory or hub name of a cross-encoder, of a late-interaction model, or of an
    encoder, whose token vectors then score (that of `encoder.model` will do). `WORKSPACE/models/reranker` is the newest one that
    `training.objective=reranker` trained. Empty: none."""
    rerank_candidates: int = Field(0, ge=0)
    """The reranker re-scores only this many of the fused hits; the others follow in their order. Its time grows with
    this number. 0: as many as `retrieval.candidates`, or `retrieval.top_k` if that is more."""
    first_stage_weight: float | None = Field(None, ge=0)
    """The score of a reranked hit is the reranker's score plus this weight times (the hit's retrieval score / the query's best
    retrieval score). 0: the reranker's score alone. null: the weight that was fitted when the reranker was trained, or 0 if it
    was not trained here."""
    filter: dict[str, Any] = {}  # noqa: RUF012  # pydantic copies it
    """Conditions on the metadata of documents; all must be met. Empty: no condition. Example:
    `{product: pump, year: {gte: 2020}, language: [de, en]}`."""
    rewrite: Rewrite = "last_turns"
    """The text with which the index is searched for a question that follows a conversation. `none`: the question as it is.
    `last_turns`: the user's last two turns with the question, and the question alone; the hits of both searches are fused by
    reciprocal rank. `generator`: a question that stands alone, written by the generator of the arm; if its text is not usable,
    the question as it is. Questions without `messages` are not rewritten. `ragtune calibrate` measures what is best."""
    decompose: bool = False
    """Let the generator of the arm split a question into up to three sub-questions, search for these and the whole question,
    and fuse the hits by reciprocal rank. The answer is still to the whole question. `ragtune calibrate` measures whether it
    helps."""
    tenant: str = ""
    """Find only documents of this tenant. Required if `index.tenant_field` is set, otherwise empty."""

    @property
    def fuses_scores(self) -> bool:
        """Whether hits are fused by their scores, not by their ranks."""
        return self.mode == "hybrid" and self.fusion == "scores"

    @property
    def num_reranked(self) -> int:
        """Hits that the reranker re-scores, however many are searched for: metrics then describe what answers are shown."""
        pool = max(self.top_k, self.candidates)
        return min(self.rerank_candidates or pool, pool)

    def identity(self) -> dict[str, Any]:
        """The part of a run's identity for these settings; newer ones that are not set or have no effect are left out."""
        unused = set() if self.fuses_scores else {"fusion", "lexical_weight", "unknown_script_weight"}
        for name, default in (("rerank_candidates", 0), ("first_stage_weight", None)):
            if not self.reranker or getattr(self, name) == default:
                unused.add(name)
        unused |= {
            name
            for name, default in (("rewrite", "last_turns"), ("decompose", False))
            if getattr(self, name) == default
        }
        return self.model_dump(mode="json", exclude=unused)
