"""Registers the ops with nnScaler as soon as both packages are imported, in either order.

Imports nothing itself: where nnScaler is never imported this costs one comparison per import.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "nnscaler.graph.parser.register"
"""The module of nnScaler that keeps the registered ops."""


def register_when_imported() -> None:
    """Register now if nnScaler is imported, else right after it is."""
    if hasattr(sys.modules.get(REGISTRY), "CustomizedOps"):
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from nnscaler_ring.nnscaler_ops import register

    register()


class _AfterImport(MetaPathFinder):
    """Finds nothing itself: leaves the module to the others and has it register when it is run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader, run = spec.loader, spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                vars(loader).pop("exec_module", None)
                run(module)
                _register()

            loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
