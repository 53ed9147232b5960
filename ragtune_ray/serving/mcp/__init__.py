"""The Model Context Protocol (MCP): an index as tools for assistants, over HTTP at `/mcp` and on stdio.

`server` describes the tools; `endpoint` calls the handlers of the HTTP endpoint, `local` searches and answers in this
process. The modules import the package `mcp`, an extra, so they are imported only where they are used.
"""

from __future__ import annotations

import importlib
from typing import Any

from ragtune_ray import RagtuneError
from ragtune_ray.config.extras import install_command


class McpMissingError(RagtuneError, ImportError):
    """The extra `mcp` is not installed."""


def load(name: str) -> Any:
    """Import a module of this package.

    Raises:
        McpMissingError: the package mcp, or a package that it needs, is missing.
    """
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise McpMissingError(
            f"MCP needs the package {error.name}, which is missing; run: {install_command('mcp')}"
        ) from error
