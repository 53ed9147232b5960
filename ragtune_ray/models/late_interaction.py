"""Scores pairs of query and passage by their token vectors (late interaction, as in ColBERT: Khattab and Zaharia 2020).

The score of a pair is the sum over the query's tokens of the largest cosine with a token of the passage. An encoder's token
vectors score well before any training, unlike a cross-encoder with a new head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ragtune_ray.models.token_batches import token_ids

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "MultiVectorEncoder"
"""Name of such models in sentence-transformers."""


def from_encoder(encoder: Any, query_prefix: str, passage_prefix: str) -> Any:
    """A late-interaction model with the weights of an encoder of sentence-transformers.

    The vectors of special tokens, such as [CLS], do not count. The prefixes become the model's prompts.
    """
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.multi_vector_encoder import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    counted = MultiVectorMask(list(encoder.tokenizer.all_special_tokens), skiplist_tasks=["query", "document"])
    modules = [encoder[0], counted, Normalize(module_input_name="token_embeddings")]
    prompts = {"query": query_prefix, "document": passage_prefix}
    return MultiVectorEncoder(modules=modules, prompts=prompts, device=str(encoder.device))


def is_late_interaction(model: Any) -> bool:
    """Whether a model of sentence-transformers has one vector per token."""
    return type(model).__name__ == MODEL_TYPE


def encode_pairs(model: Any, pairs: Sequence[tuple[str, str]]) -> dict[str, list[list[int]]]:
    """The token ids of each pair: `query_ids`, and `input_ids` for the passage."""
    queries, passages = zip(*pairs, strict=True)
    texts = {"query_ids": ("query", queries), "input_ids": ("document", passages)}
    return {
        name: token_ids(model, [model.prompts[task] + text for text in some]) for name, (task, some) in texts.items()
    }


def pad_pairs(model: Any, encoded: dict[str, list[list[int]]]) -> dict[str, Tensor]:
    """A batch of `encode_pairs`, padded, with the masks `query_mask` and `attention_mask`."""
    found: dict[str, Tensor] = {}
    for name, mask in (("query_ids", "query_mask"), ("input_ids", "attention_mask")):
        padded = model.tokenizer.pad({"input_ids": encoded[name]}, padding=True, return_tensors="pt")
        found |= {name: padded["input_ids"], mask: padded["attention_mask"]}
    return found


def pair_scores(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The score of each pair of a batch of `pad_pairs`, (num_pairs,); gradients reach the model."""
    query = model({"input_ids": batch["query_ids"], "attention_mask": batch["query_mask"]}, task="query")
    passage = model({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}, task="document")
    cosines = query["token_embeddings"].float() @ passage["token_embeddings"].float().transpose(1, 2)
    cosines = cosines.masked_fill(~passage["attention_mask"].bool()[:, None, :], -1.0)
    scores: Tensor = (cosines.amax(dim=2) * query["attention_mask"]).sum(dim=1)
    return scores


def score(model: Any, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """The score of each pair, float32 (num_pairs,); each text is encoded once."""
    from sentence_transformers.util.similarity import maxsim_pairwise

    queries, passages = (list(dict.fromkeys(texts)) for texts in zip(*pairs, strict=True))
    of_query = dict(zip(queries, model.encode_query(queries), strict=True))
    of_passage = dict(zip(passages, model.encode_document(passages), strict=True))
    found = maxsim_pairwise([of_query[query] for query, _ in pairs], [of_passage[text] for _, text in pairs])
    return np.asarray(found.float().cpu(), dtype=np.float32)
