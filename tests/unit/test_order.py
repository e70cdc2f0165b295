"""The order of importance: the same function, with the most important neurons, heads and layers first."""

from dataclasses import replace

import models
from models.order import in_order, rank_layers, rank_layers_by_output, taylor_scores
from models.pruning import Scores, choose
from models.selection import first_neurons, keep_neurons
from models.stateless import vit_from_weights
from models.vit import create_vit

import pytest
import torch
from kinds_of_vit import CLASSES, Case, case_of, every_kind
from torch import Tensor

CPU = torch.device("cpu")


def exact(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.double() for name, w in weights.items()}


def output(arch: models.ViTArch, weights: dict[str, Tensor], images: Tensor, classes: int = CLASSES) -> Tensor:
    with torch.no_grad():
        return vit_from_weights(arch, weights, num_classes=classes).eval().double()(images.double())


def random_scores(arch: models.ViTArch) -> Scores:
    torch.manual_seed(2)
    pool_heads = arch.width // arch.pool_head_dim if arch.pool_head_dim else 0
    sizes = (arch.width,), (arch.depth, arch.num_heads), (arch.depth, arch.hidden), (arch.depth,)
    return Scores(*(torch.rand(size) for size in (*sizes, (pool_heads,), (arch.pool_hidden,))))


def without_layer(case: Case, depth: int, idle: int) -> tuple[models.ViTArch, dict[str, Tensor]]:
    """A ViT, one layer of which adds nothing."""
    arch = replace(case.src, depth=depth)
    torch.manual_seed(0)
    weights = create_vit(arch, num_classes=CLASSES).state_dict()
    for name, w in weights.items():
        w += 0.1 * torch.randn(w.shape)
        if name.startswith(f"blocks.{idle}."):
            w.zero_()
    return arch, weights


@every_kind
def test_the_function_stays_as_it_is(kind):
    case = case_of(kind)
    weights, images = exact(case.source().state_dict()), case.images()
    ordered = in_order(weights, case.src, random_scores(case.src))
    assert ordered.keys() == weights.keys()
    changed = [name for name in weights if not torch.equal(ordered[name], weights[name])]
    assert any(name.startswith("blocks.1.attn.") for name in changed)
    assert any(name.startswith("blocks.1.mlp.") for name in changed)
    assert "patch_embed.proj.weight" in changed
    expected = output(case.src, weights, images)
    torch.testing.assert_close(output(case.src, ordered, images), expected, atol=1e-10, rtol=0)


@every_kind
def test_the_first_neurons_are_those_of_the_highest_scores(kind):
    """The ViT of the first neurons in order is the one that pruning by the same scores makes."""
    case = case_of(kind)
    weights, narrow = exact(case.source().state_dict()), replace(case.narrow, depth=case.src.depth)
    scores = random_scores(case.src)
    cut = keep_neurons(in_order(weights, case.src, scores), first_neurons(narrow))
    _, neurons = choose(scores, case.src, narrow)
    pruned, images = keep_neurons(weights, neurons), case.images()
    expected = output(narrow, pruned, images)
    torch.testing.assert_close(output(narrow, cut, images), expected, atol=1e-10, rtol=0)


@every_kind
def test_a_layer_that_adds_nothing_is_dropped_first(kind):
    arch, weights = without_layer(case_of(kind), depth=3, idle=1)
    ranking = rank_layers_by_output(weights, arch, [case_of(kind).images()], CPU)
    assert sorted(ranking) == [0, 1, 2]
    assert ranking[-1] == 1


@pytest.mark.parametrize("kind", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_a_vit_without_head(kind):
    case = case_of(kind)
    arch, weights = without_layer(case, depth=3, idle=2)
    features = {name: w for name, w in exact(weights).items() if not name.startswith("head.")}
    assert rank_layers_by_output(features, arch, [case.images().double()], CPU)[-1] == 2
    scores = random_scores(arch)
    ordered, order = in_order(features, arch, scores), scores.embedding.argsort(descending=True)
    expected = output(arch, features, case.images(), classes=0)[:, order]  # the features are the embedding neurons
    torch.testing.assert_close(output(arch, ordered, case.images(), classes=0), expected, atol=1e-10, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Small enough to check by hand
# ---------------------------------------------------------------------------------------------------------------------

SMALL = models.ViTArch(width=6, depth=2, num_heads=3, patch_size=4, img_size=8)


def test_heads_have_an_order_in_each_layer():
    weights = create_vit(SMALL, num_classes=3).state_dict()
    scores = Scores(
        embedding=torch.ones(6),
        heads=torch.tensor([[1.0, 3.0, 2.0], [3.0, 1.0, 2.0]]),
        hidden=torch.ones(2, 24),
        layers=torch.ones(2),
        pool_heads=torch.ones(0),
        pool_hidden=torch.ones(0),
    )
    ordered = in_order(weights, SMALL, scores)
    for layer, rows in ((0, [2, 3, 4, 5, 0, 1]), (1, [0, 1, 4, 5, 2, 3])):
        qkv, proj = f"blocks.{layer}.attn.qkv.weight", f"blocks.{layer}.attn.proj.weight"
        for part, found in zip(weights[qkv].chunk(3), ordered[qkv].chunk(3), strict=True):
            assert torch.equal(found, part[rows])
        assert torch.equal(ordered[proj], weights[proj][:, rows])
    others = [name for name in weights if "attn" not in name]
    assert all(torch.equal(ordered[name], weights[name]) for name in others)  # equal scores: they stay


def test_rank_of_layers():
    scores = replace(random_scores(SMALL), layers=torch.tensor([1.0, 3.0, 1.0, 2.0]))
    assert rank_layers(scores) == [1, 3, 0, 2]


def test_layers_are_left_out_one_after_the_other():
    """Against models whose layers are left out in turn, all batches together."""
    arch = replace(SMALL, depth=4)
    torch.manual_seed(1)
    vit = create_vit(arch, num_classes=3).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    images = torch.randn(5, 3, 8, 8)
    found = rank_layers_by_output(vit.state_dict(), arch, images.split(2), CPU)
    blocks, kept, dropped = list(vit.blocks), [0, 1, 2, 3], []
    with torch.no_grad():
        whole = vit(images)
        while len(kept) > 1:
            changes = {}
            for out in kept:
                vit.blocks = torch.nn.Sequential(*(blocks[layer] for layer in kept if layer != out))
                changes[out] = (vit(images) - whole).square().sum().item()
            dropped.append(min(changes, key=changes.get))
            kept.remove(dropped[-1])
    assert found == [*kept, *reversed(dropped)]


def test_taylor_scores_add_up_batches():
    """The weights of a neuron cancel in a batch, those of one batch do not cancel those of another."""
    torch.manual_seed(1)
    weights = create_vit(SMALL, num_classes=3).state_dict()
    batches = [{name: torch.randn(w.shape) for name, w in weights.items()} for _ in range(2)]
    scores = taylor_scores(weights, SMALL, batches)

    def product(name: str, gradients: dict[str, Tensor]) -> Tensor:
        return (weights[name] * gradients[name]).double()

    fc1, bias, fc2 = (f"blocks.1.mlp.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight"))
    hidden = sum((product(fc1, g).sum(1) + product(bias, g) + product(fc2, g).sum(0)).abs() for g in batches)
    torch.testing.assert_close(scores.hidden[1], hidden)
    layer = [name for name in weights if name.startswith("blocks.0.")]
    expected = sum(sum(product(name, g).sum() for name in layer).abs() for g in batches)
    torch.testing.assert_close(scores.layers[0], expected)
