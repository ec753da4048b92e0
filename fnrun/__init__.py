"""fnrun trains PyTorch models the functional way: one immutable state, pure steps, loops that nest, runs that resume to the same bits.

The names are listed in `__init__.pyi` and imported when they are first used: `import fnrun` costs little more than `import torch`.
"""

import importlib

import lazy_loader

from fnrun.core import moved

__version__ = "0.1.0"

_listed, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
moved.install()


def __getattr__(name: str) -> object:
    return importlib.import_module(f"{__name__}.{name}") if name in moved.MOVED else _listed(name)
