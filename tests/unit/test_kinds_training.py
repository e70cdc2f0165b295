"""Aux-Nets and Des-Nets of every kind of ViT in training."""

import models

import torch
from kinds_of_vit import CLASSES, case_of, every_structure, gradients
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector


@every_structure
def test_a_step_of_training_changes_aux_net_and_des_nets(kind):
    case = case_of(kind)
    gene = models.Learngene.of(case.aux_net())
    tleg = models.TLEG(case.src, num_classes=CLASSES)
    for model in (gene.descend(case.narrow), gene.descend(case.wide), gene.aux_net(), tleg):
        step(model, case.images())


def step(model: nn.Module, images: torch.Tensor) -> None:
    """Train ``model`` for one step, which reaches every parameter and the average of it."""
    ema, start = ModelEmaV3(model, decay=0.75), parameters_to_vector(model.parameters()).detach()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
    cross_entropy(model.train()(images), torch.arange(len(images))).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not unused
    optimizer.step()
    ema.update(model)
    end, average = (parameters_to_vector(m.parameters()).detach() for m in (model, ema.module))
    torch.testing.assert_close(average, 0.75 * start + 0.25 * end)
    with torch.no_grad():
        trained, averaged = model.eval()(images), ema.module.eval()(images)
    assert trained.isfinite().all()
    assert not torch.equal(trained, averaged)


@every_structure
def test_training_computes_what_evaluation_does_with_and_without_checkpointing(kind):
    case = case_of(kind)
    aux, images = case.aux_net().double(), case.images().double()
    logits, expected = gradients(aux, images)
    assert expected.keys() == dict(aux.named_parameters()).keys()
    aux.train()
    aux.vit.eval()  # without the random rotary positions of some kinds
    calls = []
    aux.vit.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for recompute in (False, True):
        aux.set_grad_checkpointing(recompute)
        found_logits, found = gradients(aux, images)
        torch.testing.assert_close(found_logits, logits, rtol=1e-5, atol=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)
    assert len(calls) > 2  # the block was called again in the last backward pass
