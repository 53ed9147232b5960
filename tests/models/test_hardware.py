"""Device, precision, attention and memory follow the hardware."""

import ctypes
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from ragtune_ray.models import hardware
from ragtune_ray.models.hardware import choose_device, resolve_precision, supports_bfloat16


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str | None], None]:
    """Make torch report no bfloat16, and /proc/cpuinfo contain the given text."""

    def pretend(text: str | None) -> None:
        path = tmp_path / "cpuinfo"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(hardware, "_CPU_INFO", path)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)

    return pretend


@pytest.mark.parametrize(
    ("text", "supported"),
    [
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile\n", True),
        ("flags : fpu avx512_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags : fpu avx2\nmodel name : bf16 amx_bf16\n", False),
        ("flags : amx_bf16x\n", False),
        (None, False),
    ],
)
def test_cpu_flags_decide_if_torch_reports_no_bfloat16(
    cpu: Callable[[str | None], None], text: str | None, supported: bool
) -> None:
    cpu(text)
    assert supports_bfloat16("cpu") is supported
    assert resolve_precision("auto", "cpu") == (torch.bfloat16 if supported else torch.float32)


def test_bfloat16_reported_by_torch_is_sufficient(
    cpu: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu(None)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert supports_bfloat16("cpu")


def test_explicit_float32_is_used() -> None:
    assert resolve_precision("float32", "cpu") == torch.float32


def test_explicit_bfloat16_without_hardware_logs_a_warning(
    cpu: Callable[[str | None], None], caplog: pytest.LogCaptureFixture
) -> None:
    cpu(None)
    with caplog.at_level(logging.WARNING):
        assert resolve_precision("bfloat16", "cpu") == torch.bfloat16
    assert "no bfloat16 units" in caplog.text


def test_other_devices_are_not_assumed_to_support_bfloat16() -> None:
    assert supports_bfloat16("meta") is False


def test_auto_device_is_a_gpu_if_torch_finds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == "cpu"
    assert choose_device("cuda:1") == "cuda:1"


def test_avoid_cudnn_attention_disables_it() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    hardware.avoid_cudnn_attention()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps freed memory like this")
def test_freed_memory_below_a_live_block_is_returned() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size, count = 64 * 1024, 2000  # small enough for the heap instead of a mapping each
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    kept = blocks.pop()  # at the top of the heap, so that glibc returns nothing below it by itself
    process = psutil.Process()
    for block in blocks:
        libc.free(block)
    before = process.memory_info().rss
    hardware.return_freed_memory()
    assert before - process.memory_info().rss > size * count // 2
    libc.free(kept)
