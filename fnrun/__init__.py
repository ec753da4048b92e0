"""fnrun trains PyTorch models the functional way: one immutable state, pure steps, loops that nest, runs that resume to the same bits.

The names are listed in `__init__.pyi` and imported when they are first used: `import fnrun` costs little more than `import torch`.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
