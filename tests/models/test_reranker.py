"""The reranker returns the scores of its cross-encoder, or those of late interaction."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ragtune_ray import config
from ragtune_ray.models.layout import ModelError
from ragtune_ray.models.reranker import Reranker
from ragtune_ray.training import trainable
from tests.support.models import save_cross_encoder

PAIRS = [("moon", "the moon"), ("mars", "a much longer passage about mars and its moons"), ("moon", "x")]


def test_scores_of_a_cross_encoder_equal_those_of_the_model(encoder_directory: Path, tmp_path: Path) -> None:
    save_cross_encoder(encoder_directory, tmp_path)
    assert Reranker(str(tmp_path), "cpu").first_stage_weight == 0
    (tmp_path / "reranker.json").write_text('{"first_stage_weight": 4.0}')
    assert Reranker(str(tmp_path), "cpu").first_stage_weight == 4
    for damaged, reason in (("{", "is damaged"), ('{"first_stage_weight": "x"}', "no number")):
        (tmp_path / "reranker.json").write_text(damaged)
        with pytest.raises(ModelError, match=rf"{tmp_path}: reranker\.json .*{reason}"):
            Reranker(str(tmp_path), "cpu")
    (tmp_path / "reranker.json").unlink()
    scores = Reranker(str(tmp_path), "cpu").score(PAIRS)
    model, tokenizer = (kind.from_pretrained(tmp_path) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    with torch.inference_mode():
        logits = [float(model(**tokenizer(*pair, return_tensors="pt")).logits[0, 0]) for pair in PAIRS]
    # One label: sentence-transformers passes the logit through a sigmoid; only the order matters.
    expected = 1 / (1 + np.exp(-np.array(logits)))
    np.testing.assert_allclose(scores, expected, atol=0.02)  # bfloat16 where the CPU has it
    assert scores.argsort().tolist() == expected.argsort().tolist()


def test_scores_of_late_interaction_equal_those_of_training(encoder_directory: Path, tmp_path: Path) -> None:
    settings = config.Config().using("training.objective=reranker", "encoder.query_prefix='who '")
    trainable.save_model(settings, encoder_directory, {}, tmp_path)
    expected = trainable.load_objective(settings, encoder_directory, {}).score(PAIRS)  # type: ignore[union-attr]
    scores = Reranker(str(tmp_path), "cpu").score(PAIRS)
    np.testing.assert_allclose(scores, expected, rtol=0.02)  # bfloat16 where the CPU has it
    assert scores.dtype == np.float32
    (tmp_path / "reranker.json").write_text('{"first_stage_weight": 4.0}')
    assert Reranker(str(tmp_path), "cpu").first_stage_weight == 4


def test_an_encoder_is_used_for_late_interaction(encoder_directory: Path) -> None:
    settings = config.Config().using("training.objective=reranker")
    expected = trainable.load_objective(settings, encoder_directory, {}).score(PAIRS)  # type: ignore[union-attr]
    np.testing.assert_allclose(Reranker(str(encoder_directory), "cpu").score(PAIRS), expected, rtol=0.02)


def test_no_pairs_have_no_scores(encoder_directory: Path) -> None:
    assert Reranker(str(encoder_directory), "cpu").score([]).shape == (0,)
