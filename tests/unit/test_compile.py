"""Compiled blocks: the same results, one graph for each width and number of hidden neurons, and no other."""

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product

import models
from common.files import read_checkpoint
from models import compiled
from models.compiled import DropPathOfAnyRate, compiled_for_evaluation, compiled_for_training, vits_of
from models.features import Features
from models.preprocessing import DEFAULT, Preprocessing
from models.sizes import SizeSampler
from training.teacher import Renormalised, Teacher

import pytest
import timm
import torch
from conftest import Run, assert_same_result, run_many
from kinds_of_vit import KINDS, case_of, gradients
from timm.layers import DropPath
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

ARCH = "deit_nano_patch8_16_L3_H2"
SOURCES: dict[str, Callable[..., models.AuxNet]] = {
    "lets": lambda **vit: models.create_aux_net("deit_nano_patch8_16_L2_H1", ARCH, num_classes=5, **vit),
    "tleg": lambda **vit: models.create_model(f"aux_{ARCH}", num_classes=5, **vit),
    "elastic": lambda **vit: models.create_aux_net(ARCH, num_classes=5, **vit),
}
# besides one for each width and number of hidden neurons: E on the weights (LeTs), other epsilons of the norms (TLEG)
GRAPHS_OF_THE_AUX_NET = {"lets": 1, "tleg": 1, "elastic": 0}
DEPTHS, HEADS, MLP_RATIOS = (1, 2, 3), (1, 2), {"lets": (None,), "tleg": (None,), "elastic": (2.0, None)}


class Counter(CompileCounterWithBackend):
    """Compiles with autograd and without a compiler, and counts the graphs."""

    def __init__(self):
        super().__init__("aot_eager")


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def supernet(method: str, **kwargs: object) -> models.Supernet:
    """With every size on offer."""
    torch.manual_seed(0)
    aux_net = SOURCES[method](drop_path_rate=0.3)
    sizes = [
        replace(aux_net.arch, depth=depth, num_heads=heads, width=heads * aux_net.arch.head_dim, mlp_ratio=ratio)
        for depth, heads, ratio in product(DEPTHS, HEADS, MLP_RATIOS[method])
    ]
    return models.Supernet(aux_net, SizeSampler({arch: arch.macs(5) for arch in sizes}, 1, **kwargs)).train()


def step(net: nn.Module, autocast: object = None) -> list[Tensor]:
    """The outputs of a step, and the gradients of all parameters."""
    torch.manual_seed(1)
    net.zero_grad()
    with autocast or nullcontext():
        output = net(images())
    output.float().square().sum().backward()
    return [output.detach(), *(p.grad for p in net.parameters())]


def steps(net: models.Supernet) -> Iterator[list[Tensor]]:
    """`step` for each size."""
    for arch in net.sampler.archs:
        net.drawn = [arch]
        yield step(net)


@contextmanager
def not_compiled() -> Iterator[None]:
    """Context in which compiled blocks run as they are, with the same random numbers."""
    with torch.compiler.set_stance("force_eager"):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SOURCES)
def test_a_width_is_one_graph_for_layers_and_depths_of_any_drop_path(method):
    net, counter = supernet(method), Counter()
    with compiled_for_training(net, counter):
        with not_compiled():
            expected = [*steps(net)]
        assert not counter.frame_count
        for _ in range(2):  # and nothing is compiled the second time
            for found, wanted in zip(steps(net), expected, strict=True):
                torch.testing.assert_close(found, wanted)
            assert counter.frame_count == len(HEADS) * len(MLP_RATIOS[method]) + GRAPHS_OF_THE_AUX_NET[method]


