"""Which GPUs a process of Ray may use."""

import sys
import types

import pytest
import ray

from ragtune_ray.cluster import devices


@pytest.mark.parametrize(("reserved", "visible"), [([], ""), (["1"], "1")])
def test_only_reserved_gpus_stay_visible(monkeypatch: pytest.MonkeyPatch, reserved: list[str], visible: str) -> None:
    context = types.SimpleNamespace(get_accelerator_ids=lambda: {"GPU": reserved, "TPU": []})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    devices.use_reserved_devices()
    assert devices.os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_a_process_without_ray_uses_its_gpus_and_starts_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: pytest.fail("this would start Ray"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    devices.use_reserved_devices()
    assert devices.os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_ray_is_not_imported_before_a_session_has_made_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray")
    devices.use_reserved_devices()
    assert "ray" not in sys.modules
