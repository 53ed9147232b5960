"""Chooses the device, number format, attention kernel and memory settings for this machine."""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "bfloat16"]

_logger = logging.getLogger(__name__)
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2  # parameters of mallopt in glibc's malloc.h
_PLAIN_ATTENTION_TOKENS = 1024  # longer inputs need too much memory, which grows with the square of the length
_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # two of x86, one of Arm


def choose_device(device: str = "auto") -> str:
    """The torch device to compute on: `auto` means a GPU if torch finds one, else the CPU."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of freed tensors in this process.

    Otherwise, every training step on a CPU returns large blocks to the system and gets them back zeroed, page by page.
    Has no effect with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**28)):
            mallopt(parameter, value)


def return_freed_memory() -> None:
    """Return the free memory of glibc's heaps to the system, for example after a model was released.

    By itself, glibc does this only at the top of a heap. Has no effect with another C library.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def avoid_cudnn_attention() -> None:
    """Use torch's own fused attention kernels on GPUs in this process, instead of cuDNN's.

    Since torch 2.11, cuDNN's are the first choice on an H100 or H200, but for some masked batches with a finite loss their
    gradients are NaN (pytorch issue 196678). Has no effect on CPUs.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def attention_for_training(device: str, longest: int) -> str:
    """The fastest attention for training: plain matrix products on a CPU up to 1,024 tokens, else torch's fused kernels.

    >>> attention_for_training("cuda", 512), attention_for_training("cpu", 512), attention_for_training("cpu", 4096)
    ('sdpa', 'eager', 'sdpa')
    """
    return "eager" if device == "cpu" and longest <= _PLAIN_ATTENTION_TOKENS else "sdpa"


def supports_bfloat16(device: str = "cpu") -> bool:
    """Whether the hardware of `device` ("cpu", "cuda", "cuda:1") multiplies matrices in bfloat16.

    A CPU without it converts bfloat16 to compute, which is slower than float32.
    """
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.device(device).type != "cpu":
        return False
    return _torch_sees_bfloat16() or bool(_BFLOAT16_FLAGS & _cpu_flags(_CPU_INFO))


def resolve_precision(precision: Precision, device: str) -> torch.dtype:
    """The dtype of `precision` on `device`; `auto` is bfloat16 if the hardware computes in it, else float32.

    An explicit bfloat16 is used even without hardware support, since it halves the memory; this logs a warning.
    """
    import torch

    if precision == "float32":
        return torch.float32
    supported = supports_bfloat16(device)
    if precision == "bfloat16" and not supported:
        _logger.warning("precision bfloat16 on %s, which has no bfloat16 units: slower than float32", device)
        return torch.bfloat16
    return torch.bfloat16 if supported else torch.float32


def _torch_sees_bfloat16() -> bool:
    import torch

    # Private in torch, so a later release may remove it; then /proc/cpuinfo decides.
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe is not None and probe())


def _cpu_flags(path: Path) -> frozenset[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no such file: macOS, Windows
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    flags = " ".join(values for name, _, values in lines if name.strip() in ("flags", "Features"))
    return frozenset(flags.split())
