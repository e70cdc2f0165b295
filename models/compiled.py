"""Compile the blocks of ViTs, so that all layers and depths of one width share a graph.

torch compiles a function once for every combination of shapes that it is called with. Whole ViTs of many depths and
widths are as many graphs, each with all of its layers; their blocks are one small graph for each width and number of
hidden neurons. What is no block runs as it is: the expansion of a learngene, patch embedding, final norm and head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FunctionType

from models.aux_net import AuxNet
from models.supernet import Supernet

import torch
from timm.layers import DropPath
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Backend = str | Callable  # of torch.compile
VITS = (VisionTransformer, Eva)
GRAPHS_OF_A_SIZE = 4  # at most: an Aux-Net may differ from Des-Nets of its width, and the first block from the others


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


class Compiled:
    """A block that runs compiled in one mode, training or evaluation, and as it is in the other."""

    run_compiled: Callable[..., Tensor]
    compiled_mode: bool

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.training != self.compiled_mode:
            return super().forward(x, *args, **kwargs)
        # the patch embedding transposes, so that the first block would be a graph of its own
        return self.run_compiled(self, x.contiguous(), *args, **kwargs)


def forward_of_block(block: Compiled, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """What is compiled: `forward` of the class of ``block`` without `Compiled`."""
    return super(Compiled, block).forward(x, *args, **kwargs)


@cache
def compiled(block: type[nn.Module]) -> type[nn.Module]:
    """The class of blocks ``block`` with `Compiled`."""
    return type(f"Compiled{block.__name__}", (Compiled, block), {})


def compile_blocks(blocks: Sequence[nn.Module], training: bool, backend: Backend) -> None:
    """Let ``blocks`` run compiled, in training or else in evaluation mode.

    Their weights may be computed ones: with every call they are inputs of the graph.
    """
    # torch keeps what it has compiled with the code object and counts it there; a copy is not shared with other runs
    function = FunctionType(forward_of_block.__code__.replace(), forward_of_block.__globals__)
    run = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    for block in blocks:
        block.__class__ = compiled(type(block))
        block.run_compiled, block.compiled_mode = run, training


def blocks_of(vits: Sequence[nn.Module]) -> list[nn.Module]:
    return [block for vit in vits for block in vit.blocks]


# ---------------------------------------------------------------------------------------------------------------------
# Drop path
# ---------------------------------------------------------------------------------------------------------------------


class DropPathOfAnyRate(nn.Module):
    """timm's DropPath with its rate in a tensor, as torch compiles another graph for every number of a module.

    It draws other random numbers than timm's.
    """

    def __init__(self, rate: float, device: torch.device):
        super().__init__()
        self.keep = torch.tensor(1 - rate, device=device)  # no buffer, which DistributedDataParallel would broadcast

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)


def share_drop_paths(blocks: Sequence[nn.Module], device: torch.device) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace every drop path by `DropPathOfAnyRate`, also where the rate is 0, as it is in the first block.

    Returns:
        The modules that are replaced, each with its block and its name in it.
    """
    names = {name for block in blocks for name, module in block.named_modules() if isinstance(module, DropPath)}
    replaced = []
    for block in blocks:
        for name in names:
            module = block.get_submodule(name)
            drop_path = DropPathOfAnyRate(getattr(module, "drop_prob", 0.0), device)
            block.set_submodule(name, drop_path.train(module.training))
            replaced.append((block, name, module))
    return replaced


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def vits_of(model: nn.Module) -> list[nn.Module]:
    """The ViTs that a training step of ``model`` may run; none of another network."""
    if isinstance(model, Supernet):
        return [*([] if model.sampler.alone else [model.aux_net.vit]), *model.vits.values()]
    if isinstance(model, AuxNet):
        return [model.vit]
    return [model] if isinstance(model, VITS) else []


def compiled_for_evaluation(model: nn.Module, backend: Backend = "inductor") -> nn.Module:
    """``model`` compiled: the blocks of a ViT, within other modules or not; any other network as a whole."""
    vits = [module for module in model.modules() if isinstance(module, VITS)]
    if not vits:
        return torch.compile(model, backend=backend)
    blocks = blocks_of(vits)
    share_drop_paths(blocks, next(model.parameters()).device)
    compile_blocks(blocks, training=False, backend=backend)
    return model


@contextmanager
def compiled_for_training(model: nn.Module, backend: Backend = "inductor") -> Iterator[None]:
    """Context in which ViTs that a training step of ``model`` runs (`vits_of`) have compiled blocks.

    torch raises an error if a block has to be compiled more often than the sizes of the ViTs explain.
    """
    vits = vits_of(model)
    blocks = blocks_of(vits)
    classes = [type(block) for block in blocks]
    replaced = share_drop_paths(blocks, next(model.parameters()).device)
    compile_blocks(blocks, training=True, backend=backend)
    try:
        with torch._dynamo.config.patch(settings_for(vits)):
            yield
    finally:
        for block, kind in zip(blocks, classes, strict=True):
            block.__class__ = kind
            del block.run_compiled, block.compiled_mode
        for block, name, module in replaced:
            block.set_submodule(name, module.train(block.training))


def settings_for(vits: Sequence[nn.Module]) -> dict[str, object]:
    """Settings of torch._dynamo for the blocks of ``vits``."""
    sizes = {tuple(p.shape for p in block.parameters()) for block in blocks_of(vits)}
    graphs = GRAPHS_OF_A_SIZE * len(sizes) + max((len(vit.blocks) for vit in vits), default=0)
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    limits = {name: max(graphs, getattr(config, name)) for name in (limit, f"accumulated_{limit}")}
    # a block is less than a bucket of DistributedDataParallel, for which torch would split it; torch 2.6 compiles twice
    # to find that a number such as an epsilon cannot be an input
    return {**limits, "optimize_ddp": False, "specialize_float": True}
