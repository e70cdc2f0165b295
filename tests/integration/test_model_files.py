"""Published Des-Nets, model folders and uploads, through main.py."""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import models
from models.depth_mapping import mapping_or_default
from models.formats.timm_folder import read_model
from training.setup import MEASURED

import pytest
import timm
import torch
from conftest import ENVIRONMENT, Outcome, Run, run_many
from hub_stand_in import HubStandIn
from safetensors.torch import load_file
from state_dicts import equal

pytestmark = pytest.mark.full  # its runs take most of a minute

TESTS = Path(__file__).resolve().parents[1]
FIXTURES = TESTS / "fixtures"
VIT = "deit_nano_patch4_16_L3"
BASE = "--data-set DIGITS --warmup-epochs 0 --batch-size 128 --num-workers 0"
STEADY = "--sched step --decay-epochs 100"  # the same learning rate however many epochs are asked for


class Runs(NamedTuple):
    """What main.py wrote and said."""

    out: Path
    outcomes: dict[str, Outcome]
    hub: HubStandIn
    environment: dict[str, str]


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With q, k and v apart, as published LeTs Des-Nets keep them."""
    result = {}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                result[name.replace("qkv", letter)] = part.clone()
        else:
            result[name] = tensor
    return result


def numbered_by_name(checkpoint: dict, names: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """The moments of a checkpoint's optimiser: moment → name of the weight → tensor."""
    state = checkpoint["optimizer"]["state"]
    return {moment: {name: state[i][moment] for i, name in enumerate(names)} for moment in ("exp_avg", "exp_avg_sq")}


def optimizer_order(weights: dict[str, torch.Tensor]) -> list[str]:
    """The names of parameters as timm's parameter groups number them: those without weight decay first."""
    undecayed = [name for name, tensor in weights.items() if tensor.ndim == 1 or name == "pos_embed"]
    return undecayed + [name for name in weights if name not in undecayed]


def write_published_des_net(source: Path, target: Path, rename: Callable[[dict], dict]) -> None:
    """A checkpoint of this program as the published implementation would have written it."""
    own = torch.load(source, weights_only=True)
    model = rename(own["model"])
    moments = {m: rename(t) for m, t in numbered_by_name(own, optimizer_order(own["model"])).items()}
    order = optimizer_order(model)
    step = int(own["optimizer"]["state"][0]["step"])
    state = {i: {"step": step, **{m: moments[m][name] for m in moments}} for i, name in enumerate(order)}
    undecayed = sum(tensor.ndim == 1 or name == "pos_embed" for name, tensor in model.items())
    groups = [
        {"lr": 1.0, "weight_decay": 0.0, "params": list(range(undecayed))},
        {"lr": 1.0, "weight_decay": 0.05, "params": list(range(undecayed, len(order)))},
    ]
    content = {
        "model": model,
        "optimizer": {"state": state, "param_groups": groups},
        "lr_scheduler": {},
        "epoch": own["epoch"],
        "model_ema": rename(own["model_ema"]),
        "scaler": {},
        "args": Namespace(lr=1e-5),
    }
    torch.save(content, target)


def write_inputs(folder: Path) -> None:
    """Learngenes and checkpoints that the runs begin with."""
    torch.manual_seed(0)
    lets = models.create_aux_net("deit_nano_patch4_16_L2_H1", "deit_nano_patch4_16_L4", num_classes=7)
    models.Learngene.of(lets).save(folder / "lets.safetensors")
    tleg = models.create_model("aux_deit_nano_patch4_16_L4", num_classes=10, in_chans=1)
    models.Learngene.of(tleg).save(folder / "tleg.safetensors")
    patches = models.create_model("deit_nano_patch8_32_L3", num_classes=10)
    torch.save(patches.state_dict(), folder / "patches.pth")
    grey = models.create_model("deit_nano_patch4_32_L3", num_classes=3, in_chans=1)
    torch.save(grey.state_dict(), folder / "grey.pth")


