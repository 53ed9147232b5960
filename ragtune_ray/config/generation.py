"""Settings of `generation`: the generator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ragtune_ray.config.models import Precision
from ragtune_ray.config.section import Section

__all__ = ["Generator"]


class Generator(Section):
    """The causal language model."""

    model: str = "SmolLM2-135M-Instruct"
    """An embedded model's name, a directory or a hub name; with engine `openai`, the server's name for it."""
    engine: Literal["transformers", "openai"] = "transformers"
    """Generate in this process, or ask any OpenAI-compatible server (vLLM, Ray Serve LLM)."""
    precision: Precision = "auto"
    """`auto`: bfloat16 where the hardware computes in it, else float32."""
    max_new_tokens: int = Field(48, gt=0)
    """Longest answer, in tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    stop: tuple[str, ...] = ()
    """Texts at which an answer ends (they are not part of it)."""
    batch_tokens: int = Field(32768, gt=0)
    """Prompt and answer tokens of one batch, padding included; their keys and values are what memory must hold."""
    base_url: str = "http://127.0.0.1:8000/v1"
    """engine `openai`: where the server listens."""
    api_key_env: str = "OPENAI_API_KEY"
    """engine `openai`: the environment variable that holds the key; the key itself never stands in a config."""
    concurrency: int = Field(16, gt=0)
    """engine `openai`: requests under way at once, per worker."""
    timeout_seconds: float = Field(60.0, gt=0)
    """engine `openai`: longest wait for one request."""
    max_attempts: int = Field(5, gt=0)
    """engine `openai`: tries per request, with exponential back-off between them."""
