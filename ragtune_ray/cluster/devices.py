"""Which GPUs a process of Ray may use, and on which node it is."""

from __future__ import annotations

import os
import sys


def use_reserved_devices() -> None:
    """Hide this machine's GPUs from this process if its task or actor reserved none; call it before torch looks for GPUs.

    Since Ray 2.60, Ray itself leaves them visible (Ray issue 54868). One actor per core would load its model on the first GPU.
    A process without Ray, such as a small index build, may use all.
    """
    # A process of Ray has imported it. Importing it here would fix its settings before `session` has made them, and asking
    # for the context without a session would start Ray.
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def node_id() -> str:
    """The id of this process's node; "" without Ray."""
    ray = sys.modules.get("ray")
    return str(ray.get_runtime_context().get_node_id()) if ray is not None and ray.is_initialized() else ""
