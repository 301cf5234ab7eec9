"""The fast.ai lesson-1 recipe for Hugging Face's Trainer, as plug-ins that also work alone.

The public names are in `__init__.pyi`; each is imported when it is first asked for, so that a command starts as fast as
what it needs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
