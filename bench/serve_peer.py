"""Serves the peer of `bench.serve`: FastAPI with `model.generate` behind one lock. Prints its address."""

from __future__ import annotations

import socket
import sys
import threading
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from transformers import AutoModelForCausalLM, AutoTokenizer

from ragtune_ray import config
from ragtune_ray.answering import prompts
from ragtune_ray.generation.chat import ChatTokenizer
from ragtune_ray.index.retriever import open_retriever
from ragtune_ray.models import weights
from ragtune_ray.models.hardware import resolve_precision


def main() -> None:
    """Serve until the process is terminated."""
    settings = config.Config.model_validate_json(sys.argv[1])
    directory = weights.resolve(settings.generator.model).directory
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat = ChatTokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=resolve_precision(settings.generator.precision, "cpu")
    ).eval()
    retriever = open_retriever(settings)
    lock = threading.Lock()
    app = FastAPI()

    @app.post("/ask")
    def ask(body: dict[str, str]) -> dict[str, Any]:
        with lock:
            ((passages, _),) = retriever.retrieve_passages([body["question"]], settings.retrieval.top_k)
            prompt = prompts.build_prompt(
                body["question"],
                passages,
                system=settings.prompt.system,
                max_tokens=settings.prompt.max_tokens,
                count_tokens=chat.count_tokens,
                render=chat.render,
            )
            ids = torch.tensor(chat.encode([chat.render(prompt.messages)]))
            with torch.inference_mode():
                made = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=settings.generator.max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.eos_token_id,
                )
            return {"answer": chat.decode(made[0, ids.shape[1] :].tolist())}

    listening = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listening])


if __name__ == "__main__":
    main()
