"""Which GPUs a process of Ray may use."""

from __future__ import annotations

import os


def use_reserved_devices() -> None:
    """Hide this machine's GPUs from this process if its task or actor reserved none; call it before torch looks for GPUs.

    Since Ray 2.60, Ray itself leaves them visible (Ray issue 54868). One actor per core would load its model on the first GPU.
    A process without Ray, such as a small index build, may use all.
    """
    import ray

    # Without this check, asking for the context would start Ray.
    if ray.is_initialized() and not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
