"""main.py with arithmetic that can be compared: ``python tests/device/arithmetic.py OPTIONS``."""

import os
import runpy
import sys
from pathlib import Path

import torch

MAIN = Path(__file__).resolve().parents[2] / "main.py"


def exact() -> None:
    """float32 as it is written: TF32, which convolutions have by default, has 10 bits of mantissa."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def repeatable(enable: bool = True) -> None:
    """Operations that add in the same order each time; those that cannot raise. Before anything runs on the device."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it with its first product
    torch.use_deterministic_algorithms(enable)


if __name__ == "__main__":
    exact()
    repeatable()
    sys.path[0] = str(MAIN.parent)
    sys.argv[0] = str(MAIN)
    runpy.run_path(str(MAIN), run_name="__main__")