@pytest.mark.parametrize("method", ["lets", "elastic"])
def test_activation_checkpointing_and_low_precision_of_compiled_blocks(method):
    net, counter = supernet(method, alone=True), Counter()
    arch = net.sampler.archs[-1]
    net.drawn = [arch]
    with compiled_for_training(net, counter):
        expected = step(net)
        net.set_grad_checkpointing()
        torch.testing.assert_close(step(net), expected)
        assert counter.frame_count == 1
        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        with not_compiled():
            low = step(net, autocast)
        for found, wanted in zip(step(net, autocast), low, strict=True):
            torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)
        assert counter.frame_count == 2


# registers and LayerScale; EVA's rotary and learned positions, SwiGLU; rotary positions, biases of q and v alone
EXAMPLES = ("vit_small_patch14_reg4_dinov2", "eva02_base_patch14_448", "vit_small_patch16_dinov3_qkvb")


@pytest.mark.parametrize("kind", [kind for kind in EXAMPLES if kind in KINDS])
def test_every_kind_of_vit_is_one_graph(kind):
    case, found = case_of(kind), []
    model, counter = case.aux_net().double().train(), Counter()
    for context in (nullcontext(), compiled_for_training(model, counter)):
        torch.manual_seed(0)  # of the random positions of some kinds
        with context:
            found.append(gradients(model, case.images().double()))
    torch.testing.assert_close(*found)
    assert counter.frame_count == 1


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", SOURCES)
def test_distributed_steps_reach_every_parameter_and_do_not_split_blocks(method, process_group):
    net, counter = supernet(method, alone=True), Counter()
    distributed = DistributedDataParallel(net)  # without find_unused_parameters: raises if one has no gradient
    with compiled_for_training(net, counter):
        for depth in (1, 3, 1):
            net.drawn = [arch for arch in net.sampler.archs if arch.label == f"L{depth}-H2"]
            with not_compiled():
                expected = step(net)
            torch.testing.assert_close(step(distributed), expected)
    assert counter.frame_count == 1


def test_features_of_compiled_members():
    torch.manual_seed(0)
    aux_net = models.create_aux_net(ARCH, num_classes=0)
    aux_net.add_feature_maps()
    sizes = [replace(aux_net.arch, depth=depth) for depth in (1, 2)]
    net = models.Supernet(aux_net, SizeSampler({arch: arch.macs(0) for arch in sizes}, 2), features=True).train()
    net.drawn, counter = sizes, Counter()
    expected = [features.detach() for features in net(images())]
    with compiled_for_training(net, counter):
        torch.testing.assert_close(net(images()), expected, check_stride=False)
    assert counter.frame_count == 1


# ---------------------------------------------------------------------------------------------------------------------
# Plain ViTs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "deit_nano_patch8_16_L3_H2"])
def test_plain_vit_is_compiled_in_training_alone_and_afterwards_as_it_was(name):
    torch.manual_seed(0)
    vit, counter = models.create_model(name, num_classes=5, img_size=16, drop_path_rate=0.5), Counter()
    keys, modules = vit.state_dict().keys(), {name: type(module) for name, module in vit.named_modules()}
    with compiled_for_training(vit.train(), counter):
        with not_compiled():
            expected = step(vit)
        vit.set_grad_checkpointing()
        torch.testing.assert_close(step(vit), expected)
        assert counter.frame_count == 1
        copy.deepcopy(vit).eval()(images())
        vit.eval()(images(1))
        assert counter.frame_count == 1
        assert vit.state_dict().keys() == keys
    assert {name: type(module) for name, module in vit.named_modules()} == modules
    assert [p.drop_prob for block in vit.blocks for p in block.modules() if isinstance(p, DropPath)][-1] == 0.5


def test_drop_path_of_any_rate_is_that_of_timm():
    torch.manual_seed(0)
    x = torch.randn(20_000, 2, 1, dtype=torch.bfloat16).abs() + 1
    for rate in (0.0, 0.1, 0.6):
        dropped = DropPathOfAnyRate(rate, torch.device("cpu"))(x)
        shares = [(kept != 0).all(dim=(1, 2)).float().mean().item() for kept in (dropped, DropPath(rate).train()(x))]
        assert shares == pytest.approx([1 - rate] * 2, abs=0.02)
        assert dropped.dtype == x.dtype
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept].float(), (x[kept] / (1 - rate)).float(), atol=0.02, rtol=0.01)
    assert DropPathOfAnyRate(0.6, torch.device("cpu")).eval()(x) is x


