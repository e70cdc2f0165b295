"""Every kind of ViT: the source inside its Aux-Net, training, counts, TLEG, and timm alone."""

import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import models
from models.formats.timm_folder import save_model

import pytest
import torch
from conftest import ENVIRONMENT
from kinds_of_vit import CLASSES, KINDS, REPRESENTATIVE, case_of, every_kind, gradients
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

# ---------------------------------------------------------------------------------------------------------------------
# The source inside its Aux-Net
# ---------------------------------------------------------------------------------------------------------------------


@every_kind
def test_aux_net_and_des_net_of_the_sources_size_are_the_source(kind):
    case = case_of(kind)
    source, images = case.source(), case.images()
    weights, expected = source.state_dict(), source(images)
    own = models.create_aux_net(case.src, case.src, num_classes=CLASSES)
    own.start_from(weights)
    with torch.no_grad():  # as in the source, of whose attention another kernel would round sums differently
        assert torch.equal(own.eval()(images), expected)
    vit = models.Learngene.of(case.aux_net(weights)).descend(case.src).eval().requires_grad_(False)
    assert vit.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vit.state_dict().items())
    assert torch.equal(vit(images), expected)


DEPTHS = [(n, N) for N in range(1, 9) for n in range(2, N + 1)] + [(5, 12), (7, 12), (9, 12), (12, 16), (12, 24)]


@pytest.mark.parametrize("layers_per_row", [1, 2])
def test_no_layer_of_the_source_is_lost_whatever_the_depths(layers_per_row):
    for n, N in DEPTHS:
        if -(-N // layers_per_row) < n:  # fewer rows of coefficients than layers
            continue
        src = models.ViTArch(8, n, 2, 16, 32, "vit_tiny_patch16_224")
        aux = models.create_aux_net(src, replace(src, depth=N), num_classes=CLASSES, layers_per_row=layers_per_row)
        source = models.create_vit(src, num_classes=CLASSES).state_dict()
        aux.start_from(source)
        found = models.Learngene.of(aux).descend(src).state_dict()
        lost = [name for name, tensor in source.items() if not torch.equal(found[name], tensor)]
        assert not lost, (n, N)


@every_kind
def test_des_net_of_the_aux_nets_size_is_the_aux_net(kind):
    case = case_of(kind)
    aux, layers = case.aux_net(), [*range(case.tgt.depth)]
    vit = models.Learngene.of(aux).descend(case.tgt, layers, layers).eval()
    torch.testing.assert_close(vit(case.images()), aux(case.images()), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@every_kind
def test_a_step_of_training_changes_aux_net_and_des_nets(kind):
    case = case_of(kind)
    gene = models.Learngene.of(case.aux_net())
    for model in (gene.descend(case.narrow), gene.descend(case.wide), gene.aux_net()):
        step(model, case.images())


def step(model: nn.Module, images: torch.Tensor) -> None:
    """Train ``model`` for one step, which reaches every parameter and the average of it."""
    ema, start = ModelEmaV3(model, decay=0.75), copy.deepcopy(model.state_dict())
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
    cross_entropy(model.train()(images), torch.arange(len(images))).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not unused
    optimizer.step()
    ema.update(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ema.module.state_dict()[name], start[name] * 0.75 + tensor * 0.25)
    with torch.no_grad():
        trained, averaged = model.eval()(images), ema.module.eval()(images)
    assert trained.isfinite().all()
    assert not torch.equal(trained, averaged)


@every_kind
def test_training_computes_what_evaluation_does_with_and_without_checkpointing(kind):
    case = case_of(kind)
    aux, images = case.aux_net().double(), case.images().double()
    logits, expected = gradients(aux, images)
    assert expected.keys() == dict(aux.named_parameters()).keys()
    aux.train()
    aux.vit.eval()  # without the random rotary positions of some kinds
    calls = []
    aux.vit.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for recompute in (False, True):
        aux.set_grad_checkpointing(recompute)
        found_logits, found = gradients(aux, images)
        torch.testing.assert_close(found_logits, logits, rtol=1e-5, atol=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)
    assert len(calls) > 2  # the block ran again in the last backward pass


@every_kind
def test_tleg(kind):
    case = case_of(kind)
    torch.manual_seed(0)
    aux, images = models.TLEG(case.src, num_classes=CLASSES).eval(), case.images()
    with torch.no_grad():
        for parameter in aux.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    gene = models.Learngene.of(aux)
    assert torch.equal(gene.descend(case.src).eval()(images), aux(images))
    for width_select in ("continuous", "l2_top"):
        vit = gene.descend(replace(case.narrow, depth=3), width_select=width_select).eval()
        assert vit(images).isfinite().all()
    step(aux, images)


@every_kind
def test_counts_are_those_of_the_model(kind):
    case = case_of(kind)
    for arch, num_classes in ((case.src, 0), (case.wide, CLASSES)):
        vit = models.create_vit(arch, num_classes=num_classes).eval().requires_grad_(False)
        assert sum(p.numel() for p in vit.parameters()) == arch.num_params(num_classes)
        # the counter knows the products of attention, not all kernels that compute it
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            vit(case.images(1))
        assert counter.get_total_flops() == 2 * arch.macs(num_classes)


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
