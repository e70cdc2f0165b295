"""Learngenes in from anywhere, models out to anywhere: every format, through the command line and the interface."""

import runpy
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import models
from models.learngene import save_published, to_published

import pytest
import timm
import torch
from state_dicts import equal

TESTS = Path(__file__).resolve().parents[1]
FIXTURES = TESTS / "fixtures"
METHODS = ("lets", "tleg")
VIT = "deit_nano_patch4_16_L3"
BASE = "--data-set DIGITS --warmup-epochs 0 --batch-size 128 --num-workers 0"
STEADY = "--sched step --decay-epochs 100"  # the same learning rate however many epochs are asked for


def published(method: str) -> models.Learngene:
    return models.load_learngene(FIXTURES / f"{method}_learngene.pth", head_dim=4)


class Done(NamedTuple):
    code: int
    stderr: str


@pytest.fixture
def convert(monkeypatch, capfd) -> Callable[..., Done]:
    """scripts/convert_learngene.py as a program, in this process."""
    program = str(TESTS.parent / "scripts" / "convert_learngene.py")

    def convert(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(program, run_name="__main__")
        return Done(end.value.code, capfd.readouterr().err)

    return convert


# ---------------------------------------------------------------------------------------------------------------------
# Learngene files
# ---------------------------------------------------------------------------------------------------------------------


def own_file(gene: models.Learngene, path: Path) -> None:
    gene.save(path)


def own_checkpoint(gene: models.Learngene, path: Path) -> None:
    content = {"model": gene.tensors, "optimizer": {}, "epoch": 3, "args": {"lr": 1.0}, "learngene": gene.header}
    torch.save(content, path)


def published_checkpoint(gene: models.Learngene, path: Path) -> None:
    shutil.copy(FIXTURES / f"{gene.method}_learngene.pth", path)


def published_legacy(gene: models.Learngene, path: Path) -> None:
    content = {"model": to_published(gene), "optimizer": {}, "args": Namespace(lr=1.0)}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def published_bare(gene: models.Learngene, path: Path) -> None:
    torch.save(to_published(gene), path)


def published_wrapped(gene: models.Learngene, path: Path) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in to_published(gene).items()}, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".txt", ""])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (own_file, "learngene file"),
        (own_checkpoint, "checkpoint of this program"),
        (published_checkpoint, "published checkpoint"),
        (published_legacy, "published checkpoint"),
        (published_bare, "published weights"),
        (published_wrapped, "published weights"),
        (save_published, "published weights"),
    ],
)
def test_kind_shows_in_the_content_whatever_the_name(tmp_path, write, kind, method, suffix):
    gene = published(method)
    write(gene, tmp_path / f"gene{suffix}")
    found = models.load_learngene(tmp_path / f"gene{suffix}", head_dim=4)
    assert equal(found.tensors, gene.tensors)
    assert found.config == gene.config
    name = {"lets": "LeTs", "tleg": "TLEG"}[method]
    assert str(found).startswith(f"{name} learngene ({kind}), L")
    assert "10 classes" in str(found)


@pytest.mark.parametrize("method", METHODS)
def test_averaged_weights(tmp_path, method):
    gene = published(method)
    file = torch.load(FIXTURES / f"{method}_learngene.pth", weights_only=False)
    averaged = models.load_learngene(FIXTURES / f"{method}_learngene.pth", head_dim=4, use_ema=True)
    assert equal(to_published(averaged), file["model_ema"])
    assert "averaged weights" in str(averaged)
    averaged.save(tmp_path / "learngene_ema.safetensors")
    for use_ema in (False, True):
        assert models.load_learngene(tmp_path / "learngene_ema.safetensors", use_ema=use_ema).averaged
    gene.save(tmp_path / "learngene.safetensors")
    with pytest.raises(models.InputError, match="no weights under 'model_ema'"):
        models.load_learngene(tmp_path / "learngene.safetensors", use_ema=True)


