"""Features of the source as targets, and the linear probe that measures what has no head."""

from contextlib import nullcontext

import models
from losses import FamilyLoss, FeatureLoss, unexplained_variance
from models.features import Features
from models.sizes import SizeSampler
from training.config import OptimConfig
from training.optimizers import create_optimizer
from training.probe import RIDGE, fit_head

import numpy as np
import pytest
import torch
from kinds_of_vit import CLASSES, case_of, every_kind, random_order, reordered
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F


def without_head(vit: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w for name, w in vit.items() if not name.startswith("head")}


def elastic(kind: str, num_classes: int = 0) -> models.Elastic:
    """The source of a kind, with maps."""
    case = case_of(kind)
    weights = case.source().state_dict()
    aux_net = models.create_aux_net(case.src, num_classes=num_classes)
    aux_net.start_from(weights if num_classes else without_head(weights))
    aux_net.add_feature_maps()
    return aux_net


def supernet(aux_net: models.Elastic, archs: list[models.ViTArch], **kwargs: object) -> models.Supernet:
    """In training, with all sizes drawn."""
    sampler = SizeSampler({arch: arch.macs(0) for arch in archs}, len(archs), **kwargs)
    net = models.Supernet(aux_net, sampler, features=True).train()
    net.drawn = sampler.draw(epoch=0, seed=0)
    return net


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def test_loss_is_the_share_of_variance_that_is_unexplained():
    torch.manual_seed(0)
    targets = 5 * torch.randn(7, 3, 4) + 2
    features = targets + torch.randn(7, 3, 4)
    t, f = (x.reshape(21, 4).numpy() for x in (targets, features))
    difference = (f - f.mean(0)) - (t - t.mean(0))
    expected = (difference**2).sum() / t.var(0, ddof=0).sum() / 21
    np.testing.assert_allclose(unexplained_variance(features, targets).item(), expected, rtol=1e-5)
    wide = (torch.cat([x] * 5, dim=-1) for x in (features, targets))
    np.testing.assert_allclose(unexplained_variance(*wide).item(), expected, rtol=1e-5)
    np.testing.assert_allclose(unexplained_variance(100 * features, 100 * targets).item(), expected, rtol=1e-5)
    assert unexplained_variance(targets + 3, targets).item() < 1e-10
    torch.testing.assert_close(unexplained_variance(torch.ones(7, 3, 4), targets), torch.tensor(1.0))
    assert unexplained_variance(features[:1, 0], targets[:1, 0]).item() == 0  # one image has no variance


