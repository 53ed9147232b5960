"""Trains with TRL's SFTTrainer on given rows; `bench.training` runs this in TRL's environment. Prints one JSON object."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Train on the rows of the file named by the argument and print the rate."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
        """Records the seconds of each step."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self._began)

    clock = Clock()
    settings = SFTConfig(
        output_dir=given["output"] + "/trl",
        per_device_train_batch_size=given["batch"],
        max_steps=len(given["tokens"]),
        learning_rate=given["learning_rate"],
        max_length=given["max_length"],
        bf16=given["bfloat16"],
        use_cpu=True,
        completion_only_loss=True,
        packing=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(given["rows"]),
        processing_class=AutoTokenizer.from_pretrained(given["model"]),
        callbacks=[clock],
    )
    trainer.train()
    first = given["warm_up_steps"]
    print(json.dumps({"tokens_per_second": sum(given["tokens"][first:]) / sum(clock.seconds[first:])}))


if __name__ == "__main__":
    main()
