"""Settings of `ingest`: documents, questions, passages."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from ragtune_ray.config.section import Section

SplitName = Literal["all", "train", "validation", "test"]


class Corpus(Section):
    """Where the documents come from."""

    path: str = ""
    """Local or s3://: a folder of .md, .txt, .rst, .html, .pdf, .docx, .pptx, .xlsx, .csv, .epub or .eml files, a .jsonl or
    .parquet file, BEIR or SQuAD JSON."""
    strict: bool = False
    """Stop at the first bad row, bad file or question about documents that are not in the index. By default such input is skipped
    and written to rejects.jsonl."""
    encoding: str = "auto"
    """Encoding of .txt and .md files: a name such as `windows-1252` or `gb18030`. `auto`: UTF-8, or another encoding if only one
    gives a plausible text; otherwise the file is a reject."""
    max_document_bytes: int = Field(32 * 2**20, gt=0)
    """Reject any document (or line of a .jsonl file) longer than this many bytes."""
    max_parse_seconds: float = Field(60.0, gt=0)
    """Reject a file whose parser takes longer than this. A file that crashes its parser is rejected, too."""
    sheets: Literal["table", "rows"] = "table"
    """What the rows of .csv and .xlsx files become. `table`: each file is a document that contains its tables. `rows`: each row
    is a document, with the columns as in a .jsonl file; without a column `text`, its text is `column: value` line by line."""
    ocr: Literal["none", "tesseract"] = "none"
    """How pages of PDFs without text, such as scanned ones, are read. `tesseract`: by that command, which must be installed
    (Debian: `apt-get install tesseract-ocr`). A page takes seconds, so raise `max_parse_seconds`."""
    ocr_languages: str = Field("eng", pattern=r"^[A-Za-z_/]+(\+[A-Za-z_/]+)*$")
    """Languages of scanned pages by tesseract's names, such as `deu+eng`."""
    file_times: bool = False
    """Add the time of last modification to the metadata of document files (`modified`), as it was when their content was indexed.
    Indexes of equal files then differ if the times do. Touching a file changes nothing."""
    fingerprint: Literal["listing", "sha256"] = "listing"
    """How files are recognized as unchanged before they are read. `listing`: by size and times, in S3 by size and ETag; a file
    that was touched or moved is read again, but its documents are not embedded again. `sha256`: every file is read to plan,
    so that only its content counts. What was indexed is identified by its content in both cases."""
    unit_bytes: int = Field(0, ge=0)
    """Input bytes per reading task; larger files are read in ranges of about this size. 0: chosen from the size of the input,
    so that there are about 256 tasks, of 256 KiB to 64 MiB each."""

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, name: str) -> str:
        try:
            known = name == "auto" or "".encode(name) is not None
        except (LookupError, ValueError):
            known = False
        if not known:
            raise ValueError(
                f"corpus.encoding {name!r} is unknown; write auto, or a name such as windows-1252 or gb18030"
            )
        return name


class Queries(Section):
    """Where the questions come from, and which of them are used."""

    path: str = ""
    """A .jsonl or .parquet file, a BEIR folder, or SQuAD JSON; local or s3://."""
    split: SplitName = "all"
    """The split to use: a value of the `split` column (in BEIR, the qrels file of that name). `all` uses every query."""
    split_by: Literal["given", "document", "folder"] = "given"
    """How queries get their split. `given`: from the input. `document`: drawn at random so that no document is relevant in
    two splits. `folder`: the same for whole folders of documents (a document id up to its last `/`; in SQuAD, an article)."""
    split_shares: tuple[float, float, float] = (4, 1, 1)
    """Relative sizes of train, validation and test for drawn splits. The numbers need not add up to 1."""
    split_seed: int = 0
    """Seed of drawn splits, separate from `seed`, so that runs with different seeds use the same test questions. If a small
    corpus is divided unevenly, try another value."""
    split_record: str = ""
    """File in which drawn splits are kept, such as `workspace/splits.json`; local or s3://. With it, splits keep to their
    shares, also of questions without an answer, and a document keeps its split when others are added. Keep the file as long as
    the models that were trained on its splits. Empty: a hash decides for each document, so that small splits may be uneven."""
    unindexed: Literal["leave_out", "keep"] = "leave_out"
    """Questions whose relevant documents are all missing from the index, so that no retriever can find them. `leave_out`:
    they are rejects, in every arm alike; an error with `corpus.strict`. `keep`: they are asked and count as missed."""
    own_documents: Literal["auto", "leave_out", "keep"] = "auto"
    """Whether the document with a query's id may be the query itself. `leave_out`: it is no hit of the query, is not shown in its
    prompt and is no hard negative. `keep`: equal ids mean nothing. `auto`: `leave_out` in a BEIR folder, as in BEIR's own
    evaluation; else `keep`."""
    limit: int = Field(0, ge=0)
    """Use only the first N of the selected queries. 0: all."""
    order: Literal["given", "shuffled"] = "given"
    """Order of the selected queries. `given`: as in the input. `shuffled`: drawn by `split_seed`, so that `limit` takes a
    random sample."""

    @model_validator(mode="after")
    def _shares_are_shares(self) -> Self:
        if min(self.split_shares) < 0 or not sum(self.split_shares):
            raise ValueError(f"queries.split_shares {self.split_shares}: none may be negative, one must be positive")
        return self


class Chunking(Section):
    """How documents are cut into passages."""

    size_tokens: int = Field(256, ge=8)
    """Maximum passage length, in tokens of the encoder, special tokens included."""
    overlap_tokens: int = Field(32, ge=0)
    """Maximum number of tokens that consecutive passages of a document share. 0: none."""

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        if self.overlap_tokens * 2 > self.size_tokens:
            raise ValueError(
                f"chunking.overlap_tokens ({self.overlap_tokens}) must be at most half of size_tokens ({self.size_tokens})"
            )
        return self