def test_pooled_and_patch_features_weigh_the_same_beside_labels():
    torch.manual_seed(0)
    features, teacher, logits = torch.randn(6, 10, 4), torch.randn(6, 10, 4), torch.randn(6, 3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    pooled = unexplained_variance(features[:, 0], teacher[:, 0])
    patches = unexplained_variance(features[:, 1:], teacher[:, 1:])
    alone = FeatureLoss(nn.CrossEntropyLoss(), 1.0)(features, labels, teacher)
    torch.testing.assert_close(alone, (pooled + patches) / 2)
    mixed = FeatureLoss(nn.CrossEntropyLoss(), 0.25)((features, logits), labels, teacher)
    torch.testing.assert_close(mixed, 0.25 * alone + 0.75 * F.cross_entropy(logits, labels))
    family = FamilyLoss(FeatureLoss(nn.CrossEntropyLoss(), 1.0), weight=1.0)
    torch.testing.assert_close(family([features, teacher], labels, teacher), alone / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Features and their maps
# ---------------------------------------------------------------------------------------------------------------------


@every_kind
def test_features_are_what_the_head_reads_and_one_for_each_patch(kind):
    case = case_of(kind)
    vit, images = case.source(), case.images()
    features = Features(vit)(images)
    assert features.shape == (2, 1 + case.src.num_patches, case.src.width)
    both, logits = Features(vit, logits=True)(images)
    assert torch.equal(both, features)
    assert torch.equal(logits, vit(images))
    heads = vit.get_classifier()
    if not isinstance(heads, tuple):  # the two of a distillation token read two features
        torch.testing.assert_close(heads(features[:, 0]), logits)


@every_kind
def test_source_is_its_own_target_and_members_train_all_of_it(kind):
    case, images = case_of(kind), case_of(kind).images(4)
    aux_net = elastic(kind)
    teacher = Features(aux_net.to_vit())(images).clone()
    net = supernet(aux_net, [case.src, case.narrow], alone=True)
    criterion = FeatureLoss(nn.CrossEntropyLoss(), 1.0)
    whole, part = (criterion(features, torch.zeros(4), teacher) for features in net(images))
    assert whole.item() < 1e-5 < part.item()
    net.zero_grad()
    part.backward()
    assert all(p.grad is not None for p in net.parameters())  # as DistributedDataParallel needs it
    moved = [name for name, p in aux_net.named_parameters() if p.grad.any()]
    assert {"feature_maps", "patch_embed_weight"} <= set(moved)
    gradient = aux_net.feature_maps.grad
    heads = case.narrow.num_heads
    assert gradient[heads - 1, ..., : case.narrow.width].any()
    gradient[heads - 1, ..., : case.narrow.width] = 0
    assert not gradient.any()


def test_maps_undo_an_order_of_the_neurons():
    kind = "vit_small_patch14_reg4_dinov2"
    case = case_of(kind)
    order, source = random_order(case.src, 0), case.source()
    aux_net = models.create_aux_net(case.src, num_classes=CLASSES)
    aux_net.start_from(reordered(source.state_dict(), order))
    aux_net.embedding_order = order("E", None)
    aux_net.add_feature_maps()
    features = aux_net.map_features(Features(aux_net.to_vit())(case.images()))
    torch.testing.assert_close(features, Features(source)(case.images()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_336"])
def test_activation_checkpointing_and_half_precision(kind):
    case, found = case_of(kind), []
    criterion = FamilyLoss(FeatureLoss(nn.CrossEntropyLoss(), 0.5), weight=0.5)
    for recompute in (False, True):
        net = supernet(elastic(kind, CLASSES), [case.narrow])
        net.set_grad_checkpointing(recompute)
        teacher = torch.randn(3, 1 + case.src.num_patches, case.src.width, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16) if recompute else nullcontext():
            loss = criterion(net(case.images(3)), torch.tensor([0, 1, 2]), teacher)
        loss.backward()
        found.append({name: p.grad for name, p in net.named_parameters()} | {"loss": loss.detach()})
    assert all(p.dtype == torch.float32 for p in found[1].values())
    torch.testing.assert_close(found[1]["loss"], found[0]["loss"], atol=0.05, rtol=0.05)
    torch.testing.assert_close(found[1]["aux_net.head_weight"], found[0]["aux_net.head_weight"], atol=0.05, rtol=0.2)


def test_maps_are_no_part_of_the_learngene(tmp_path):
    kind = "vit_small_patch14_reg4_dinov2"
    aux_net, case = elastic(kind), case_of(kind)
    gene = models.Learngene.of(aux_net)
    assert gene.tensors.keys() == aux_net.state_dict().keys() - {"feature_maps"}
    assert gene.num_params == case.src.num_params(0)
    gene.save(tmp_path / "learngene.safetensors")
    content = {"model": aux_net.state_dict(), "optimizer": {}, "learngene": gene.header, "classes": ["a", "b"]}
    torch.save(content, tmp_path / "checkpoint.pth")
    for name in ("learngene.safetensors", "checkpoint.pth"):
        found = models.load_learngene(tmp_path / name)
        assert found.tensors.keys() == gene.tensors.keys()
        assert found.classes is None  # there is no head for them
        vit = found.descend(case.narrow)
        assert vit(case.images()).shape == (2, case.narrow.width)


def test_maps_stay_out_of_weight_decay():
    aux_net = elastic("vit_small_patch14_reg4_dinov2")
    optimizer = create_optimizer(OptimConfig(), 1e-3, aux_net)
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[aux_net.feature_maps] == 0
    assert decays[aux_net.fc1_weight] > 0


# ---------------------------------------------------------------------------------------------------------------------
# The linear probe
# ---------------------------------------------------------------------------------------------------------------------


def digits(side: int) -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[:200] / 16, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    return F.interpolate(images, (side, side)), torch.tensor(labels[:200])


@pytest.mark.parametrize("kind", ["vit_tiny_patch16_224", "eva02_tiny_patch14_336", "vit_base_patch16_siglip_224"])
def test_probe_is_ridge_regression_on_standardised_features(kind):
    case = case_of(kind)
    images, labels = digits(case.src.img_size)
    vit = models.create_vit(case.src, num_classes=0)
    vit.load_state_dict(without_head(case.source().state_dict()))
    batches = [*zip(images.split(64), labels.split(64), strict=True), (images[:0], labels[:0])]
    fit_head(vit, batches, 10, nullcontext())
    with torch.no_grad():
        x, found = Features(vit)(images)[:, 0].double().numpy(), vit(images)
    x = StandardScaler().fit_transform(x)
    reference = Ridge(alpha=RIDGE * len(x)).fit(x, F.one_hot(labels, 10).numpy())
    expected = torch.tensor(reference.predict(x), dtype=torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert (found.argmax(1) == labels).float().mean() > 0.5


@every_kind
def test_probe_takes_the_place_of_a_head(kind):
    case = case_of(kind)
    batches = [(case.images(), torch.tensor([0, 6]))]
    found, expected = case.source(), models.create_vit(case.src, num_classes=0)
    expected.load_state_dict(without_head(found.state_dict()))
    for vit in (found, expected):
        fit_head(vit, batches, 7, nullcontext())
    assert found.num_classes == 7
    torch.testing.assert_close(found(case.images()), expected(case.images()), atol=1e-3, rtol=1e-3)


def test_probe_with_a_distillation_token_sets_both_heads():
    case = case_of("deit_tiny_distilled_patch16_224")
    images, labels = digits(case.src.img_size)
    vit = models.create_vit(case.src, num_classes=0)
    fit_head(vit, [(images, labels)], 10, nullcontext())
    assert torch.equal(vit.head.weight, vit.head_dist.weight)
    assert vit(images).shape == (200, 10)
