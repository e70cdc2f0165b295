"""Kinds of ViT: documentation, refusals, learngene files, and the folders that timm alone reads."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import models
from common.errors import shown
from models.formats.timm_folder import save_model
from models.learngene import load_learngene
from models.meta import WeightsOnMeta
from scripts import vit_kinds

import pytest
import timm
import torch
from conftest import ENVIRONMENT
from kinds_of_vit import (
    CLASSES,
    DISTINCT,
    KINDS,
    PAGE,
    REFUSED,
    REPRESENTATIVE,
    STRUCTURES,
    VERSION,
    WORKING,
    case_of,
    signature,
    structure,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# Documentation and refusals
# ---------------------------------------------------------------------------------------------------------------------


def test_representative_kinds_have_every_feature():
    for name in ("positions", "norms", "attention", "LayerScale", "pooling"):
        column = vit_kinds.COLUMNS.index(name) - 1
        features = {kind: set(row[column].split(", ")) for kind, row in WORKING.items()}
        representative = [features[kind] for kind in REPRESENTATIVE if kind in features]
        assert set.union(*features.values()) - {"–"} == set.union(*representative) - {"–"}


@pytest.mark.skipif(timm.__version__ != VERSION, reason="the page is of another version of timm")
def test_page_agrees_with_the_command(all_tests, capsys):
    assert (len(WORKING) + len(REFUSED), len(WORKING) >= 200) == (228, True)
    assert f"**{len(WORKING)} work** and\n{len(REFUSED)} are refused" in PAGE
    if all_tests:
        vit_kinds.main([])
        assert capsys.readouterr().out == PAGE
        return
    names = [name for name in (*WORKING, *REFUSED) if name in REPRESENTATIVE or name in REFUSED]
    rows = [line for line in vit_kinds.page(names).splitlines() if line.startswith("| `") and line.count("`") > 1]
    assert len(rows) >= len(names)
    assert set(rows) <= set(PAGE.splitlines())


REFUSALS = {
    "vit_small_patch16_18x2_224": "blocks.*.attns.0.norm.weight",  # parallel blocks
    "vit_base_patch16_xp_224": "blocks.*.mlp_bias",
    "vit_dwee_patch16_reg1_gap_256": "blocks.*.attn.lambda_q1",  # differential attention
    "vit_small_patch16_rope_mixed_224": "rope.freqs",  # rotary positions that are learned
    "vit_base_patch16_sapiens2": "num_kv_heads",  # given layer by layer
    "beit_base_patch16_224": "relative_position_bias_table",
    "vit_relpos_small_patch16_224": "rel_pos",
    "vit_small_r26_s32_224": "patch_embed.backbone.stem.conv.weight",
    "swin_tiny_patch4_window7_224": "layers.0.blocks.0.norm1.weight",
    "resnet18": "conv1.weight",
}


@pytest.mark.parametrize("name", [name for name in REFUSALS if timm.is_model(name)])
def test_what_cannot_be_expanded_is_refused_in_one_line_that_names_the_parameter(name):
    for text in (name, f"{name}@L2-H2"):
        with pytest.raises(models.InputError, match=r"cannot") as refusal:
            models.create_aux_net(text, text)
        assert name in str(refusal.value)
        assert REFUSALS[name] in str(refusal.value)
        assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# Learngene files
# ---------------------------------------------------------------------------------------------------------------------

STORED = ["vit_small_patch14_reg4_dinov2", "eva02_base_patch14_448", "vit_pe_core_large_patch14_336"]


@pytest.mark.parametrize("kind", [kind for kind in STORED if kind in KINDS])
@pytest.mark.parametrize("method", ["lets", "tleg"])
def test_learngene_file_states_the_kind(kind, method, tmp_path):
    case = case_of(kind)
    aux = case.aux_net() if method == "lets" else models.TLEG(case.src, num_classes=CLASSES).eval()
    gene, path = models.Learngene.of(aux), tmp_path / "learngene.safetensors"
    gene.save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["learngene"])
    assert header["tgt_arch"]["kind"] == kind
    loaded, images = load_learngene(path), case.images()
    assert kind in str(loaded)
    vits = [g.descend(replace(case.narrow, depth=3)).eval() for g in (gene, loaded)]
    assert torch.equal(vits[0](images), vits[1](images))
    assert torch.equal(loaded.aux_net()(images), aux(images))


DAMAGED = [5, None, True, ["vit_tiny_patch16_224"], {}, "", "no_such_vit", "resnet18", "beit_base_patch16_224"]
DAMAGED += ["vit_small_patch16_18x2_224", "vit_base_patch16_224", "vit_tiny_patch16_224@L2-H3", "A" * 10**6]
DAMAGED += ["hf-hub:timm/vit_tiny_patch16_224", "local-dir:/tmp", "/etc/passwd", "vit\x1b[31m\n_tiny", "models"]
DAMAGED += ["vit_small_patch14_reg4_dinov2.lvd142m", "deit_tiny_patch16_224_L3", "aux_deit_tiny_patch16_224"]


def refusal_of(path: Path) -> str:
    """The message of a learngene file that is refused; nothing of one that is not."""
    try:
        load_learngene(path)
    except models.InputError as error:
        return str(error)
    return ""


def test_damaged_kinds_are_refused_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "learngene.safetensors"
    models.Learngene.of(case_of("vit_small_patch14_reg4_dinov2").aux_net()).save(path)
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["learngene"]), load_file(path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it looked for something on the network"))
    for kind in DAMAGED:
        for key in ("src_arch", "tgt_arch"):
            damaged = {**header, **{k: {**header[k], "kind": kind} for k in ("src_arch", key)}}
            save_file(tensors, path, {"learngene": json.dumps(damaged)})
            assert refusal_of(path), shown(kind)
            assert len(refusal_of(path)) < 1000
            assert refusal_of(path).isprintable()


@pytest.mark.parametrize("kind", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_336"])
def test_a_damaged_size_does_not_fill_the_memory(kind, tmp_path):
    if kind not in KINDS:
        pytest.skip("timm does not have it yet")
    path = tmp_path / "learngene.safetensors"
    models.Learngene.of(case_of(kind).aux_net()).save(path)
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["learngene"]), load_file(path)
    for sizes in ({"img_size": 10**7}, {"img_size": 10**5, "patch_size": 1}, {"width": 10**9, "num_heads": 10**8}):
        damaged = {**header, **{key: {**header[key], **sizes} for key in ("src_arch", "tgt_arch")}}
        save_file(tensors, path, {"learngene": json.dumps(damaged)})
        assert refusal_of(path), sizes


# ---------------------------------------------------------------------------------------------------------------------
# Images and patches that are not square
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_336"])
def test_images_and_patches_that_are_not_square(kind, tmp_path):
    base = models.parse_arch(kind)
    heads, d = 2, base.head_dim
    src = replace(base, depth=2, num_heads=heads, width=heads * d, img_size=(64, 32), patch_size=(16, 8))
    torch.manual_seed(0)
    aux = models.create_aux_net(src, replace(src, depth=3, num_heads=3, width=3 * d), num_classes=CLASSES).eval()
    path, images = tmp_path / "learngene.safetensors", torch.randn(2, 3, 64, 32)
    models.Learngene.of(aux).save(path)
    gene = load_learngene(path)
    assert (gene.arch.img_size, gene.arch.patch_size) == ((64, 32), (16, 8))
    assert torch.equal(gene.aux_net()(images), aux(images))

    vit = gene.descend(src).eval()
    other = gene.descend(src, img_size=(32, 48)).eval()
    assert other(torch.randn(1, 3, 32, 48)).shape == (1, CLASSES)
    if hasattr(vit, "set_input_size"):  # timm's own way to other images, which its first versions of Eva lack
        vit.set_input_size((32, 48))
        for name, tensor in vit.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], tensor)
    whole = gene.descend(src, img_size=64, patch_size=16).eval()
    assert whole(torch.randn(1, 3, 64, 64)).shape == (1, CLASSES)


# ---------------------------------------------------------------------------------------------------------------------
# timm alone
# ---------------------------------------------------------------------------------------------------------------------

ALONE = """
import json, sys
import timm, torch
from safetensors.torch import load_file