@pytest.mark.parametrize("method", ["lets", pytest.param("tleg", marks=pytest.mark.full)])
def test_conversion_to_and_from_the_published_format_is_exact(tmp_path, convert, method):
    source = FIXTURES / f"{method}_learngene.pth"
    steps = [
        convert(source, tmp_path / "own.safetensors", "--head-dim", 4),
        convert(tmp_path / "own.safetensors", tmp_path / "published.pth"),
        convert(tmp_path / "published.pth", tmp_path / "again.safetensors"),
    ]
    assert [step.code for step in steps] == [0, 0, 0], steps
    assert (tmp_path / "own.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    before = torch.load(source, weights_only=False)
    after = torch.load(tmp_path / "published.pth", weights_only=False)
    assert equal(after["model"], before["model"])
    assert vars(after["args"]) == vars(before["args"])


def test_published_file_of_a_learngene_trained_here_has_the_published_keys_and_shapes(tmp_path):
    sizes = models.ViTArch(8, 8, 2, 16, 32), models.ViTArch(16, 16, 4, 16, 32), models.ViTArch(12, 12, 3, 16, 32)
    for aux_net in (models.create_aux_net(*sizes[:2], num_classes=10), models.TLEG(sizes[2], num_classes=10)):
        save_published(models.Learngene.of(aux_net), tmp_path / "gene.pth")
        keys = torch.load(FIXTURES / f"{aux_net.method}_learngene.pth", weights_only=False)["model"]
        found = torch.load(tmp_path / "gene.pth", weights_only=False)["model"]
        assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in keys.items()}


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.pth", "out.pth"], "missing.pth is missing"),
        ([FIXTURES / "lets_learngene.pth", "out.pth"], "head_dim"),
        (
            [FIXTURES / "lets_learngene.pth", "out.bin", "--head-dim", 4],
            "ends in '.bin': expected .safetensors or .pth",
        ),
        ([FIXTURES / "lets_learngene.pth", "no/out.pth", "--head-dim", 4], "no is no folder"),
    ],
)
def test_conversion_that_cannot_be(tmp_path, monkeypatch, convert, arguments, said):
    monkeypatch.chdir(tmp_path)
    done = convert(*arguments)
    assert done.code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Other images than the learngene's
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("patch_size", "img_size"), [(16, 48), (8, 32), (8, 48)])
def test_des_net_for_other_patches_is_what_timm_makes_of_one_for_the_same(method, patch_size, img_size):
    gene = published(method)
    arch = models.ViTArch(gene.arch.width, 3, gene.arch.num_heads, 16, 32)
    found = gene.descend(arch, patch_size=patch_size, img_size=img_size)
    expected = models.create_vit(arch, patch_size=patch_size, img_size=img_size, num_classes=10)
    filter_fn = timm.models.vision_transformer.checkpoint_filter_fn
    expected.load_state_dict(filter_fn(gene.descend(arch).state_dict(), expected))
    images = torch.randn(2, 3, img_size, img_size)
    torch.testing.assert_close(found.eval()(images), expected.eval()(images))


@pytest.mark.parametrize("method", METHODS)
def test_grey_images_give_the_same_logits_with_one_channel_and_with_three(method):
    gene = published(method)
    grey = torch.randn(2, 1, 32, 32)
    three = gene.descend(gene.arch).eval()
    one = gene.descend(gene.arch, in_chans=1).eval()
    assert one.patch_embed.proj.in_channels == 1
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(one(grey), three(grey.expand(-1, 3, -1, -1)))
    gene.tensors["patch_embed_weight"] = gene.tensors["patch_embed_weight"].sum(1, keepdim=True)
    gene.config["in_chans"] = 1
    again = gene.descend(gene.arch, in_chans=3).eval()
    close(again(grey.expand(-1, 3, -1, -1)), one(grey))
    gene.tensors["patch_embed_weight"] = gene.tensors["patch_embed_weight"].repeat(1, 2, 1, 1)
    gene.config["in_chans"] = 2
    with pytest.raises(models.InputError, match="images of 2 channels"):
        gene.descend(gene.arch, in_chans=3)