def test_rates_of_drop_paths_are_kept():
    vit = models.create_vit(models.parse_arch("deit_nano_patch8_16_L3_H1"), drop_path_rate=0.2).train()
    with compiled_for_training(vit, "eager"):
        rates = [1 - block.get_submodule(f"drop_path{i}").keep.item() for block in vit.blocks for i in (1, 2)]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2], abs=1e-6)


def test_more_graphs_than_the_sizes_explain_are_an_error(monkeypatch):
    vit = models.create_vit(models.parse_arch("deit_nano_patch8_16_L1_H1")).train()
    monkeypatch.setattr(compiled, "GRAPHS_OF_A_SIZE", 1)
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({limit: 1}):
        for _ in range(2):  # another run starts from none
            with compiled_for_training(vit, "eager"):
                for count in (1, 2):  # one for the size, and one for the layer
                    vit(images(count))
                with pytest.raises(Exception, match=r"fullgraph=True|cache_size_limit"):
                    vit(images(3))
        assert getattr(config, limit) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Teachers
# ---------------------------------------------------------------------------------------------------------------------


def test_teacher_has_compiled_blocks_if_it_is_a_vit():
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=5, img_size=16, drop_path_rate=0.5)
    for network in (vit, Features(vit), Renormalised(vit, DEFAULT, Preprocessing(mean=(0.5,) * 3))):
        counter, autocast = Counter(), torch.autocast("cpu", dtype=torch.bfloat16)
        plain, blocks = (Teacher(copy.deepcopy(network), torch.bfloat16) for _ in range(2))
        blocks = Teacher(compiled_for_evaluation(blocks.model, counter), torch.bfloat16)
        with autocast:
            for _ in range(2):
                torch.testing.assert_close(blocks(images()), plain(images()))
        assert counter.frame_count == 1
        assert blocks.digest() == plain.digest()


def test_teacher_that_is_no_vit_is_compiled_as_a_whole():
    network, counter = timm.create_model("test_resnet", num_classes=5), Counter()
    assert not vits_of(network)
    expected = Teacher(network, torch.float32)(images())
    torch.testing.assert_close(Teacher(compiled_for_evaluation(network, counter), torch.float32)(images()), expected)
    assert counter.frame_count == 1


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

COMMAND = (
    "--data-set DIGITS --batch-size 256 --num-workers 0 --cache-data --warmup-epochs 0 --device cpu --accum-iter 2"
)
COMMAND += " --src-arch deit_nano_patch8_16_L3_H1 --descendants 1 --descendant-weight 1 --descendant-heads 1 --compile"
COMMAND += " --descendant-heads 1 --descendant-depths 1,2,3 --drop-path 0.1 --sched step --decay-epochs 100"


@pytest.mark.full
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
def test_compiled_run_with_descendants_resumes_bit_for_bit(tmp_path):
    lines = {
        "whole": f"--epochs 2 --output-dir {tmp_path}/whole",
        "begun": f"--epochs 1 --output-dir {tmp_path}/cut",
        "continued": f"--epochs 2 --output-dir {tmp_path}/cut --resume auto",
    }
    for name, line in lines.items():  # the first compiles for all, as torch caches what it has compiled
        outcome = run_many({name: Run(f"{COMMAND} {line}".split())}, tmp_path / f"runs-{name}")[name]
        assert outcome.codes == [0], outcome.stderr
    assert_same_result(tmp_path / "cut", tmp_path / "whole")
    keys = read_checkpoint(tmp_path / "whole" / "checkpoint.pth")["model"]
    assert not [key for key in keys if "_orig_mod" in key]
