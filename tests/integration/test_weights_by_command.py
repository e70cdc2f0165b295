"""Weights of other programs, in other precisions and averaged, given to main.py and the scripts."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import models
from models.formats.timm_folder import read_model
from scripts import export_model, predict

import numpy as np
import pytest
import timm
import torch
from conftest import Outcome, Run, run_many
from PIL import Image
from safetensors.torch import load_file, save_file
from state_dicts import NAME, WIDER, cast, equal, prefixed, without

pytestmark = pytest.mark.full  # its runs take minutes

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
DIGITS = "--data-set DIGITS --batch-size 32 --num-workers 0 --warmup-epochs 0"
TRAIN = f"{DIGITS} --train-images 64 --epochs 1 --lr 4e-2 --model-ema-decay 0.5"


class Runs(NamedTuple):
    """What main.py wrote and said."""

    out: Path
    outcomes: dict[str, Outcome]

    def result(self, name: str) -> dict:
        """The last line that a run which succeeded has printed."""
        assert self.outcomes[name].codes == [0], self.outcomes[name].stderr
        return json.loads(self.outcomes[name].stdout.splitlines()[-1])

    def log(self, name: str) -> dict:
        return json.loads((self.out / name / "log.txt").read_text().splitlines()[-1])


FIRST = {
    "vit": f"{TRAIN} --model {NAME} --output-dir OUT/vit",
    "resnet": f"{TRAIN} --model test_resnet --input-size 32 --output-dir OUT/resnet",
    "aux": f"{TRAIN} --model aux_deit_nano_patch8_32_L2 --output-dir OUT/aux",
}
EVAL = f"{DIGITS} --eval --model"
SECOND = {
    **{f"average-{name}": f"{FIRST[name]} --eval --model-ema --resume OUT/{name}/checkpoint.pth" for name in FIRST},
    "own": f"{FIRST['vit']} --eval --resume OUT/vit/checkpoint.pth",
    "own-config": "--config OUT/vit/args.yaml --eval --resume OUT/vit/checkpoint.pth",
    "average-config": "--config OUT/average.yaml --eval --resume OUT/vit/checkpoint.pth",
    "average-missing": f"{EVAL} {NAME} --eval --model-ema --resume OUT/no-average.pth",
    "average-not-continued": f"{DIGITS} --model {NAME} --resume OUT/no-average.pth",
    "quantised": f"{EVAL} {NAME} --finetune OUT/quantised.pth",
    "nothing-fits": f"{EVAL} {NAME} --finetune OUT/nothing-fits.pth",
    "average-of-nothing": f"{EVAL} {NAME} --eval --model-ema --finetune OUT/vit/checkpoint.pth",
    "again": f"{TRAIN} --model {NAME} --no-model-ema --output-dir OUT/again",
    "push-nothing": f"{TRAIN} --model {NAME} --push-ema",
    "half": f"{EVAL} {NAME} --finetune OUT/half.pth",
    "half-resume": f"{DIGITS} --model {NAME} --train-images 64 --epochs 2 --resume OUT/half.pth --output-dir OUT/more",
    "half-gene": f"{DIGITS} --des-arch {NAME} --load-gene OUT/half-gene.safetensors --epochs 0 --output-dir OUT/half",
    "gene": f"{DIGITS} --des-arch {NAME} --load-gene OUT/aux/learngene.safetensors --epochs 0 --output-dir OUT/gene",
    "finetune": f"{EVAL} {NAME} --finetune OUT/other.pth",
    "teacher": f"{TRAIN} --model {NAME} --distillation-type hard --teacher-model {NAME} --teacher-path OUT/other.pth",
    "teacher-headless": f"{TRAIN} --model {NAME} --distillation-type hard --teacher-model {NAME} "
    "--teacher-path OUT/headless.pth",
    "src": f"{EVAL} {NAME} --src-arch {NAME} --tgt-arch {WIDER} --src-path OUT/other.pth".replace(
        f"--model {NAME}", ""
    ),
    "src-headless": f"{DIGITS} --eval --src-arch {NAME} --tgt-arch {WIDER} --src-path OUT/headless.pth",
    "init": f"{EVAL} deit_nano_patch8_32_L4 --init stacking --init-path OUT/other.pth",
    "init-headless": f"{EVAL} deit_nano_patch8_32_L1_H1 --init weight_selection --init-path OUT/headless.pth",
}


def write_inputs(out: Path) -> None:
    """Files as other people have them, of what was trained here."""
    checkpoint = torch.load(out / "vit" / "checkpoint.pth", weights_only=True)
    torch.save(cast(checkpoint, torch.float16), out / "half.pth")
    gene = models.load_learngene(out / "aux" / "learngene.safetensors")
    save_file(cast(gene.tensors, torch.float16), out / "half-gene.safetensors", {"learngene": json.dumps(gene.header)})
    torch.save({name: value for name, value in checkpoint.items() if name != "model_ema"}, out / "no-average.pth")
    quantised = {name: (100 * tensor).to(torch.int8) for name, tensor in checkpoint["model"].items()}
    torch.save(quantised, out / "quantised.pth")
    torch.save({"foo": torch.zeros(3), "bar": torch.zeros(2)}, out / "nothing-fits.pth")
    other = {"model_state_dict": prefixed("model.", checkpoint["model"]), "best": np.float64(3), "epoch": 7}
    torch.save(other, out / "other.pth")
    torch.save({"teacher": prefixed("backbone.", without(checkpoint["model"], "head."))}, out / "headless.pth")
    (out / "average.yaml").write_text((out / "vit" / "args.yaml").read_text() + "model-ema: true\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    out = tmp_path_factory.mktemp("weights")
    outcomes = {}
    for number, phase in enumerate((FIRST, SECOND)):
        if phase is SECOND:
            write_inputs(out)
            (out / "again" / "model_ema").mkdir(parents=True)
            for name in ("model_ema.safetensors", "model_ema/model.safetensors", "model_ema/config.json"):
                (out / "again" / name).write_bytes((out / "vit" / name).read_bytes())
        lines = {name: Run(line.replace("OUT", str(out)).split()) for name, line in phase.items()}
        outcomes |= run_many(lines, out / f"runs{number}")
    return Runs(out, outcomes)


@pytest.mark.parametrize("name", FIRST)
def test_averaged_weights_are_evaluated_as_in_the_log(runs, name):
    log, average = runs.log(name), runs.result(f"average-{name}")
    assert average["test_acc1"] == log["ema_test_acc1"]
    assert average["test_loss"] == pytest.approx(log["ema_test_loss"], rel=1e-6)
    assert average["test_loss"] != pytest.approx(log["test_loss"], rel=1e-6)
    assert "averaged weights" in runs.outcomes[f"average-{name}"].stdout


def test_evaluation_takes_the_own_weights_unless_it_is_asked_for_the_average(runs):
    assert runs.result("own")["test_acc1"] == runs.log("vit")["test_acc1"]
    assert "averaged weights" not in runs.outcomes["own"].stdout


def test_a_file_of_options_asks_for_the_average_only_where_it_says_so(runs):
    assert runs.result("own-config") == runs.result("own")
    assert runs.result("average-config") == runs.result("average-vit")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("average-missing", "no-average.pth holds no model_ema: without --model-ema"),
        ("average-not-continued", "no-average.pth holds no model_ema: --no-model-ema continues it"),
        ("quantised", "holds int8 in "),
        ("nothing-fits", "found the keys foo, bar\n"),
        ("average-of-nothing", "--resume is missing: --eval --model-ema"),
        ("push-nothing", "--push-to-hub is missing: --push-ema"),
        ("teacher-headless", "has no head.weight, the head that is needed"),
    ],
)
def test_what_cannot_be_is_one_line(runs, name, said):
    outcome = runs.outcomes[name]
    assert outcome.codes == [2]
    assert said in outcome.stderr
    assert outcome.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_averaged_weights_are_a_folder_that_timm_reads(runs, name):
    folder = runs.out / name
    averaged = torch.load(folder / "checkpoint.pth", weights_only=True)["model_ema"]
    assert equal(load_file(folder / "model_ema.safetensors"), averaged)
    model, config = read_model(folder / "model_ema")
    assert equal(model.state_dict(), averaged)
    assert config == read_model(folder)[1]
    if tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 16):  # the first with local-dir
        made = timm.create_model(f"local-dir:{folder / 'model_ema'}", pretrained=True)
        assert equal(made.state_dict(), averaged)


def test_an_earlier_average_does_not_stay_beside_another_model(runs):
    assert runs.outcomes["again"].codes == [0]
    assert (runs.out / "again" / "model.safetensors").exists()
    assert not [*(runs.out / "again").rglob("model_ema*/*"), *(runs.out / "again").glob("model_ema.safetensors")]


def test_scripts_take_the_averaged_weights(runs, tmp_path, monkeypatch, capsys):
    folder, picture = runs.out / "vit", tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)).save(picture)

    def run(script, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        status = script.main()
        captured = capsys.readouterr()
        return captured.out if status == 0 else captured.err

    averaged = run(predict, "--model", folder, "--model-ema", picture)
    assert averaged == run(predict, "--model", folder / "model_ema", picture)
    assert averaged != run(predict, "--model", folder, picture)
    missing = run(predict, "--model", runs.out / "again", "--model-ema", picture)
    assert missing.startswith("error: ")
    assert "has no averaged weights" in missing
    assert missing.count("\n") == 1
    exported = run(export_model, "--model", folder, "--model-ema", "--formats", "torch")
    assert "model_ema/model.pt2: largest difference" in exported
    assert not (folder / "model.pt2").exists()


def test_half_precision_has_the_accuracy_of_float32(runs):
    assert abs(runs.result("half")["test_acc1"] - runs.log("vit")["test_acc1"]) <= 1


def test_learngene_of_half_precision(runs):
    assert runs.outcomes["half-gene"].codes == [0], runs.outcomes["half-gene"].stderr
    assert abs(runs.log("half")["test_acc1"] - runs.log("gene")["test_acc1"]) <= 1
    gene = models.load_learngene(runs.out / "half-gene.safetensors")
    assert {p.dtype for p in gene.descend(NAME).parameters()} == {torch.float32}
    assert "float16 tensors are read as float32" in str(gene)


def test_checkpoint_of_half_precision_is_resumed_in_float32(runs):
    assert runs.outcomes["half-resume"].codes == [0], runs.outcomes["half-resume"].stderr
    content = torch.load(runs.out / "more" / "checkpoint.pth", weights_only=True)
    states = [content["model"], content["model_ema"], *content["optimizer"]["state"].values()]
    assert {tensor.dtype for state in states for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("vit", torch.float16), ("vit", torch.bfloat16), ("vit", torch.float64), ("resnet", torch.float16)],
)
def test_model_folder_in_another_precision(runs, tmp_path, name, dtype):
    model, _ = read_model(runs.out / name)
    (tmp_path / "config.json").write_bytes((runs.out / name / "config.json").read_bytes())
    save_file(cast(model.state_dict(), dtype), tmp_path / "model.safetensors")
    found, _ = read_model(tmp_path)
    assert {name: t.dtype for name, t in found.state_dict().items()} == {
        name: t.dtype for name, t in model.state_dict().items()
    }
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found(images), model(images), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["finetune", "teacher", "src", "init"])
def test_every_option_takes_weights_under_other_names(runs, name):
    assert runs.outcomes[name].codes == [0], runs.outcomes[name].stderr
    if name == "finetune":
        assert runs.result(name) == runs.result("own")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("src-headless", "has no head (head): it is re-initialised"),
        ("init-headless", "has no head (head): it is re-initialised"),
    ],
)
def test_what_is_left_out_or_fresh_is_said(runs, name, said):
    assert runs.outcomes[name].codes == [0], runs.outcomes[name].stderr
    assert runs.outcomes[name].stdout.count(said) == 1
