"""The reranker returns the scores of its cross-encoder."""

from pathlib import Path

import numpy as np

from ragtune_ray.models.reranker import Reranker


def test_reranker_scores_equal_those_of_the_model(encoder_directory: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(encoder_directory)
    tokenizer.save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    described = BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **shape)
    model = BertForSequenceClassification(described).eval()
    model.save_pretrained(tmp_path)
    pairs = [("moon", "the moon"), ("mars", "a much longer passage about mars and its moons"), ("sun", "x")]
    assert Reranker(str(tmp_path), "cpu").first_stage_weight == 0
    (tmp_path / "reranker.json").write_text('{"first_stage_weight": 4.0}')
    assert Reranker(str(tmp_path), "cpu").first_stage_weight == 4
    scores = Reranker(str(tmp_path), "cpu").score(pairs)
    with torch.inference_mode():
        logits = [float(model(**tokenizer(*pair, return_tensors="pt")).logits[0, 0]) for pair in pairs]
    # One label: sentence-transformers passes the logit through a sigmoid; only the order matters.
    expected = 1 / (1 + np.exp(-np.array(logits)))
    np.testing.assert_allclose(scores, expected, atol=0.02)  # bfloat16 where the CPU has it
    assert scores.argsort().tolist() == expected.argsort().tolist()
    assert Reranker(str(tmp_path), "cpu").score([]).shape == (0,)
