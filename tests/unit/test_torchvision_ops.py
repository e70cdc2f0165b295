"""torchvision whose compiled operators cannot load, as one built for CUDA beside a torch without it."""

import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, MAIN, SECONDS

WITHOUT_OPERATORS = """
import torch

def load_library(path):
    raise OSError("undefined symbol")

torch.ops.load_library = load_library
"""
USE = """
import timm, torchvision
assert not torchvision.extension._has_ops()
print(tuple(timm.create_model("test_vit", num_classes=3)(torch.zeros(1, 3, 160, 160)).shape))
"""


@pytest.mark.parametrize("first", ["import models", ""])
def test_torchvision_is_imported_without_its_operators(first):
    command = [sys.executable, "-c", f"{WITHOUT_OPERATORS}\n{first}\n{USE}"]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=MAIN.parent, capture_output=True, text=True, timeout=SECONDS)
    if first:
        assert done.stdout == "(1, 3)\n", done.stderr
    else:  # it is the declaration in models that makes the difference
        assert "operator torchvision::nms does not exist" in done.stderr
