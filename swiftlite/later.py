"""torch's compiler and distributed tensors, imported by those who use them and not by everybody.

transformers marks some functions for the compiler, and torch computes tensors without memory by functions that are so marked; to import the
compiler for that is a fifth of a start, in processes that seldom compile. Within `compiler_later()` a stand-in notes such marks; they are
made when the compiler is really imported, by whoever and whenever. Whatever else is asked of the stand-in imports it there and then.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

COMPILER = "torch._dynamo"
TRACED, NAME = f"{COMPILER}._trace_wrapped_higher_order_op", "TransformGetItemToIndex"  # of which transformers' masks take one name

_notes: list[Callable[[Any], Any]] = []  # what to do with the real compiler
_real: list[Any] = []  # the real compiler, once it is whole


class _StandIn(types.ModuleType):
    """In the compiler's place."""

    def __init__(self, torch: Any) -> None:
        super().__init__(COMPILER)
        found = importlib.machinery.PathFinder.find_spec(COMPILER, torch.__path__)
        assert found is not None
        self.__spec__ = found
        self.__file__, self.__path__ = found.origin, found.submodule_search_locations  # type: ignore[assignment]

    # Whoever took one of these may keep it: once the real compiler is there, they are its own.

    @staticmethod
    def allow_in_graph(fn: Any) -> Any:
        if _real:
            return _real[0].allow_in_graph(fn)
        _notes.append(lambda compiler: compiler.allow_in_graph(fn))
        return fn

    @staticmethod
    def assume_constant_result(fn: Any) -> Any:
        if _real:
            return _real[0].assume_constant_result(fn)
        _notes.append(lambda compiler: compiler.assume_constant_result(fn))
        return fn

    @staticmethod
    def disable(fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        if _real or not isinstance(fn, types.FunctionType | None):  # a module or a class is changed, not wrapped
            return _import().disable(fn, recursive, **options)
        if fn is None:
            return functools.partial(_StandIn.disable, recursive=recursive, **options)
        now = [fn]
        _notes.append(lambda compiler: now.__setitem__(0, compiler.disable(fn, recursive, **options)))

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            return now[0](*args, **kwargs)

        return call

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """Nothing, outside of compiled code."""
        if _real:
            _real[0].graph_break(msg)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_import(), name)


def _context() -> Any:
    """The context manager of that name."""
    _import()  # else what is found under that name may be the stand-in's
    return getattr(importlib.import_module(TRACED), NAME)()


def _name_found(_: Any) -> None:
    """The modules of transformers that took the stand-in's name get the real one."""
    real = getattr(importlib.import_module(TRACED), NAME)
    for module in [one for name, one in list(sys.modules.items()) if name.startswith("transformers.")]:
        if vars(module).get(NAME) is _context:
            setattr(module, NAME, real)


def _import() -> Any:
    """The real compiler."""
    _step_aside()
    return importlib.import_module(COMPILER)


def _step_aside() -> None:
    import torch

    for name in (COMPILER, TRACED):
        if isinstance(sys.modules.get(name), _StandIn) or vars(sys.modules.get(name, torch)).get(NAME) is _context:
            del sys.modules[name]
    if isinstance(vars(torch).get("_dynamo"), _StandIn):
        del torch._dynamo


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Sees the compiler, or a part of it, being imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.startswith(f"{COMPILER}.") and isinstance(sys.modules.get(COMPILER), _StandIn):
            _import()
            module = sys.modules.get(name)
            if module is None:
                return None
            # Not a second time. The import system asks the module for its spec rather than us, so it has ours meanwhile.
            done = importlib.machinery.ModuleSpec(name, self, loader_state=module.__spec__)
            vars(module)["__spec__"] = done  # torch's modules of settings refuse other ways
            return done
        if name != COMPILER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_all(module: types.ModuleType) -> None:
                run(module)
                sys.meta_path.remove(self)
                _real.append(module)
                for note in _notes:
                    note(module)

            spec.loader.exec_module = run_all  # type: ignore[method-assign]
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """It is done."""
        vars(module)["__spec__"] = vars(module)["__spec__"].loader_state


@contextmanager
def compiler_later() -> Iterator[None]:
    """While modules are imported, or models built, that would import the compiler."""
    import torch

    if COMPILER in sys.modules:
        yield
        return
    if not _notes:
        _notes.append(_name_found)
        sys.meta_path.insert(0, _Finder())
    stub: Any = types.ModuleType(TRACED)
    stub.TransformGetItemToIndex = _context
    sys.modules[TRACED] = stub
    sys.modules[COMPILER] = torch._dynamo = _StandIn(torch)  # type: ignore[assignment]
    try:
        yield
    finally:
        _step_aside()


@contextmanager
def no_distributed_tensors() -> Iterator[None]:
    """transformers' modules that are imported meanwhile take torch to have none, for as long as the process lives.

    For processes of our own that run one model on one device: another tenth of a start.
    """
    from transformers import utils
    from transformers.utils import import_utils

    own = import_utils.is_torch_distributed_available
    utils.is_torch_distributed_available = import_utils.is_torch_distributed_available = lambda: False
    try:
        yield
    finally:
        utils.is_torch_distributed_available = import_utils.is_torch_distributed_available = own
