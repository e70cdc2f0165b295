"""--init on the command line: each baseline from a ViT with class token and from a plain one, both trained here."""

from dataclasses import replace
from pathlib import Path

import models
from models.baselines import BASELINES
from training.build_data import order_loader
from training.command_line import parse_options
from training.initialise import gradients_of
from training.launch import prepare

import pytest
import torch
from conftest import ENVIRONMENT, Outcome, Run, run_main, run_many, set_up_run
from hub_stand_in import HubStandIn
from safetensors.torch import load_file, save
from torch import Tensor

DATA = "--data-set DIGITS --num-workers 0 --device cpu --no-repeated-aug --batch-size 64 --warmup-epochs 0"
SOURCES = {  # name → --model and --input-size, layers and heads
    "tokens": ("vit_tiny_patch16_224@L{depth}-H{heads} --input-size 32", (3, 3)),
    "plain": ("deit_nano_patch8_32_L{depth}_H{heads} --input-size 32", (3, 2)),
}
# baseline → what is added to both
CHANGES = dict.fromkeys(("weight_selection", "magnitude", "taylor"), (-1, -1))
CHANGES |= {"stacking": (2, 0), "interpolation": (2, 0), "front": (1, 1)}


def named(source: str, change: tuple[int, int] = (0, 0)) -> str:
    """``--model`` and ``--input-size`` of a source, or of a ViT of other sizes."""
    name, (depth, heads) = SOURCES[source]
    return f"{DATA} --model " + name.format(depth=depth + change[0], heads=heads + change[1])


def arch_of(source: str, change: tuple[int, int] = (0, 0)) -> models.ViTArch:
    name, (depth, heads) = SOURCES[source]
    name = name.partition(" ")[0].format(depth=depth + change[0], heads=heads + change[1])
    return replace(models.parse_arch(name), img_size=32)


class Runs:
    def __init__(self, out: Path, outcomes: dict[str, Outcome]):
        self.out, self.outcomes = out, outcomes

    def weights(self, name: str) -> dict[str, Tensor]:
        """Of the model that a run of main.py has written."""
        assert set(self.outcomes[name].codes) == {0}, self.outcomes[name].stderr
        return load_file(self.out / name / "model.safetensors")

    def made(self, options: str) -> dict[str, Tensor]:
        """The weights that training would start from."""
        return set_up_run(options.replace("OUT", str(self.out)).split()).model.state_dict()


FIRST = {name: f"{named(name)} --train-images 256 --epochs 1 --output-dir OUT/{name}" for name in SOURCES}
FROM_TOKENS = {
    baseline: f"{named('tokens', change)} --init {baseline} --init-path OUT/tokens"
    for baseline, change in CHANGES.items()
}
SECOND = {
    baseline: f"{FROM_TOKENS[baseline]} --epochs 0 --output-dir OUT/{baseline}" for baseline in ("taylor", "front")
}
SECOND["two processes"] = SECOND["taylor"].replace("OUT/taylor", "OUT/two")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    out = tmp_path_factory.mktemp("init")
    outcomes = {}
    for number, phase in enumerate((FIRST, SECOND)):
        lines = {
            name: Run(line.replace("OUT", str(out)).split(), processes=2 if name == "two processes" else 1)
            for name, line in phase.items()
        }
        outcomes |= run_many(lines, out / f"runs{number}")
    trained = load_file(out / "tokens" / "model.safetensors")
    body = {name: w for name, w in trained.items() if not name.startswith("head.")}
    torch.save(body, out / "headless.pth")
    torch.save(body | {"head.weight": torch.zeros(7, 192), "head.bias": torch.zeros(7)}, out / "seven.pth")
    odd = models.create_vit(models.ViTArch(48, 2, 2, 8, 32), num_classes=10)
    torch.save(odd.state_dict(), out / "odd.pth")
    return Runs(out, outcomes)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_a_run_writes_what_the_baseline_makes(runs):
    expected = BASELINES["front"](runs.weights("tokens"), arch_of("tokens"), arch_of("tokens", CHANGES["front"]))
    assert_equal(runs.weights("front"), expected)
    said = "/tokens: vit_tiny_patch16_224, L3-H3 (width 192), patch 16, image 32, for front"
    assert said in runs.outcomes["front"].stdout


@pytest.mark.parametrize("baseline", [name for name in BASELINES if name != "taylor"])
def test_source_with_class_token(runs, baseline):
    expected = BASELINES[baseline](runs.weights("tokens"), arch_of("tokens"), arch_of("tokens", CHANGES[baseline]))
    assert_equal(runs.made(FROM_TOKENS[baseline]), expected)


@pytest.mark.parametrize("baseline", BASELINES)
def test_plain_source(runs, baseline):
    change = CHANGES[baseline]
    options = f"{named('plain', change)} --init {baseline} --init-path OUT/plain/model.safetensors"
    found = runs.made(options)
    if baseline == "taylor":  # by other gradients than none
        assert any(not torch.equal(w, found[name]) for name, w in runs.made(f"{options} --order-images 8").items())
        return
    expected = BASELINES[baseline](runs.weights("plain"), arch_of("plain"), arch_of("plain", change))
    assert_equal(found, expected)


