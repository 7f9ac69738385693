"""Replaces mmcv's CARAFE by carafepp's on import, for models that are built afterwards.

In a config of mmengine, write ``custom_imports = dict(imports=["carafepp.torch.mmcv.install"])``.
The registry's ``carafe`` is then our `CARAFEPack`. The names of CARAFE in ``mmcv.ops``, in
``mmcv.ops.carafe`` and in modules that have imported them are ours too. mmcv-lite has no operators:
there, only the registry changes.
"""

import sys
from importlib import import_module

from .. import mmcv as ours

try:
    registry = import_module("mmengine.registry").MODELS
except ImportError:  # mmcv before 2.0
    registry = import_module("mmcv.cnn").UPSAMPLE_LAYERS

try:
    import_module("mmcv.ops")
except ImportError:
    pass
else:
    # The attribute mmcv.ops.carafe is a function: only sys.modules has the module of that name.
    theirs = sys.modules["mmcv.ops.carafe"]
    for name in ("CARAFE", "CARAFENaive", "CARAFEPack", "carafe", "carafe_naive"):
        old, new = getattr(theirs, name), getattr(ours, name)
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is old:
                setattr(module, name, new)

registry.register_module(name="carafe", module=ours.CARAFEPack, force=True)
