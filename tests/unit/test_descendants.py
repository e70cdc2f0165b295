"""Des-Nets that are trained beside the Aux-Net in stage 1."""

import json
from collections.abc import Callable
from pathlib import Path

import models
from common.errors import InputError
from datasets import build_dataset, build_transform
from losses import DistillationLoss, FamilyLoss
from models.sizes import SizeSampler
from training.build_model import size_sampler
from training.command_line import parse_options
from training.config import options_of, resolve

import pytest
import torch
from conftest import Run, assert_same_result, run_many
from torch import nn

LETS = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H3"
SHORT = "--data-set DIGITS --batch-size 256 --num-workers 0 --cache-data --epochs 2 --warmup-epochs 0 --device cpu"
TLEG = "--model aux_deit_nano_patch8_16_L4_H3 --descendants 2 --descendant-depths 2,3 --descendant-heads 1,2,3"
TLEG += " --sched step --decay-epochs 100"  # which does not depend on the number of epochs
SIZES = ("L2_H1", "L2_H2", "L3_H3", "L4_H1")


def lets(**kwargs: object) -> models.LeTs:
    return models.create_aux_net("deit_nano_patch8_16_L2_H1", "deit_nano_patch8_16_L4_H3", num_classes=10, **kwargs)


def tleg() -> models.TLEG:
    return models.create_model("aux_deit_nano_patch8_16_L4_H3", num_classes=10)


def supernet(
    per_step: int, alone: bool = False, create: Callable[..., models.AuxNet] = lets, **kwargs: object
) -> models.Supernet:
    torch.manual_seed(0)
    aux = create(**kwargs)
    with torch.no_grad():  # so that no two descendants are alike
        for parameter in aux.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    sizes = [models.parse_arch(f"deit_nano_patch8_16_{size}") for size in SIZES]
    return wrapped(aux, sizes, per_step, alone=alone).train()


def wrapped(aux: models.AuxNet, sizes: list[models.ViTArch], per_step: int, **kwargs: object) -> models.Supernet:
    """With the sizes of a step drawn."""
    net = models.Supernet(aux, SizeSampler({arch: arch.macs(10) for arch in sizes}, per_step, **kwargs))
    net.drawn = net.sampler.draw(epoch=0, seed=0)
    return net


@pytest.mark.parametrize(
    "options",
    [{}, {"full_width": True, "group_size": 2, "layers_per_row": 1}, {"create": tleg}],
    ids=["LeTs", "LiGO", "TLEG"],
)
def test_descendants_in_training_are_those_of_the_learngene(options):
    net, images = supernet(4, **options), torch.randn(3, 3, 16, 16)
    gene = models.Learngene.of(net.aux_net)
    logits = net(images)
    expected = {size: gene.descend(f"deit_nano_patch8_16_{size}")(images) for size in SIZES}
    assert logits.shape == (5, 3, 10)
    torch.testing.assert_close(logits[0], gene.aux_net()(images), atol=1e-5, rtol=0)
    for descendant in logits[1:]:
        near = [size for size, own in expected.items() if torch.allclose(descendant, own, atol=1e-5)]
        assert len(near) == 1
        del expected[near[0]]
    assert not expected
    assert net.eval()(images).shape == (3, 10)


def test_descendants_of_the_aux_nets_depth_leave_its_own_plan_alone():
    src, tgt, images = "deit_nano_patch8_16_L2_H1", "deit_nano_patch8_16_L10_H2", torch.randn(2, 3, 16, 16)
    aux = models.create_aux_net(src, tgt, num_classes=10, layers_per_row=4)  # of whose rows the last has two layers
    expected = aux.eval()(images)
    net = wrapped(aux, [models.parse_arch("deit_nano_patch8_16_L10_H1")], 1)
    torch.testing.assert_close(net.train()(images)[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(net.eval()(images), expected, atol=1e-6, rtol=0)


def test_an_aux_net_changes_its_precision_after_it_has_made_descendants():
    net, images = supernet(4), torch.randn(3, 3, 16, 16)
    logits = net(images)
    torch.testing.assert_close(net.double()(images.double()).float(), logits, atol=1e-5, rtol=0)


def test_the_wrapper_adds_no_parameters_buffers_or_keys():
    net = supernet(2)
    assert [id(p) for p in net.parameters()] == [id(p) for p in net.aux_net.parameters()]
    assert {f"aux_net.{name}" for name in net.aux_net.state_dict()} == net.state_dict().keys()
    assert {f"aux_net.{name}" for name, _ in net.aux_net.named_buffers()} == {name for name, _ in net.named_buffers()}


@pytest.mark.parametrize("create", [lets, tleg])
def test_activation_checkpointing_of_descendants_gives_the_same_gradients(create):
    found, images = [], torch.randn(2, 3, 16, 16)
    for recompute in (False, True):
        net = supernet(4, create=create)
        net.set_grad_checkpointing(recompute)
        net(images).square().sum().backward()
        found.append({name: p.grad for name, p in net.aux_net.named_parameters()})
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name])