def test_taylor_depends_on_the_images_and_on_nothing_else(runs):
    weights, options = runs.weights("taylor"), FROM_TOKENS["taylor"]
    two = runs.outcomes["two processes"]
    assert two.codes == [0, 0], two.stderr
    assert_equal(load_file(runs.out / "two" / "model.safetensors"), weights)
    assert_equal(runs.made(f"{options} --cache-data --seed 7"), weights)
    few = runs.made(f"{options} --order-images 16")
    assert any(not torch.equal(few[name], weights[name]) for name in weights)
    assert_equal(runs.made(f"{options} --order-images 16 --train-images 1000"), few)


def test_taylor_takes_the_gradients_of_the_training_images(runs):
    """Against a loop over single images, prepared as for evaluation."""
    weights, arch = runs.weights("tokens"), arch_of("tokens")
    config = prepare(parse_options(f"{FROM_TOKENS['taylor']} --order-images 20 --batch-size 8".split()))
    found = gradients_of(weights, arch, config, 10, torch.device("cpu"))
    vit = models.create_vit(arch, num_classes=10)
    vit.load_state_dict(weights)
    for images, labels in order_loader(config, torch.device("cpu")):
        for image, label in zip(images, labels, strict=True):
            torch.nn.functional.cross_entropy(vit.eval()(image[None]), label[None]).backward()
    assert found.keys() == weights.keys()
    for name, w in vit.named_parameters():
        torch.testing.assert_close(found[name], w.grad, rtol=1e-4, atol=1e-5)


def test_source_for_other_images(runs, capsys):
    trained = runs.weights("tokens")
    options = f"{named('tokens', (-1, -1))} --input-size 48 --init weight_selection --init-path OUT/tokens"
    found = runs.made(options)
    assert "they are resampled" in capsys.readouterr().out
    assert found.pop("pos_embed").shape == (1, 1 + 9, 128)
    expected = BASELINES["weight_selection"](trained, arch_of("tokens"), arch_of("tokens", (-1, -1)))
    del expected["pos_embed"]
    assert_equal(found, expected)


def test_headless_source(runs, capsys):
    runs.made(f"{named('tokens', (-1, -1))} --init magnitude --init-path OUT/headless.pth")
    assert "it has no head (head): it is re-initialised" in capsys.readouterr().out


TAYLOR = f"{named('tokens', (-1, -1))} --init taylor"
ERRORS = {
    f"{TAYLOR} --init-path OUT/headless.pth": ("a source with a head for the 10 classes", "this one has no head"),
    f"{TAYLOR} --init-path OUT/seven.pth": ("a source with a head for the 10 classes", "this one has 7 classes"),
    f"{named('plain')} --order-images 8 --init magnitude --init-path OUT/plain": (
        "--order-images needs --init taylor",
    ),
    f"{named('tokens', (1, 0))} --init taylor --init-path OUT/tokens": (
        "--init-path OUT/tokens: ",
        "pruning needs a larger ViT than",
        "L4-H3",
    ),
    f"{DATA} --model vit_small_patch14_dinov2@L2-H2 --input-size 28 --init front --init-path OUT/tokens": (
        "--init-path OUT/tokens: ",
        "blocks.0.ls1.gamma",
        "vit_small_patch14_dinov2",
    ),
    f"{named('plain')} --init front --init-path OUT/odd.pth": ("width 48 cannot be divided into heads of 32 neurons",),
    f"{DATA} --model resnet18 --init front --init-path OUT/plain": ("--init makes a ViT from another one",),
    f"{DATA} --model @L2-H2 --init front --init-path OUT/plain": ("@L2-H2 alone",),
}


@pytest.mark.parametrize("options", ERRORS)
def test_refused_sources(runs, options):
    with pytest.raises(models.InputError) as raised:
        runs.made(options)
    message = str(raised.value).replace(str(runs.out), "OUT")
    assert all(part in message for part in ERRORS[options]), message
    assert "\n" not in message


def test_weights_of_a_tag(tmp_path, monkeypatch):
    """``timm`` is the pretrained model of the name before the @, whose head has other classes than the data."""
    tag = "test_vit.r160_in1k"
    torch.manual_seed(1)
    pretrained = models.create_model(tag).state_dict()
    with HubStandIn() as hub:
        hub.add(f"timm/{tag}", {"model.safetensors": save(pretrained)})
        for name, value in hub.environment(tmp_path / "hub").items():
            monkeypatch.setitem(ENVIRONMENT, name, value)
        out = tmp_path / "out"
        outcome = run_main(
            *f"{DATA} --train-images 8 --model {tag}@L2-H1 --init front --init-path timm --epochs 0".split(),
            *("--output-dir", out),
        )
    assert outcome.returncode == 0, outcome.stderr
    found, source = load_file(out / "model.safetensors"), models.parse_arch(tag)
    expected = BASELINES["front"](pretrained, source, models.parse_arch(f"{tag}@L2-H1"))
    names = [name for name in found if not name.startswith("head.")]
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert len(found["head.weight"]) == 10
    assert "it has 1000 classes, the data 10: the head is re-initialised" in outcome.stdout
