"""Makes ``import torchvision`` work where its compiled operators cannot load.

torch without CUDA next to a torchvision wheel built for CUDA is common: the wheel of the default index is such a
build. There torchvision's Python side stops at "operator torchvision::nms does not exist", although nothing here uses
these operators. Declaring the two schemas it insists on is enough. This has to happen before torchvision, or timm,
which imports it, is first imported.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

SCHEMAS = ("nms", "qnms")


def declare_missing_operators() -> torch.library.Library | None:
    """Declare the schemas if torchvision is not imported yet and cannot load its own; the result keeps them alive."""
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
