"""ViTs with an MLP ratio on the command line: both stages, baselines, inspector, predictions, exports."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import models
from datasets import build_dataset
from models.formats.timm_folder import read_model

import pytest
import timm
import torch
from conftest import ENVIRONMENT, TESTS, Outcome, Run, run_many
from safetensors.torch import load_file

SCRIPTS = TESTS.parent / "scripts"
BASE = "--data-set DIGITS --num-workers 0 --batch-size 64 --train-images 64 --warmup-epochs 0 --device cpu"
PLAIN = "deit_nano_patch8_16_L4"
FIRST = {
    "lets": f"--src-arch {PLAIN}@L2-H1-M2 --tgt-arch @L4-H2-M3.5 --input-size 16 --epochs 1 --output-dir OUT/lets",
    "source": "--model test_vit@L3-H2-M2 --input-size 32 --epochs 1 --output-dir OUT/source",
}
SECOND = {
    "des": "--des-arch @L3-H2-M2.5 --load-gene OUT/lets --epochs 1 --output-dir OUT/des",
    "largest": "--des-arch @L4-H2 --load-gene OUT/lets --epochs 0 --output-dir OUT/largest",
    "pruned": "--model test_vit@L2-H1-M1 --init magnitude --init-path OUT/source --input-size 32 --epochs 0 "
    "--output-dir OUT/pruned",
    "more": "--des-arch @L3-H2-M4 --load-gene OUT/lets --epochs 1",
    "more-pruned": "--model test_vit@L3-H2 --init magnitude --init-path OUT/source --input-size 32 --epochs 0",
}


class Runs(NamedTuple):
    out: Path
    outcomes: dict[str, Outcome]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    out = tmp_path_factory.mktemp("ratios")
    outcomes = {}
    for number, phase in enumerate((FIRST, SECOND)):
        lines = {name: Run(f"{BASE} {line}".replace("OUT", str(out)).split()) for name, line in phase.items()}
        outcomes |= run_many(lines, out / f"runs{number}")
    return Runs(out, outcomes)


def finished(runs: Runs, name: str) -> Path:
    assert set(runs.outcomes[name].codes) == {0}, runs.outcomes[name].stderr
    return runs.out / name


@pytest.mark.parametrize(("name", "hidden"), [("source", 128), ("des", 160), ("largest", 224), ("pruned", 32)])
def test_model_folder_of_a_run(runs, name, hidden):
    folder = finished(runs, name)
    vit, config = read_model(folder)
    assert vit.blocks[0].mlp.fc2.in_features == hidden
    alone = timm.create_model(config["architecture"], num_classes=10, **config["model_args"])
    alone.load_state_dict(load_file(folder / "model.safetensors"))


def test_untrained_des_net_is_that_of_the_learngene(runs):
    gene = models.load_learngene(finished(runs, "lets") / "learngene.safetensors")
    found = load_file(finished(runs, "largest") / "model.safetensors")
    assert (gene.arch.label,) == ("L4-H2-M3.5",)
    assert all(torch.equal(tensor, found[name]) for name, tensor in gene.descend("@L4-H2").state_dict().items())


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("more", ["--des-arch deit_nano_patch8_16_L3", "256 hidden neurons", "up to 224"]),
        ("more-pruned", ["--init-path", "192 hidden neurons", "it has 128"]),
    ],
)
def test_more_hidden_neurons_than_there_are(runs, name, parts):
    outcome = runs.outcomes[name]
    assert outcome.codes == [2]
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert [part for part in parts if part not in line] == [], line


def test_scripts_take_what_was_made(runs, tmp_path, monkeypatch, capsys):
    digits, _ = build_dataset("DIGITS", None, is_train=False, transform=None)
    digits[0][0].save(tmp_path / "digit.png")
    folder = finished(runs, "des")
    for script, arguments, said in (
        ("inspect_learngene.py", [finished(runs, "lets")], "up to 224 hidden neurons in a layer"),
        ("predict.py", ["--model", folder, tmp_path / "digit.png"], "digit.png"),
        ("export_model.py", ["--model", folder, "--formats", "torch"], "model.pt2"),
    ):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        printed = capsys.readouterr()
        assert (end.value.code, said in printed.out) == (0, True), printed


def test_learngene_at_torch_hub(runs):
    """hubconf.py imports this project from its own folder, so in a process of its own."""
    learngene = finished(runs, "lets") / "learngene.safetensors"
    code = (
        "import torch, sys; gene = torch.hub.load(sys.argv[1], 'learngene', sys.argv[2], source='local'); "
        "print(gene.descend('@L2-H2-M1').blocks[0].mlp.fc2.in_features)"
    )
    command = [sys.executable, "-c", code, TESTS.parent, learngene]
    done = subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "64\n"), done.stderr
