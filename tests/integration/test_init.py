"""--init on the command line: each baseline from a ViT with class token and from a plain one, both trained here."""

import json
from pathlib import Path

import models
from models.baselines import BASELINES
from models.pruning import prune

import pytest
import torch
from conftest import Outcome, Run, run_many
from safetensors.torch import load_file

DATA = "--data-set DIGITS --num-workers 0 --device cpu --no-repeated-aug --batch-size 64 --warmup-epochs 0"
# name → options of the trained ViT, its sizes smaller, deeper, and larger
SOURCES = {
    "tokens": ("vit_tiny_patch16_224@L{depth}-H{heads} --input-size 32", (3, 3)),
    "plain": ("deit_nano_patch8_32_L{depth}_H{heads}", (3, 2)),
}
# baseline → depth and heads of what it makes, as differences
CHANGES = dict.fromkeys(("weight_selection", "magnitude", "taylor", "front"), (-1, -1))
CHANGES |= {"stacking": (2, 0), "interpolation": (2, 0)}


def named(source: str, change: tuple[int, int] = (0, 0)) -> str:
    """``--model`` and ``--input-size`` of a source, or of a ViT of other sizes."""
    name, (depth, heads) = SOURCES[source]
    return "--model " + name.format(depth=depth + change[0], heads=heads + change[1])


FIRST = {
    name: f"{DATA} {named(name)} --epochs 1 --lr 4e-3 --mixup 0 --cutmix 0 --aa none --reprob 0 --output-dir OUT/{name}"
    for name in SOURCES
}
SECOND = {
    f"{source}-{baseline}": f"{DATA} {named(source, change)} --epochs 0 --init {baseline} "
    f"--init-path OUT/{source}/model.safetensors --output-dir OUT/{source}-{baseline}"
    for source in SOURCES
    for baseline, change in CHANGES.items()
}
TAYLOR = f"{DATA} {named('tokens', (-1, -1))} --epochs 1 --init taylor --init-path OUT/tokens/model.safetensors"
SECOND |= {
    "larger": f"{DATA} {named('tokens', (1, 1))} --epochs 0 --init front --init-path OUT/tokens/model.safetensors "
    "--output-dir OUT/larger",
    "pixels": f"{DATA} {named('tokens', (-1, -1))} --input-size 48 --epochs 0 --init magnitude "
    "--init-path OUT/tokens/model.safetensors --output-dir OUT/pixels",
    "headless": f"{DATA} {named('tokens', (-1, -1))} --epochs 0 --init magnitude --init-path OUT/headless.pth",
    "taylor-images": f"{TAYLOR} --order-images 64 --epochs 0 --output-dir OUT/taylor-images",
    "taylor-two": f"{TAYLOR} --epochs 0 --output-dir OUT/taylor-two",
    "taylor-cached": f"{TAYLOR} --epochs 0 --cache-data --output-dir OUT/taylor-cached",
    "taylor-headless": f"{TAYLOR} --init-path OUT/headless.pth",
    "taylor-other-classes": f"{TAYLOR} --init-path OUT/seven.pth",
    "taylor-no-path": f"{DATA} {named('plain')} --order-images 64 --init magnitude --init-path OUT/plain/model.safetensors",
    "pruned-larger": f"{DATA} {named('tokens', (1, 0))} --init magnitude --init-path OUT/tokens/model.safetensors",
    "other-kind": f"{DATA} --model vit_small_patch14_dinov2@L2-H2 --input-size 28 --init front "
    "--init-path OUT/tokens/model.safetensors",
    "other-heads": f"{DATA} {named('plain')} --init front --init-path OUT/odd.pth",
    "no-vit": f"{DATA} --model resnet18 --init front --init-path OUT/plain/model.safetensors",
}


