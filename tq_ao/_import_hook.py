"""Run one of our modules right after somebody imports another, without importing that one ourselves.

`transformers.quantizers.auto`, where quantization methods are registered, pulls in torchao and triton; waiting
for the user to load it keeps `import tq_ao` light and costs nothing when transformers is absent.
"""

import sys
from collections.abc import Sequence
from importlib import import_module, util
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(target: str, ours: str) -> None:
    """Import module `ours` as soon as module `target` has been imported (now, if it already is)."""
    if target in sys.modules:
        import_module(ours)
    elif not any(isinstance(f, _Finder) and f.target == target for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(target, ours))


class _Finder(MetaPathFinder):
    def __init__(self, target: str, ours: str) -> None:
        self.target, self.ours = target, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.target:
            return None
        sys.meta_path.remove(self)  # from here on the ordinary machinery finds it
        spec = util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.ours)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader, ours: str) -> None:
        self.inner, self.ours = inner, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        import_module(self.ours)
