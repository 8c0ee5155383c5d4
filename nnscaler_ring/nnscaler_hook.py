"""Registers the ops with nnScaler as soon as both packages are imported, in either order."""

from __future__ import annotations

from nnscaler_ring.core.import_hook import after_import

REGISTRY = "nnscaler.graph.parser.register"
"""The module of nnScaler that keeps the registered ops."""


def register_when_imported() -> None:
    """Register now if nnScaler is imported, else right after it is."""
    after_import(REGISTRY, "CustomizedOps", _register)


def _register() -> None:
    from nnscaler_ring.nnscaler_ops import register

    register()
