"""The probability of entailment, against transformers itself, whatever the order of the labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from ragtune_ray.models.entailment import EntailmentModel
from ragtune_ray.models.weights import ModelError
from tests.support.models import save_nli_model

PAIRS = [("the moon is far", "it is far"), ("mars", "mars is red and has two moons"), ("a" * 300, "b")]


@pytest.fixture(scope="module")
def directory(encoder_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nli")
    save_nli_model(directory, encoder_directory)
    return directory


def test_probabilities_are_those_of_transformers(directory: Path) -> None:
    found = EntailmentModel(str(directory), "cpu").probabilities(PAIRS)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    with torch.inference_mode():
        expected = [
            model(**tokenizer(*pair, return_tensors="pt", truncation=True, max_length=128))
            .logits.softmax(-1)[0, 1]
            .item()
            for pair in PAIRS
        ]
    assert len({round(value, 2) for value in expected}) > 1
    assert found == pytest.approx(expected, abs=0.02)  # bfloat16 where the hardware has it
    assert EntailmentModel(str(directory), "cpu").probabilities([]).shape == (0,)
    assert found.dtype == np.float32


def test_a_model_without_a_label_for_entailment_is_refused(directory: Path, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(directory)
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path)
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no label 'entailment' \(it has: LABEL_0, LABEL_1, LABEL_2\)"):
        EntailmentModel(str(tmp_path))