def test_each_step_samples_new_sizes():
    sampler = supernet(2).sampler
    steps = [sampler.draw(epoch=0, seed=seed) for seed in range(20)]
    assert all(len(set(drawn)) == 2 for drawn in steps)
    assert {arch for drawn in steps for arch in drawn} == set(sampler.archs)
    assert sampler.draw(epoch=0, seed=0) == steps[0]


def test_descendants_give_gradients_to_the_whole_learngene():
    net = supernet(4)
    net(torch.randn(2, 3, 16, 16))[1:].square().sum().backward()
    gradients = {name: p.grad.abs().amax(-1) for name, p in net.aux_net.named_parameters()}
    assert (gradients["E"] > 0).all()  # L3_H3 is as wide as the Aux-Net
    assert all((gradient > 0).any() for gradient in gradients.values())


def test_aux_net_among_descendants_that_are_trained_alone():
    net, images = supernet(1), torch.randn(2, 3, 16, 16)
    expected = net(images)[0]
    alone = wrapped(net.aux_net, [net.aux_net.arch], 1, alone=True).train()
    torch.testing.assert_close(alone(images)[0], expected, atol=1e-6, rtol=0)
    alone.eval()
    assert not any(vit.training for vit in (alone.aux_net.vit, *alone.vits.values()))


def test_descendants_alone_leave_the_aux_net_out():
    images = torch.randn(2, 3, 16, 16)
    beside, alone = supernet(4), supernet(4, alone=True)
    both = beside(images)
    assert torch.equal(alone(images), both[1:])
    loss = DistillationLoss(nn.CrossEntropyLoss(), "none", alpha=0.0, tau=1.0)
    expected = torch.stack([loss(logits, torch.arange(2)) for logits in both[1:]]).mean()
    torch.testing.assert_close(FamilyLoss(loss, weight=1.0)(both[1:], torch.arange(2)), expected)


def test_alternating_rows_give_back_the_vit_that_the_learngene_starts_from():
    src, tgt = "deit_nano_patch8_16_L4_H1", "deit_nano_patch8_16_L8_H3"
    vit, images = models.create_model(src, num_classes=10).eval(), torch.randn(2, 3, 16, 16)
    aux = models.create_aux_net(src, tgt, num_classes=10, init_scheme=("alternate_noisy", "rand"), init_noise=(0, 0))
    aux.start_from(vit.state_dict())
    torch.testing.assert_close(models.Learngene.of(aux).descend(src).eval()(images), vit(images))


def test_lets_plus_recipe_differs_from_the_published_one_in_these_options_alone():
    published, improved = (
        parse_options(["--config", f"/configs/{name}.yaml"]) for name in ("conf_train_aux_lets", "lets_plus_aux")
    )
    theirs, ours = options_of(published), options_of(improved)
    differing = {name for name in theirs if theirs[name] != ours[name]} - {"output_dir"}
    assert differing == {
        *("src_path", "trans_init_scheme", "descendants", "descendant_depths", "descendant_heads"),
        "descendant_weight",
    }
    aux = models.create_aux_net(improved.model.src_arch, improved.model.tgt_arch, num_classes=10)
    sampler = size_sampler(resolve(improved).model, 224, num_classes=10, epochs=1)
    sizes = models.Supernet(aux, sampler).sampler.archs
    assert (len(sizes), str(sizes[-1])) == (70, "L12-H12 (width 768), patch 16, image 224")