class Runs:
    def __init__(self, out: Path, outcomes: dict[str, Outcome]):
        self.out, self.outcomes = out, outcomes

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        assert self.outcomes[name].codes[0] == 0, self.outcomes[name].stderr
        return load_file(self.out / name / "model.safetensors")

    def accuracy(self, name: str) -> float:
        return json.loads((self.out / name / "log.txt").read_text().splitlines()[-1])["test_acc1"]

    def error(self, name: str) -> str:
        assert set(self.outcomes[name].codes) == {2}
        (line,) = self.outcomes[name].stderr.splitlines()
        return line.replace(str(self.out), "OUT")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    out = tmp_path_factory.mktemp("init")
    outcomes = {}
    for number, phase in enumerate((FIRST, SECOND)):
        if phase is SECOND:
            trained = load_file(out / "tokens" / "model.safetensors")
            body = {name: w for name, w in trained.items() if not name.startswith("head.")}
            torch.save(body, out / "headless.pth")
            torch.save(body | {"head.weight": torch.zeros(7, 192), "head.bias": torch.zeros(7)}, out / "seven.pth")
            odd = models.create_vit(models.ViTArch(48, 2, 2, 8, 32), num_classes=10)
            torch.save(odd.state_dict(), out / "odd.pth")
        lines = {
            name: Run(line.replace("OUT", str(out)).split(), processes=2 if name == "taylor-two" else 1)
            for name, line in phase.items()
        }
        outcomes |= run_many(lines, out / f"runs{number}")
    return Runs(out, outcomes)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("baseline", [name for name in BASELINES if name != "taylor"])
def test_written_model_is_what_the_baseline_makes(runs, source, baseline):
    trained, found = runs.weights(source), runs.weights(f"{source}-{baseline}")
    sizes = []
    for change in ((0, 0), CHANGES[baseline]):
        _, name, *rest = named(source, change).split()
        arch = models.parse_arch(name)
        sizes.append(models.ViTArch(**{**arch.as_dict(), "img_size": 32}) if rest else arch)
    expected = BASELINES[baseline](trained, *sizes)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("source", SOURCES)
def test_the_source_is_named_in_the_log(runs, source):
    said = runs.outcomes[f"{source}-magnitude"].stdout
    kind = "vit_tiny_patch16_224, L3-H3 (width 192), patch 16" if source == "tokens" else "L3-H2 (width 64), patch 8"
    assert f"model.safetensors: {kind}, image 32, for magnitude" in said


@pytest.mark.parametrize("source", SOURCES)
def test_taylor_keeps_more_than_the_first_layers_and_spaced_neurons(runs, source):
    assert runs.accuracy(source) > 50
    assert runs.accuracy(f"{source}-taylor") > runs.accuracy(f"{source}-weight_selection")


def test_taylor_depends_on_images_and_on_nothing_else(runs):
    weights = runs.weights("tokens-taylor")
    for name in ("taylor-two", "taylor-cached"):
        found = runs.weights(name)
        assert all(torch.equal(found[key], weights[key]) for key in weights)
    few = runs.weights("taylor-images")
    assert any(not torch.equal(few[key], weights[key]) for key in weights)
    by_magnitude = runs.weights("tokens-magnitude")
    assert any(not torch.equal(by_magnitude[key], weights[key]) for key in weights)


def test_source_for_other_images(runs):
    trained, found = runs.weights("tokens"), runs.weights("pixels")
    assert found["pos_embed"].shape == (1, 1 + 9, 128)
    assert "they are resampled" in runs.outcomes["pixels"].stdout
    source, arch = (models.parse_arch(f"vit_tiny_patch16_224@{sizes}") for sizes in ("L3-H3", "L2-H2"))
    source, arch = (models.ViTArch(**{**a.as_dict(), "img_size": 32}) for a in (source, arch))
    pruned = prune(trained, source, arch)
    same = [torch.equal(found[name], w) for name, w in pruned.items() if w.shape == found[name].shape]
    assert sum(same) > 0.9 * len(same)  # the resampled positions may change the choice of embedding neurons


def test_headless_source(runs):
    assert runs.outcomes["headless"].codes == [0]
    assert "it has no head (head): it is re-initialised" in runs.outcomes["headless"].stdout


ERRORS = {
    "taylor-headless": ("--init taylor needs a source with a head for the 10 classes", "this one has no head"),
    "taylor-other-classes": ("--init taylor needs a source with a head for the 10 classes", "this one has 7 classes"),
    "taylor-no-path": ("--order_images needs --init taylor",),
    "pruned-larger": ("--init-path OUT/tokens/model.safetensors", "pruning needs a larger ViT than", "L4-H3"),
    "other-kind": ("--init-path", "blocks.0.ls1.gamma", "vit_small_patch14_dinov2"),
    "other-heads": ("--init-path", "width 48 cannot be divided into heads of 32 neurons"),
    "no-vit": ("--init makes a ViT from another one",),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refused_sources(runs, name):
    line = runs.error(name)
    assert all(part in line for part in ERRORS[name]), line