FIRST = {
    "one": f"{BASE} --model {VIT} {STEADY} --epochs 1 --output-dir OUT/one",
    "two": f"{BASE} --model {VIT} {STEADY} --epochs 2 --output-dir OUT/two",
    "resnet": f"{BASE} --model resnet10t --input-size 32 --epochs 0 --output-dir OUT/resnet",
    "lets": f"{BASE} --des-arch deit_nano_patch4_24_L3 --load-gene OUT/lets.safetensors --epochs 0",
    "tleg": f"{BASE} --des-arch deit_nano_patch8_16_L3 --load-gene OUT/tleg.safetensors --epochs 0",
    "grey": f"{BASE} --model {VIT} --finetune OUT/grey.pth --epochs 0",
    "patches": f"{BASE} --model {VIT} --finetune OUT/patches.pth --epochs 0",
    "push": f"{BASE} --des-arch {VIT} --load-gene OUT/lets.safetensors --epochs 1 --output-dir OUT/push "
    "--push-to-hub owner/vit",
    "push-gene": f"{BASE} --model aux_deit_nano_patch4_16_L4 --epochs 1 --output-dir OUT/push-gene "
    "--push-to-hub owner/gene",
    "push-ema": f"{BASE} --model {VIT} --epochs 1 --output-dir OUT/push-ema --push-to-hub owner/average --push-ema",
    "push-ema-gene": f"{BASE} --model aux_deit_nano_patch4_16_L4 --output-dir OUT/no --push-to-hub owner/g --push-ema",
    "push-other": f"{BASE} --model {VIT} --epochs 1 --output-dir OUT/no --push-to-hub somebody/vit",
    "push-name": f"{BASE} --model {VIT} --epochs 1 --output-dir OUT/no --push-to-hub vit",
    "push-nothing": f"{BASE} --model {VIT} --epochs 1 --push-to-hub owner/vit",
    "push-eval": f"{BASE} --model {VIT} --eval --output-dir OUT/no --push-to-hub owner/vit",
}
SECOND = {
    "eval-own": f"{BASE} --model {VIT} --eval --resume OUT/one/checkpoint.pth",
    "eval-hub": f"{BASE} --model {VIT} --eval --resume hf-hub:owner/run",
    "eval": f"{BASE} --model {VIT} --eval --resume OUT/lets.pth",
    "finetune": f"{BASE} --model {VIT} --eval --finetune OUT/lets.pth",
    "teacher": f"{BASE} --model {VIT} --epochs 1 --distillation-type soft --teacher-model {VIT} "
    "--teacher-path OUT/lets.pth",
    "resume-lets": f"{BASE} --model {VIT} {STEADY} --epochs 2 --resume OUT/lets.pth --output-dir OUT/resume-lets",
    "resume-tleg": f"{BASE} --model {VIT} {STEADY} --epochs 2 --resume OUT/tleg.pth --output-dir OUT/resume-tleg",
    "resume-other": f"{BASE} --model {VIT} --epochs 2 --resume OUT/other.pth",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    out = tmp_path_factory.mktemp("formats")
    write_inputs(out)
    with HubStandIn() as hub, pytest.MonkeyPatch.context() as patch:
        environment = hub.environment(out / "hub")
        for name, value in environment.items():
            patch.setitem(ENVIRONMENT, name, value)
        outcomes = {}
        for number, phase in enumerate((FIRST, SECOND)):
            lines = {name: Run(line.replace("OUT", str(out)).split()) for name, line in phase.items()}
            outcomes |= run_many(lines, out / f"runs{number}")
            if phase is FIRST:
                hub.add("owner/run", {"checkpoint.pth": (out / "one" / "checkpoint.pth").read_bytes()})
                write_published_des_net(out / "one" / "checkpoint.pth", out / "lets.pth", apart)
                write_published_des_net(out / "one" / "checkpoint.pth", out / "tleg.pth", dict)
                other = torch.load(out / "lets.pth", weights_only=False)
                other["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
                torch.save(other, out / "other.pth")
        yield Runs(out, outcomes, hub, {**ENVIRONMENT})


def finished(runs: Runs, *names: str) -> None:
    for name in names:
        assert runs.outcomes[name].codes == [0], runs.outcomes[name].stderr


def test_published_des_net_is_evaluated_finetuned_and_teaches(runs):
    names = ("eval-own", "eval-hub", "eval", "finetune")
    finished(runs, *names, "teacher")
    results = [runs.outcomes[name].stdout.splitlines()[-1] for name in names]
    assert json.loads(results[0])["test_acc1"] > 0
    assert len(set(results)) == 1


@pytest.mark.parametrize("name", ["resume-lets", "resume-tleg"])
def test_published_des_net_is_resumed_as_if_it_had_been_trained_here(runs, name):
    finished(runs, "two", name)
    expected, found = (torch.load(runs.out / folder / "checkpoint.pth", weights_only=True) for folder in ("two", name))
    assert equal(found["model"], expected["model"])
    assert equal(found["model_ema"], expected["model_ema"])
    order = optimizer_order(expected["model"])
    for moment, tensors in numbered_by_name(found, order).items():
        assert equal(tensors, numbered_by_name(expected, order)[moment])


def test_moments_that_do_not_fit_are_one_sentence(runs):
    outcome = runs.outcomes["resume-other"]
    assert outcome.codes == [2]
    assert "other.pth holds no training state" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("lets", ["7 classes, the data 10: the head is re-initialised", "16 patches in the learngene, 36 here"]),
        ("tleg", ["1 channel(s) in the learngene, 3 here", "patches of 4 pixels in the learngene, 8 here", "4 here"]),
        ("patches", ["has patches (64, 3, 8, 8), here are (64, 3, 4, 4): they are resampled"]),
        ("grey", ["has 3 classes, the data 10: the head is re-initialised", "images of 1 channel(s)", "(1, 64, 64)"]),
    ],
)
def test_what_is_not_taken_as_it_is_is_said(runs, name, lines):
    finished(runs, name)
    for line in lines:
        assert runs.outcomes[name].stdout.count(line) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Model folders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two", "resnet"])
