"""Every kind of ViT: the source inside its Aux-Net, the order of its neurons, TLEG, and counts."""

import copy
from dataclasses import replace

import models
from models.stateless import vit_from_weights

import pytest
import timm
import torch
from kinds_of_vit import CLASSES, case_of, every_kind, every_structure, random_order, reordered
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# ---------------------------------------------------------------------------------------------------------------------
# The source inside its Aux-Net
# ---------------------------------------------------------------------------------------------------------------------


@every_kind
def test_aux_net_and_des_nets_of_the_same_sizes_are_the_same(kind):
    case = case_of(kind)
    source, images = case.source(), case.images()
    weights, expected = source.state_dict(), source(images)
    own = models.create_aux_net(case.src, case.src, num_classes=CLASSES)
    own.start_from(weights)
    with torch.no_grad():  # as in the source, of whose attention another kernel would round sums differently
        assert torch.equal(own.eval()(images), expected)
    aux, layers = case.aux_net(weights), [*range(case.tgt.depth)]
    gene = models.Learngene.of(aux)
    vit = gene.descend(case.src).eval().requires_grad_(False)
    assert vit.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vit.state_dict().items())
    assert torch.equal(vit(images), expected)
    largest = gene.descend(case.tgt, layers, layers).eval()
    torch.testing.assert_close(largest(images), aux(images), rtol=1e-4, atol=1e-4)


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


# ---------------------------------------------------------------------------------------------------------------------
# The order of neurons
# ---------------------------------------------------------------------------------------------------------------------


def logits(arch: models.ViTArch, weights: dict[str, Tensor], images: Tensor) -> Tensor:
    vit = vit_from_weights(arch, weights, num_classes=CLASSES).eval().double()
    with torch.no_grad():
        return vit(images.double())


@every_structure
def test_reordered_neurons_change_no_logit(kind):
    check_reordered(kind)


def check_reordered(kind: str) -> None:
    """The order of the source's neurons changes neither its logits nor those of larger and smaller Des-Nets."""
    case = case_of(kind)
    weights, images, order = case.source().state_dict(), case.images(), random_order(case.src, seed=2)
    permuted = reordered(weights, order)
    torch.testing.assert_close(logits(case.src, permuted, images), logits(case.src, weights, images))

    aux = case.aux_net(weights)
    other = copy.deepcopy(aux)
    with torch.no_grad():  # the columns of a width matrix are the old neurons
        for name in ("E", "C", "Q", "K", "V", "M", "pool_Q", "pool_K", "pool_V", "pool_M"):
            if (matrix := getattr(other, name, None)) is None:
                continue
            if matrix.ndim == 3:
                columns = [A[:, order(name, layer)] for layer, A in enumerate(matrix)]
                matrix.copy_(torch.stack(columns))
            else:
                matrix.copy_(matrix[:, order(name[-1].lower() if "pool" in name else name, None)])
    other.start_from(permuted)
    genes = models.Learngene.of(aux), models.Learngene.of(other)
    for arch in (case.src, case.wide):
        expected, found = (logits(arch, gene.descend(arch).state_dict(), images) for gene in genes)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    narrow = replace(case.narrow, depth=case.src.depth)
    cut = reordered(weights, lambda axis, layer: order(axis, layer)[: narrow.neurons(axis)])
    vit = genes[1].descend(narrow).state_dict()
    assert vit.keys() == cut.keys()
    assert all(torch.equal(tensor, cut[name]) for name, tensor in vit.items())


@pytest.fixture
def qk_norm():
    """A kind with norms of queries and keys, which no architecture of timm's has that works otherwise."""
    name = "vit_qk_norm_test"

    def entrypoint(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        return timm.create_model("vit_tiny_patch16_224", qk_norm=True, **kwargs)

    entrypoint.__name__ = name
    entrypoint.__module__ = __name__
    timm.models.register_model(entrypoint)
    return name


def test_norms_of_queries_and_keys(qk_norm):
    assert "blocks.0.attn.q_norm.weight" in case_of(qk_norm).source().state_dict()
    check_reordered(qk_norm)


# ---------------------------------------------------------------------------------------------------------------------
# TLEG, and counts
# ---------------------------------------------------------------------------------------------------------------------


@every_structure
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
