"""torch.hub loads every published architecture and any learngene, from a process in another working directory."""

import json
import subprocess
import sys
from pathlib import Path

import models
from models.names import PUBLISHED_NAMES

import pytest
import torch
from conftest import ENVIRONMENT, MAIN

REPOSITORY = MAIN.parent
SRC, TGT = "deit_nano_patch8_16_L2_H1", "deit_nano_patch8_16_L4_H2"
PROGRAM = """\
import json, sys
import torch

path = sys.argv[1]
parameters = {}
gene = torch.hub.load(path, "learngene", "gene.safetensors", source="local")
assert path not in sys.path
from models.meta import WeightsOnMeta  # timm 1.0.15 creates no model under torch.device("meta")

torch.hub.set_dir("hub")  # torch.hub.list reads a clone of a GitHub repository alone, which the hub folder may hold
for name in torch.hub.list("owner/learngenes:main", trust_repo=True):
    if name != "learngene":
        with WeightsOnMeta():
            model = torch.hub.load(path, name, source="local", num_classes=10)
        assert model.num_classes == 10, name
        parameters[name] = sum(p.numel() for p in model.parameters())
try:
    torch.hub.load(path, "deit_tiny_patch16_224_L3", source="local", pretrained=True)
except ValueError as error:
    assert "deit_tiny_patch16_224_L3 has no pretrained weights of its own" in str(error)
else:
    raise AssertionError("pretrained=True is accepted")
vit = gene.descend(sys.argv[2])
assert "published checkpoint" in torch.hub.help("owner/learngenes:main", "learngene", trust_repo=True)
torch.save(vit.eval()(torch.ones(2, 3, 16, 16)), "logits.pt")
print(json.dumps(parameters))
"""


def run_python(program: str, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *args]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_every_entry_point_loads_from_another_folder(tmp_path: Path):
    torch.manual_seed(0)
    aux_net = models.create_aux_net(SRC, TGT, num_classes=10)
    gene = models.Learngene.of(aux_net)
    gene.save(tmp_path / "gene.safetensors")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "owner_learngenes_main").symlink_to(REPOSITORY)
    done = run_python(PROGRAM, tmp_path, str(REPOSITORY), SRC)
    assert done.returncode == 0, done.stderr
    parameters = json.loads(done.stdout.splitlines()[-1])
    assert parameters.keys() == {*PUBLISHED_NAMES}
    assert parameters["deit_small_patch16_224_L8"] == models.parse_arch("deit_small_patch16_224_L8").num_params(10)
    expected = gene.descend(SRC).eval()(torch.ones(2, 3, 16, 16))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.full
def test_another_package_of_the_same_name_is_reported(tmp_path: Path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    program = 'import models, sys, torch\ntorch.hub.load(sys.argv[1], "learngene", "x", source="local")'
    done = run_python(program, tmp_path, str(REPOSITORY))
    assert done.returncode == 1
    assert f"the package 'models' is already imported from {tmp_path}" in done.stderr