def test_model_folder_is_read_by_timm_alone(runs, name):
    finished(runs, name)
    folder = runs.out / name
    model, config = read_model(folder)
    assert config["label_names"] == list("0123456789")
    images = torch.randn(2, *config["pretrained_cfg"]["input_size"])
    # the two lines of the README
    config = json.loads((folder / "config.json").read_text())
    made = timm.create_model(
        config["architecture"],
        num_classes=config["num_classes"],
        checkpoint_path=str(folder / "model.safetensors"),
        **config["model_args"],
    )
    assert torch.equal(made.eval()(images), model(images))
    if tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 16):  # the first with local-dir
        made = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert torch.equal(made.eval()(images), model(images))
        assert made.pretrained_cfg["label_names"] == list("0123456789")
        backbone = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
        assert [f.shape[1] for f in backbone(images)] == backbone.feature_info.channels()


def test_backbone_has_the_features_of_the_model(runs):
    folder = runs.out / "two"
    model, config = read_model(folder)
    backbone = timm.create_model(
        config["architecture"],
        num_classes=config["num_classes"],
        features_only=True,
        out_indices=(0, 1),
        **config["model_args"],
    )
    weights = load_file(folder / "model.safetensors")
    backbone.load_state_dict({f"model.{name}": tensor for name, tensor in weights.items()}, strict=False)
    images = torch.randn(2, 3, 16, 16)
    expected = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    found = backbone.eval()(images)
    assert [f.shape for f in found] == [(2, 64, 4, 4)] * 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Uploads
# ---------------------------------------------------------------------------------------------------------------------


def test_pushed_model_comes_back_from_the_hub(runs):
    finished(runs, "push")
    files = runs.hub.files("owner/vit")
    names = {"model.safetensors", "config.json", "log.txt"}
    assert {*files} == names | {"README.md", ".gitattributes"}
    for name in names:
        assert files[name] == (runs.out / "push" / name).read_bytes()
    code = (
        "import models, timm, torch\nfrom models.formats.timm_folder import read_model\n"
        "images = torch.ones(1, 3, 16, 16)\n"
        f"here, _ = read_model({str(runs.out / 'push')!r})\n"
        "there = timm.create_model('hf-hub:owner/vit', pretrained=True).eval()\n"
        "assert torch.equal(here(images), there(images))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=runs.environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_averaged_weights_are_pushed_as_a_model_of_their_own(runs):
    finished(runs, "push-ema")
    files, folder = runs.hub.files("owner/average"), runs.out / "push-ema"
    assert {*files} == {"model.safetensors", "config.json", "log.txt", "README.md", ".gitattributes"}
    assert files["model.safetensors"] == (folder / "model_ema.safetensors").read_bytes()
    assert files["model.safetensors"] != (folder / "model.safetensors").read_bytes()
    assert "**weights**: exponential moving average over the steps" in files["README.md"].decode()
    assert 'timm.create_model("hf-hub:owner/average", pretrained=True)' in files["README.md"].decode()


def test_model_card_says_where_the_model_comes_from(runs):
    card = runs.hub.files("owner/vit")["README.md"].decode()
    gene = models.load_learngene(runs.out / "lets.safetensors")
    layer, coeff = mapping_or_default(gene.config, 3, None, None)
    log = [json.loads(line) for line in (runs.out / "push" / "log.txt").read_text().splitlines()]
    for text in (
        "LeTs learngene (learngene file), L2-H1 (width 32)",
        f"**mapping_layer**: {layer}",
        f"**mapping_layer_coeff**: {coeff}",
        "**width selection**: continuous",
        "warmup_epochs: 0",
        f"| 0 | {log[0]['test_acc1']:.2f} |",
        f"| 1 | {log[-1]['test_acc1']:.2f} |",
        'timm.create_model("hf-hub:owner/vit", pretrained=True)',
    ):
        assert text in card
    if gene.method_class.measured:
        assert f"**{MEASURED}**: {gene.method_class.measured}\n" in card
    assert str(runs.out) not in card  # the folders of a machine are nobody else's business


def test_pushed_learngene_comes_back_from_the_hub(runs):
    finished(runs, "push-gene")
    files = runs.hub.files("owner/gene")
    names = {"learngene.safetensors", "learngene_ema.safetensors", "README.md", "log.txt", ".gitattributes"}
    assert {*files} == names
    assert str(runs.out).encode() not in b"".join(files.values())
    assert 'models.load_learngene("hf-hub:owner/gene")' in files["README.md"].decode()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("push-other", "somebody/vit cannot be written to"),
        ("push-name", "vit has no owner: expected OWNER/NAME"),
        ("push-nothing", "--output-dir is missing"),
        ("push-eval", "--eval writes nothing"),
        ("push-ema-gene", "uploads a learngene with its average anyway"),
    ],
)
def test_push_that_cannot_be_is_refused_before_training(runs, name, said):
    outcome = runs.outcomes[name]
    assert outcome.codes == [2]
    assert "--push-to-hub" in outcome.stderr
    assert said in outcome.stderr
    assert "epoch 0" not in outcome.stdout
