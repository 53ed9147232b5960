"""Settings of `ingest`: documents, questions, passages."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ragtune_ray.config.section import Section

__all__ = ["Chunking", "Corpus", "Queries", "SplitName"]

SplitName = Literal["all", "train", "validation", "test"]


class Corpus(Section):
    """Where documents come from."""

    path: str = ""
    """A folder of .md .txt .html .pdf .docx, a .jsonl or .parquet file, a BEIR folder, or SQuAD JSON; local or s3://."""
    strict: bool = False
    """Stop at the first bad row or file instead of writing it to rejects.jsonl and going on."""
    max_document_bytes: int = Field(32 * 2**20, gt=0)
    """A document (or a line of a .jsonl file) longer than this is rejected."""
    unit_bytes: int = Field(4 * 2**20, gt=0)
    """Input bytes that one reading task takes; larger files are read in ranges of about this size."""


class Queries(Section):
    """Where questions come from."""

    path: str = ""
    """A .jsonl or .parquet file, a BEIR folder, or SQuAD JSON; local or s3://."""
    split: SplitName = "all"
    """Which queries to use, by their `split` column (BEIR: the qrels file of that name)."""
    split_by: Literal["given", "document", "folder"] = "given"
    """`given`: queries say their split. `document`: drawn so that no document serves two splits. `folder`: nor does a folder of
    documents (what stands before the last / of their ids; in SQuAD, an article)."""
    split_shares: tuple[float, float, float] = (4, 1, 1)
    """Relative sizes of train, validation and test where they are drawn: the chance of a document (or folder) to fall there."""
    split_seed: int = 0
    """Which splits are drawn; apart from `seed`, so that runs with several seeds are examined on the same queries. A small corpus
    may fall unevenly: then take another."""
    limit: int = Field(0, ge=0)
    """Use only the first so many queries; 0 means all of them."""

    @model_validator(mode="after")
    def _shares_are_shares(self) -> Self:
        if min(self.split_shares) < 0 or not sum(self.split_shares):
            raise ValueError(f"queries.split_shares {self.split_shares}: none may be negative and one must be positive")
        return self


class Chunking(Section):
    """How documents are cut into passages."""

    size_tokens: int = Field(256, ge=8)
    """Longest passage, in tokens of the encoder (special tokens included)."""
    overlap_tokens: int = Field(32, ge=0)
    """Tokens that neighbouring passages of a document share, at most."""

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        if self.overlap_tokens * 2 > self.size_tokens:
            raise ValueError(
                f"chunking.overlap_tokens ({self.overlap_tokens}) must be at most half of "
                f"chunking.size_tokens ({self.size_tokens})"
            )
        return self
