"""Text in the drawings of Office documents: diagrams, charts, and the variants of a shape."""

from __future__ import annotations

from typing import Any

from ragtune_ray.ingest.parsing.archives import Package, local_name, relationship

A = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_CHART = "{http://schemas.openxmlformats.org/drawingml/2006/chart}"


def branch(alternatives: Any) -> Any:
    """The variant of `mc:AlternateContent` to read: the first that contains text, since all show the same; else the last."""
    variants = [child for child in alternatives if local_name(child) in {"Choice", "Fallback"}]
    for variant in variants:
        if any(local_name(each) in {"t", "relIds", "chart"} for each in variant.iter()):
            return variant
    return variants[-1] if variants else ()


def graphic_blocks(package: Package, related: dict[str, tuple[str, str]], element: Any) -> list[str]:
    """The texts of a diagram (`dgm:relIds`) or chart (`c:chart`) that a shape refers to, one per paragraph or label."""
    is_diagram = local_name(element) == "relIds"
    _, name = related.get(relationship(element, "dm" if is_diagram else "id"), ("", ""))
    root = package.xml(name)
    if root is None:
        return []
    texts = ["".join(each.text or "" for each in paragraph.iter(f"{A}t")) for paragraph in root.iter(f"{A}p")]
    labels = [value.text or "" for cache in root.iter(f"{_CHART}strCache") for value in cache.iter(f"{_CHART}v")]
    return [text for text in dict.fromkeys([*texts, *labels]) if text.strip()]
