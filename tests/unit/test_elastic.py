"""The elastic learngene: Des-Nets are parts of a ViT of any kind."""

import itertools
from collections import Counter

import models
from common.errors import InputError
from losses import DistillationLoss, FamilyLoss, soft_divergence
from models.selection import first_neurons, keep_neurons, take_layers
from models.sizes import SizeSampler, sizes_on_offer

import pytest
import torch
from kinds_of_vit import CLASSES, case_of, every_kind
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

SOURCE = models.parse_arch("deit_nano_patch8_16_L4_H3")


def elastic(**kwargs: object) -> models.Elastic:
    torch.manual_seed(0)
    aux_net = models.create_aux_net("deit_nano_patch8_16_L4_H3", num_classes=10, **kwargs)
    with torch.no_grad():
        for parameter in aux_net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return aux_net.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a source
# ---------------------------------------------------------------------------------------------------------------------


@every_kind
def test_des_nets_are_parts_of_the_source(kind):
    case = case_of(kind)
    arch, weights = case.src, case.source().state_dict()
    aux_net = models.create_aux_net(arch, num_classes=CLASSES)
    aux_net.start_from(weights)
    gene = models.Learngene.of(aux_net)
    whole = gene.descend(arch).state_dict()
    assert whole.keys() == weights.keys()
    assert all(torch.equal(whole[name], weights[name]) for name in weights)
    found = gene.descend(case.narrow).state_dict()
    expected = keep_neurons(take_layers(weights, [0]), first_neurons(case.narrow))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_hidden_neurons_are_an_axis_of_their_own():
    gene = models.Learngene.of(elastic())
    vit, images = gene.descend("@L4-H3-M1").eval(), torch.randn(2, 3, 16, 16)
    whole = gene.descend("@L4-H3").eval()
    with torch.no_grad():
        for block in whole.blocks:
            block.mlp.fc1.weight[96:], block.mlp.fc1.bias[96:] = 0, 0
            block.mlp.fc2.weight[:, 96:] = 0
    assert vit.blocks[0].mlp.fc1.out_features == 96
    torch.testing.assert_close(vit(images), whole(images))


def test_layers_of_a_ranking_are_kept_in_their_order():
    aux_net = elastic()
    own = aux_net.to_vit().state_dict()
    aux_net.keep_layers([2, 0, 3, 1])
    gene = models.Learngene.of(aux_net)
    for depth, kept in ((1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])):
        vit = gene.descend(f"@L{depth}-H3").state_dict()
        expected = take_layers(own, kept)
        assert vit.keys() == expected.keys()
        assert all(torch.equal(vit[name], expected[name]) for name in vit)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("@L5-H3", "5 layers, the source 4"),
        ("@L4-H4", "4 heads, the source 3"),
        ("@L4-H3-M5", "480 hidden neurons in a layer, the source 384"),
        ("deit_tiny_patch8_16_L2_H1", "heads of 64 neurons; those of the source have 32"),
        ("vit_tiny_patch16_224@L2-H1", "of the kind vit_tiny_patch16_224"),
    ],
)
def test_larger_and_other_vits_are_refused(name, found):
    with pytest.raises(InputError, match=found):
        models.Learngene.of(elastic()).descend(name)


def test_a_file_keeps_the_layers_and_is_checked(tmp_path):
    aux_net, path = elastic(), tmp_path / "learngene.safetensors"
    aux_net.keep_layers([1, 0, 2, 3])
    models.Learngene.of(aux_net).save(path)
    gene, images = models.load_learngene(path), torch.randn(2, 3, 16, 16)
    assert gene.method == "elastic"
    assert torch.equal(gene.aux_net()(images), aux_net(images))
    assert torch.equal(gene.descend("@L1-H1")(images), models.Learngene.of(aux_net).descend("@L1-H1")(images))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for layers in (gene.tensors["layers"] + 4, gene.tensors["layers"] * 0, gene.tensors["layers"].double()):
        save_file(gene.tensors | {"layers": layers}, path, metadata=metadata)
        with pytest.raises(InputError, match="layers"):
            models.load_learngene(path)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes of a step
# ---------------------------------------------------------------------------------------------------------------------


def sampler(per_step: int, ratios: tuple[float, ...] | None = None, **kwargs: object) -> SizeSampler:
    sizes = sizes_on_offer(SOURCE, SOURCE, [1, 2, 3, 4], [1, 2, 3], ratios, alone=True)
    return SizeSampler({arch: arch.macs(10) for arch in sizes}, per_step, alone=True, **kwargs)


