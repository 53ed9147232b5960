"""Which GPUs a process of Ray may use."""

import types

import pytest
import ray

from ragtune_ray.cluster import devices


@pytest.mark.parametrize(("reserved", "visible"), [([], ""), (["1"], "1")])
def test_only_reserved_gpus_stay_visible(monkeypatch: pytest.MonkeyPatch, reserved: list[str], visible: str) -> None:
    context = types.SimpleNamespace(get_accelerator_ids=lambda: {"GPU": reserved, "TPU": []})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    devices.use_reserved_devices()
    assert devices.os.environ["CUDA_VISIBLE_DEVICES"] == visible
