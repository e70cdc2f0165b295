"""main.py with arithmetic that can be compared.

python tests/device/arithmetic.py exact OPTIONS           without TF32
python tests/device/arithmetic.py repeatable OPTIONS      … and with the same bits each time
"""

import os
import runpy
import sys
from pathlib import Path

# read with the first matrix product of the process; without it cuBLAS gives other bits each time
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

MAIN = Path(__file__).resolve().parents[2] / "main.py"


def exact() -> None:
    """Compute in float32 as it is: TF32, in which CUDA has convolutions by default, keeps 10 bits."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


if __name__ == "__main__":
    exact()
    torch.use_deterministic_algorithms(sys.argv.pop(1) == "repeatable")  # an operator that has none raises an error
    sys.path[0] = str(MAIN.parent)
    sys.argv[0] = str(MAIN)
    runpy.run_path(str(MAIN), run_name="__main__")