has_local_dir = tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 16)
for folder in json.load(sys.stdin):
    if has_local_dir:
        vit = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        config = json.load(open(f"{folder}/config.json"))
        vit = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
        vit.load_state_dict(load_file(f"{folder}/model.safetensors"))
    expected = load_file(f"{folder}/expected.safetensors")
    with torch.no_grad():
        logits = vit.eval()(expected["images"])
    if not torch.equal(logits, expected["logits"]):
        print(folder, float((logits - expected["logits"]).abs().max()))
assert not any(name.partition(".")[0] in ("models", "common", "training") for name in sys.modules)
"""


def differing_alone(folders: Sequence[Path]) -> str:
    """The folders whose models, loaded by timm in a process without this project, have other logits."""
    command = [sys.executable, "-c", ALONE]
    request = json.dumps([str(folder) for folder in folders])
    done = subprocess.run(command, input=request, env=ENVIRONMENT, capture_output=True, text=True, cwd=folders[0])
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def write(vit: nn.Module, arch: models.ViTArch, images: torch.Tensor, folder: Path) -> Path:
    """The folder of a model, and in it images and their logits."""
    size = {"input_size": [3, *images.shape[2:]], "crop_pct": 1.0, "interpolation": "bicubic"}
    folder.mkdir()
    save_model(vit, folder, arch, {}, {**size, "crop_mode": "center", "mean": [0.5] * 3, "std": [0.5] * 3})
    with torch.no_grad():
        logits = vit.eval()(images)
    save_file({"images": images, "logits": logits}, folder / "expected.safetensors")
    return folder


def test_timm_alone_gives_the_same_logits(all_tests, tmp_path):
    folders = []
    for kind in KINDS if all_tests else [kind for kind in REPRESENTATIVE if kind in KINDS]:
        case = case_of(kind)
        vit = models.Learngene.of(case.aux_net()).descend(case.narrow)
        folders.append(write(vit, case.narrow, case.images(), tmp_path / kind))
    for kind in ("vit_tiny_patch16_224", "eva02_tiny_patch14_336"):  # images and patches that are not square
        arch = replace(case_of(kind).narrow, img_size=(64, 32), patch_size=(16, 8))
        vit = models.create_vit(arch, num_classes=CLASSES)
        folders.append(write(vit, arch, torch.randn(2, 3, 64, 32), tmp_path / f"{kind}_64x32"))
    assert differing_alone(folders) == ""


@pytest.mark.full
@pytest.mark.skipif(timm.__version__ != VERSION, reason="the list is of another version of timm")
@pytest.mark.parametrize(("what", "others"), [(signature, DISTINCT), (structure, STRUCTURES)])
def test_kinds_that_are_not_tested_are_others_in_small_sizes(what, others):
    def small(kind: str) -> tuple:
        with WeightsOnMeta():
            return what(models.create_vit(case_of(kind).src, num_classes=CLASSES))

    tested = {small(kind) for kind in (*REPRESENTATIVE, *others)}
    assert len(tested) == len(REPRESENTATIVE) + len(others)
    assert [kind for kind in KINDS if small(kind) not in tested] == []