def test_the_loss_is_shared():
    logits, teacher = torch.randn(3, 5, 7, requires_grad=True), torch.randn(5, 7)
    distillation = DistillationLoss(nn.CrossEntropyLoss(), "soft", alpha=1.0, tau=2.0)
    loss = FamilyLoss(distillation, weight=0.25)(logits, torch.arange(5), teacher)
    descendants = [distillation(descendant, torch.arange(5), teacher) for descendant in logits[1:]]
    expected = 0.75 * distillation(logits[0], torch.arange(5), teacher) + 0.25 * sum(descendants) / 2
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The test images, and their labels."""
    transform = build_transform("DIGITS", is_train=False, input_size=16)
    images, labels = zip(*build_dataset("DIGITS", None, False, transform)[0], strict=True)
    return torch.stack(images), torch.tensor(labels)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("descendants")

    def run(options: str, processes: int = 1) -> Run:
        return Run(f"{SHORT} {options}".split(), processes)

    sampled = f"{LETS} --descendants 2 --descendant-depths 2,3"
    to = f"{sampled} --output-dir {folder}"
    runs = {
        "whole": run(f"{to}/whole"),
        "begun": run(f"{to}/cut --epochs 1 --sched step --decay-epochs 100"),
        "whole, other schedule": run(f"{to}/whole2 --sched step --decay-epochs 100"),
        "continued": run(f"{to}/cut --resume auto --sched step --decay-epochs 100"),
        "two": run(f"{to}/two --batch-size 128", processes=2),
        "alone": run(
            f"{sampled} --descendant-weight 1 --trans-init-scheme alternate_noisy rand --output-dir {folder}/alone"
        ),
        "too wide": run(f"{LETS} --descendants 1 --descendant-heads 4"),
        "too many": run(f"{LETS} --descendants 9 --descendant-depths 2 --descendant-heads 1,2"),
        "TLEG, whole": run(f"{TLEG} --output-dir {folder}/tleg"),
        "TLEG, continued": run(f"{TLEG} --output-dir {folder}/tleg-cut --resume auto"),
        "TLEG, alone": run(f"{TLEG} --descendant-weight 1 --epochs 1 --output-dir {folder}/tleg-alone"),
        "TLEG, default sizes": run("--model aux_deit_nano_patch8_16_L2 --descendants 1"),
        "plain": run("--model deit_nano_patch8_16_L4 --descendants 1"),
        "none": run(f"{LETS} --descendant-heads 1"),
    }
    begun = run(f"{TLEG} --epochs 1 --output-dir {folder}/tleg-cut")
    first = {"begun": runs.pop("begun"), "TLEG, begun": begun}
    return folder, run_many(first, folder / "first") | run_many(runs, folder / "runs")


def test_runs_with_descendants_resume_bit_for_bit(outcomes):
    folder, results = outcomes
    for name in ("whole", "begun", "continued", "two", "whole, other schedule", "alone"):
        assert set(results[name].codes) == {0}, results[name].stderr
    assert_same_result(folder / "cut", folder / "whole2")
    assert models.load_learngene(folder / "whole" / "learngene.safetensors").options["descendants"] == 2


def test_tleg_with_descendants_resumes_bit_for_bit(outcomes):
    folder, results = outcomes
    for name in ("whole", "begun", "continued", "alone"):
        assert set(results[f"TLEG, {name}"].codes) == {0}, results[f"TLEG, {name}"].stderr
    assert_same_result(folder / "tleg-cut", folder / "tleg")
    gene = models.load_learngene(folder / "tleg" / "learngene.safetensors")
    assert (gene.method, gene.options["descendants"]) == ("tleg", 2)
    assert gene.descend("deit_nano_patch8_16_L3_H1")(digits()[0]).isfinite().all()


@pytest.mark.parametrize("name", ["alone", "tleg-alone"])
def test_without_the_aux_net_the_largest_descendant_is_evaluated(outcomes, name):
    folder, _ = outcomes
    gene = models.load_learngene(folder / name / "learngene.safetensors")
    vit, (images, labels) = gene.descend("deit_nano_patch8_16_L3_H3").eval(), digits()
    accuracy = 100 * (vit(images).argmax(1) == labels).double().mean().item()
    logged = json.loads((folder / name / "log.txt").read_text().splitlines()[-1])["test_acc1"]
    assert logged == pytest.approx(accuracy, abs=1.01 * 100 / len(labels))  # one may lie on the border of two classes


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("too wide", "--descendants 1 of the sizes that --descendant-… give: the Des-Net has width 128"),
        (
            "too many",
            "--descendants 9 of the sizes that --descendant-… give: 9 descendants in a step of 2 sizes",
        ),
        ("TLEG, default sizes", "--descendants 1 of the sizes that --descendant-… give: 1 descendants in a"),
        ("plain", "--descendants needs stage 1 of a method"),
        ("none", "--descendants is missing"),
    ],
)
def test_invalid_options_print_one_line(outcomes, name, found):
    result = outcomes[1][name]
    assert result.codes == [2]
    assert result.stderr.startswith(f"error: {found}")
    assert result.stderr.count("\n") == 1


def test_more_descendants_than_sizes_are_refused():
    with pytest.raises(InputError, match="of 4 sizes: expected no more"):
        supernet(5)
