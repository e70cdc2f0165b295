"""Agreement with the published implementations, on golden data: the definition of correct."""

import json
from pathlib import Path

import models
from models.learngene import to_published

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOLERANCE = 1e-5  # absolute, and as much again of the expected value: the order of sums depends on the processor
METHODS = ("lets", "tleg")


def load(method: str) -> tuple[models.Learngene, dict[str, torch.Tensor], dict]:
    gene = models.load_learngene(FIXTURES / f"{method}_learngene.pth", head_dim=4)
    cases = json.loads((FIXTURES / f"{method}_cases.json").read_text())
    return gene, load_file(FIXTURES / f"{method}_expected.safetensors"), cases


def des_net(gene: models.Learngene, case: dict, cases: dict) -> torch.nn.Module:
    width, heads = case.get("width", cases["aux"]["width"]), case.get("heads", cases["aux"]["heads"])
    arch = models.ViTArch(width, case["depth"], heads, cases["patch_size"], cases["image_size"])
    mapping = {}
    if gene.method == "lets":
        mapping["mapping_layer"] = [int(i) for i in case["layers"].split(",")]
        mapping["mapping_layer_coeff"] = [int(i) for i in case["coeff"].split(",")]
    return gene.descend(arch, **mapping).eval()


def as_published(weights: dict[str, torch.Tensor], method: str) -> dict[str, torch.Tensor]:
    """Published LeTs Des-Nets keep q, k and v apart."""
    published = {}
    for name, tensor in weights.items():
        if method == "lets" and ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                published[name.replace("qkv", letter)] = part
        else:
            published[name] = tensor
    return published


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_aux_net_logits_loss_and_gradients(method, training):
    gene, expected, cases = load(method)
    aux_net = gene.aux_net().train(training)
    logits = aux_net(expected["images"])
    loss = cross_entropy(logits, expected["labels"])
    loss.backward()
    close(logits, expected["aux_logits"])
    close(loss, expected["aux_loss"])
    gradients = {name: p.grad for name, p in aux_net.named_parameters()}
    published = to_published(models.Learngene(method, gradients, gene.config))
    assert published.keys() == {key.removeprefix("grad.") for key in expected if key.startswith("grad.")}
    assert len(published) == cases["key_count"]
    for key, gradient in published.items():
        close(gradient, expected[f"grad.{key}"])


@pytest.mark.parametrize("method", METHODS)
def test_des_net_weights_and_logits(method):
    gene, expected, cases = load(method)
    for case in cases["cases"]:
        vit = des_net(gene, case, cases)
        close(vit(expected["images"]), expected[f"{case['name']}.logits"])
        prefix = f"{case['name']}.weights."
        wanted = {key.removeprefix(prefix): t for key, t in expected.items() if key.startswith(prefix)}
        found = as_published(vit.state_dict(), method)
        assert wanted.keys() <= found.keys()
        assert len(wanted) > 0
        for key in wanted:
            close(found[key], wanted[key])


@pytest.mark.parametrize("method", METHODS)
def test_published_format_there_and_back(method):
    gene, _, _ = load(method)
    published = torch.load(FIXTURES / f"{method}_learngene.pth", weights_only=False)["model"]
    written = to_published(gene)
    assert written.keys() == published.keys()
    assert all(torch.equal(written[key], published[key]) for key in published)


@pytest.mark.parametrize("method", METHODS)
def test_averaged_weights_of_a_published_checkpoint(method):
    averaged = models.load_learngene(FIXTURES / f"{method}_learngene.pth", head_dim=4, use_ema=True)
    published = torch.load(FIXTURES / f"{method}_learngene.pth", weights_only=False)["model_ema"]
    assert all(torch.equal(t, published[key]) for key, t in to_published(averaged).items())


@pytest.mark.parametrize("method", METHODS)
def test_bare_state_dict_of_a_published_checkpoint(method, tmp_path):
    gene, expected, _ = load(method)
    torch.save(to_published(gene), tmp_path / "bare.pth")
    bare = models.load_learngene(tmp_path / "bare.pth", head_dim=4)
    close(bare.aux_net()(expected["images"]), expected["aux_logits"])


@pytest.mark.parametrize("method", METHODS)
def test_own_file_keeps_everything(method, tmp_path):
    gene, expected, _ = load(method)
    gene.options = {"epochs": 300, "lr": 5e-4}
    gene.save(tmp_path / "learngene.safetensors")
    again = models.load_learngene(tmp_path / "learngene.safetensors")
    assert (again.method, again.config, again.options) == (gene.method, gene.config, gene.options)
    assert torch.equal(again.aux_net()(expected["images"]), gene.aux_net()(expected["images"]))
    assert [path.name for path in tmp_path.iterdir()] == ["learngene.safetensors"]
