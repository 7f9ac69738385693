"""Puts carafepp in the place of mmcv's CARAFE when it is imported, for models yet to be built.

In a config of mmengine, ``custom_imports = dict(imports=["carafepp.torch.mmcv.install"])``. From
then on the registry's ``carafe`` is our `CARAFEPack`, and the names of CARAFE in ``mmcv.ops``,
``mmcv.ops.carafe`` and every module that has imported them before are ours. With mmcv-lite, which
has no operators, it is the registry alone.
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
