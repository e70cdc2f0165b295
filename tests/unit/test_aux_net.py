"""An Aux-Net as a module among modules: copies, averages, precision, compilation, recomputation, weight decay."""

import copy
from dataclasses import replace

import models
from models.learngene import to_published

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])
AUX = models.ViTArch(width=24, depth=8, num_heads=6, patch_size=8, img_size=16)
SRC = models.ViTArch(width=8, depth=4, num_heads=2, patch_size=8, img_size=16)


def aux_net_of(method: str, depth: int = 8, **kwargs) -> models.AuxNet:
    torch.manual_seed(0)
    aux = replace(AUX, depth=depth)
    if method == "lets":
        return models.create_aux_net(replace(SRC, depth=depth // 2), aux, num_classes=5, **kwargs)
    return models.TLEG(aux, num_classes=5, **kwargs)


def gradients(aux_net: torch.nn.Module, call=None) -> dict[str, torch.Tensor]:
    aux_net.zero_grad(set_to_none=True)
    cross_entropy((aux_net if call is None else call)(IMAGES), LABELS).backward()
    return {name: p.grad.clone() for name, p in aux_net.named_parameters()}


both = pytest.mark.parametrize("method", ["lets", "tleg"])


@both
def test_parameters_are_those_of_the_learngene_alone(method):
    aux_net = aux_net_of(method)
    assert {name for name, _ in aux_net.named_parameters()} == aux_net.state_dict().keys()
    assert all(p.device.type == "cpu" for p in aux_net.parameters())
    assert all(p.device.type == "meta" for p in aux_net.vit.parameters())


@both
def test_copies_are_independent(method):
    aux_net = aux_net_of(method).eval()
    copied, ema = copy.deepcopy(aux_net), ModelEmaV3(aux_net, decay=0.5)
    before = aux_net(IMAGES)
    with torch.no_grad():
        for p in aux_net.parameters():
            p.zero_()
    assert not torch.equal(aux_net(IMAGES), before)
    assert torch.equal(copied(IMAGES), before)
    assert torch.equal(ema.module(IMAGES), before)
    copied.train()
    assert not aux_net.training
    assert not aux_net.vit.training


@both
def test_average_follows_every_parameter(method):
    aux_net = aux_net_of(method)
    ema = ModelEmaV3(aux_net, decay=0.75)
    start = copy.deepcopy(aux_net.state_dict())
    with torch.no_grad():
        for p in aux_net.parameters():
            p.add_(1)
    ema.update(aux_net)
    for name, averaged in ema.module.state_dict().items():
        torch.testing.assert_close(averaged, start[name] + 0.25)


@both
def test_state_dict_round_trip(method, tmp_path):
    aux_net = aux_net_of(method).eval()
    torch.save(aux_net.state_dict(), tmp_path / "weights.pth")
    torch.manual_seed(7)
    other = aux_net_of(method).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True), strict=True)
    assert torch.equal(other(IMAGES), aux_net(IMAGES))


@both
def test_train_and_eval_reach_the_computed_vit(method):
    aux_net = aux_net_of(method, drop_path_rate=0.9)
    aux_net.train()
    assert not torch.equal(aux_net(IMAGES), aux_net(IMAGES))
    aux_net.eval()
    assert torch.equal(aux_net(IMAGES), aux_net(IMAGES))


@both
def test_activation_checkpointing_gives_the_same_gradients(method):
    aux_net = aux_net_of(method)
    expected = gradients(aux_net)
    aux_net.set_grad_checkpointing()
    calls = []
    hook = aux_net.vit.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(aux_net)
    hook.remove()
    assert len(calls) > 1  # the block was called again in the backward pass
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("full_width", [False, True])
@pytest.mark.parametrize("width", [8, 24])
def test_training_computes_what_evaluation_does(width, full_width):
    torch.manual_seed(0)
    aux = models.ViTArch(width=width, depth=8, num_heads=width // 4, patch_size=8, img_size=16)
    aux_net = models.create_aux_net(SRC, aux, num_classes=5, full_width=full_width)
    expected, found = gradients(aux_net.eval()), gradients(aux_net.train())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_training_multiplies_less_than_a_plain_vit():
    aux_net = aux_net_of("lets").train()
    images, counts = IMAGES.repeat(16, 1, 1, 1), []
    for model in (aux_net, aux_net.to_vit().train()):
        with FlopCounterMode(display=False) as counter:
            model(images).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] < 0.8 * counts[1]


@both
def test_autocast(method):
    aux_net = aux_net_of(method).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = aux_net(IMAGES)
    torch.testing.assert_close(low.float(), aux_net(IMAGES), atol=0.05, rtol=0.05)
    found = gradients(aux_net, torch.autocast("cpu", dtype=torch.bfloat16)(aux_net))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())


@pytest.mark.full
@both
def test_compile_without_graph_break(method):
    aux_net = aux_net_of(method, depth=4)  # twice as many layers take twice as long to compile
    compiled = torch.compile(aux_net, backend="aot_eager", fullgraph=True)
    expected, found = gradients(aux_net), gradients(aux_net, compiled)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@both
def test_decayed_weights_are_the_published_ones_element_for_element(method):
    aux_net = aux_net_of(method)
    optimizer = create_optimizer_v2(aux_net, opt="adamw", lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    marks = {name: torch.full_like(p, id(p) in decayed) for name, p in aux_net.named_parameters()}
    published = to_published(models.Learngene(method, marks, aux_net.config))
    for key, mark in published.items():  # timm's rule on the published tensors, whose model exempts pos_embed
        expected = mark.ndim > 1 and not key.endswith(".bias") and key != "pos_embed"
        assert (mark == expected).all(), key
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        t.numel() for t in published.values()
    )


@both
def test_to_vit_is_a_plain_vit(method):
    aux_net = aux_net_of(method).eval()
    vit = aux_net.to_vit()
    assert torch.equal(vit(IMAGES), aux_net(IMAGES))
    first = vit.blocks[0].mlp.fc1.weight
    other = vit.blocks[1].mlp.fc1.weight.clone()
    with torch.no_grad():
        first.zero_()  # layers that share weights in the Aux-Net do not here
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, other)


@both
def test_des_net_does_not_share_memory_with_the_learngene(method):
    gene = models.Learngene.of(aux_net_of(method))
    before = {name: t.clone() for name, t in gene.tensors.items()}
    vit = gene.descend(AUX)  # of which some layers are equal
    memory = [p.untyped_storage() for p in vit.parameters()]
    assert len({storage.data_ptr() for storage in memory}) == len(memory)
    assert [storage.nbytes() for storage in memory] == [4 * p.numel() for p in vit.parameters()]  # nothing else in it
    with torch.no_grad():
        for p in vit.parameters():
            p.zero_()
    assert all(torch.equal(t, before[name]) for name, t in gene.tensors.items())