def labels(archs: list[models.ViTArch]) -> set[str]:
    return {arch.label for arch in archs}


def test_random_sizes_come_equally_often_the_largest_of_a_step_first():
    draws = [sampler(3).draw(0, seed) for seed in range(2000)]
    counts = Counter(arch.label for drawn in draws for arch in drawn)
    assert len(counts) == 12
    assert min(counts.values()) > 0.8 * max(counts.values())
    assert all(drawn == sorted(drawn, key=lambda arch: -arch.macs(10)) for drawn in draws)


def test_a_sandwich_has_the_largest_and_the_smallest():
    draws = [sampler(4, kind="sandwich").draw(0, seed) for seed in range(100)]
    assert all((drawn[0].label, drawn[-1].label, len(set(drawn))) == ("L4-H3", "L1-H1", 4) for drawn in draws)
    assert len({arch for drawn in draws for arch in drawn}) == 12


def test_the_smallest_is_in_every_step_and_all_others_come_equally_often():
    draws = [sampler(3, kind="smallest").draw(0, seed) for seed in range(2000)]
    assert all((drawn[-1].label, len(set(drawn))) == ("L1-H1", 3) for drawn in draws)
    counts = Counter(arch.label for drawn in draws for arch in drawn[:-1])
    assert len(counts) == 11
    assert min(counts.values()) > 0.8 * max(counts.values())


def test_the_mean_cost_of_a_step_is_that_of_the_draws():
    for kind in ("random", "smallest", "sandwich"):
        sizes = sampler(3, kind=kind, warmup_epochs=2, epochs=10)
        for epoch in (0, 5):
            drawn = [sum(sizes.macs[arch] for arch in sizes.draw(epoch, seed)) for seed in range(2000)]
            assert sizes.mean_macs(epoch) == pytest.approx(sum(drawn) / len(drawn), rel=0.03)


def test_warm_up_trains_the_largest_alone():
    sizes = sampler(3, warmup_epochs=2, epochs=10)
    assert labels(sizes.draw(1, 0)) == {"L4-H3"}
    assert len(sizes.draw(2, 0)) == 3


def test_coarse_sizes_come_first_and_all_of_them_last():
    sizes = sampler(2, ratios=(1, 2, 4), coarse_to_fine=True, warmup_epochs=1, epochs=10)
    corners = {f"L{depth}-H{heads}{ratio}" for depth in (1, 4) for heads in (1, 3) for ratio in ("-M1", "")}
    offered = [labels([a for seed in range(500) for a in sizes.draw(epoch, seed)]) for epoch in range(1, 10)]
    assert offered[0] == corners
    assert all(before <= after for before, after in itertools.pairwise(offered))
    assert len(offered[-1]) == 36
    assert len({frozenset(epoch) for epoch in offered}) == 3


@pytest.mark.parametrize(
    ("per_step", "kind", "found"),
    [(13, "random", "of 12 sizes"), (1, "sandwich", "no sandwich"), (1, "smallest", "always the smallest")],
)
def test_impossible_steps_are_refused(per_step, kind, found):
    with pytest.raises(InputError, match=found):
        sampler(per_step, kind=kind)


# ---------------------------------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------------------------------


def test_the_mean_over_images_is_as_many_times_larger_as_there_are_classes():
    logits, target = torch.randn(5, 7), torch.randn(5, 7)
    over_images = soft_divergence(logits, target, 2.0, "images")
    p, q = F.softmax(target / 2, dim=1), F.softmax(logits / 2, dim=1)
    torch.testing.assert_close(over_images, 4 * (p * (p / q).log()).sum(1).mean())
    torch.testing.assert_close(soft_divergence(logits, target, 2.0, "logits"), over_images / 7)


def test_each_member_learns_from_labels_teacher_and_the_next_larger_member():
    logits, teacher, targets = torch.randn(3, 5, 7, requires_grad=True), torch.randn(5, 7), torch.arange(5)
    criterion = DistillationLoss(nn.CrossEntropyLoss(), "soft", alpha=0.25, tau=2.0, mean="images")
    loss = FamilyLoss(criterion, weight=1.0, chain_weight=0.4)(logits, targets, teacher)
    own = [
        0.75 * F.cross_entropy(member, targets) + 0.25 * soft_divergence(member, teacher, 2.0, "images")
        for member in logits
    ]
    chain = [soft_divergence(logits[i], logits[i - 1].detach(), 2.0, "images") for i in (1, 2)]
    expected = (own[0] + 0.6 * own[1] + 0.4 * chain[0] + 0.6 * own[2] + 0.4 * chain[1]) / 3
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
