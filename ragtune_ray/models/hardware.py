"""How this machine computes best: device, number format, attention, memory.

In: a precision from the config, a torch device. Out: a dtype, a device, the attention and the memory that suit it. This module
knows nothing of models.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

__all__ = [
    "attention_for_training",
    "avoid_cudnn_attention",
    "choose_device",
    "keep_freed_memory",
    "resolve_precision",
    "return_freed_memory",
    "supports_bfloat16",
]

Precision = Literal["auto", "float32", "bfloat16"]

_logger = logging.getLogger(__name__)
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2  # as malloc.h of glibc numbers them
_PLAIN_ATTENTION_TOKENS = 1024  # the products are written out: their memory grows with the square
_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86 twice; Arm calls its extension bf16


def choose_device(device: str = "auto") -> str:
    """The torch device to compute on: `auto` is the GPU where torch sees one, else the CPU.

    >>> choose_device("cpu")
    'cpu'
    """
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones, in this process, for as long as it lives.

    glibc gives large blocks back to the system at once, and the system hands them out again zeroed, page by page, in
    every training step on a CPU. Where the C library is another one nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**28)):
            mallopt(parameter, value)


def return_freed_memory() -> None:
    """Give what is free in the C library's heaps back to the system: after a model was let go, that is most of a model.

    glibc alone does so only from the top of a heap. Where the C library is another one nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def avoid_cudnn_attention() -> None:
    """Let this process attend with torch's own fused kernels on a GPU.

    Since torch 2.11 those of cuDNN come first on an H100 or H200, and their gradients are not numbers for some masked batches
    whose loss is sound (pytorch issue 196678). On a CPU nothing changes.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def attention_for_training(device: str, longest: int) -> str:
    """The attention that trains fastest: on a CPU plain products up to about a thousand tokens, else torch's fused kernels.

    >>> attention_for_training("cuda", 512), attention_for_training("cpu", 512), attention_for_training("cpu", 4096)
    ('sdpa', 'eager', 'sdpa')
    """
    return "eager" if device == "cpu" and longest <= _PLAIN_ATTENTION_TOKENS else "sdpa"


def supports_bfloat16(device: str = "cpu") -> bool:
    """Whether `device` ("cpu", "cuda", "cuda:1") multiplies matrices in bfloat16 by hardware.

    A CPU without it computes bfloat16 by conversion, slower than float32; so the answer there is no, although it works.
    """
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.device(device).type != "cpu":
        return False
    return _torch_sees_bfloat16() or bool(_BFLOAT16_FLAGS & _cpu_flags(_CPU_INFO))


def resolve_precision(precision: Precision, device: str) -> torch.dtype:
    """The dtype that `precision` means on `device`; `auto` is bfloat16 where the hardware computes in it, else float32.

    bfloat16 asked of hardware without it is granted with a logged warning, since it still halves the memory.
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

    # Underscored in torch, so it may go in a later release; then /proc/cpuinfo decides.
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe is not None and probe())


def _cpu_flags(path: Path) -> frozenset[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no such file: macOS, Windows
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(
        flag for name, _, flags in lines if name.strip() in ("flags", "Features") for flag in flags.split()
    )
