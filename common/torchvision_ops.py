"""Makes ``import torchvision`` work where its compiled operators cannot be loaded.

A common case is torch without CUDA next to a torchvision wheel built for CUDA, the wheel of the default index. There
``import torchvision`` fails with "operator torchvision::nms does not exist", although nothing here uses the operators.
Declaring the schemas of two of them is enough. This must happen before the first import of torchvision or of timm,
which imports it.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

SCHEMAS = ("nms", "qnms")


def declare_missing_operators() -> torch.library.Library | None:
    """Declare the schemas if torchvision's own operators cannot be loaded; the returned object keeps them alive."""
    spec = find_spec("torchvision")
    if spec is None or "torchvision" in sys.modules:
        return None
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
            return None
        except OSError:  # built for another torch: undefined symbols, or CUDA libraries that are not here
            pass
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in SCHEMAS:
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


OPERATORS = declare_missing_operators()
