"""Runs something as soon as a module of another package is imported, or now if it is.

For registering the ops with packages that need not be there: nothing is imported for it, and where
the module is never imported it costs one comparison per import.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(module: str, ready: str, act: Callable[[], object]) -> None:
    """Call `act()` once: now if `module` is imported and has the name `ready`, else right after."""
    if hasattr(sys.modules.get(module), ready):
        act()
    elif not any(getattr(finder, "module", None) == module for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(module, act))


class _AfterImport(MetaPathFinder):
    """Finds nothing itself: leaves the module to the others and acts when it has run."""

    def __init__(self, module: str, act: Callable[[], object]) -> None:
        self.module, self._act = module, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader, run, act = spec.loader, spec.loader.exec_module, self._act

            def run_and_act(module: ModuleType) -> None:
                vars(loader).pop("exec_module", None)
                run(module)
                act()

            loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec
