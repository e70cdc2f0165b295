"""Kinds of ViT for tests: every architecture of timm that docs/vit_kinds.md names, in small sizes."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import models
from models.axes import axes_of, fuse, split, structure_of
from models.kinds import sizes_of
from models.vit import create_vit, pair

import pytest
import timm
import torch
from torch import Tensor, nn

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "vit_kinds.md").read_text(encoding="utf-8")
VERSION = re.search(r"timm (\S+)'s modules", PAGE)[1]
CLASSES = 5

# the fast tests see every feature once
REPRESENTATIVE = (
    "vit_tiny_patch16_224",  # class token
    "vit_medium_patch16_gap_256",  # no class token, average pooling, qkv without bias
    "vit_small_patch14_reg4_dinov2",  # registers without a position, LayerScale
    "deit_tiny_distilled_patch16_224",  # distillation token with a head of its own
    "vit_base_patch16_siglip_224",  # attention pooling
    "vit_pe_core_large_patch14_336",  # attention pooling with heads of another size than those of the layers
    "vit_base_patch16_clip_quickgelu_224",  # norm_pre
    "aimv2_large_patch14_224",  # norm of the patch embedding, RMSNorm, SwiGLU, no biases
    "vit_giant_patch14_dinov2",  # packed SwiGLU
    "vit_base_patch16_rpn_224",  # norms after attention and MLP
    "vit_small_patch16_dinov3",  # rotary positions alone
    "vit_small_patch16_dinov3_qkvb",  # biases of q and v alone
    "vit_pe_lang_large_patch14_448",  # no norm at the end
    "eva02_tiny_patch14_336",  # rotary and learned positions
    "eva02_base_patch14_448",  # q, k and v apart, norm of the MLP
    "eva02_base_patch16_clip_224",  # the same, and norm of the attention
    "eva02_enormous_patch14_clip_224",  # of EVA, norms after attention and MLP
    "beit3_base_patch16_224",  # norms inside attention and MLP
)

# with those above: one of each that differ in more than numbers (`structure`)
STRUCTURES = """
eva_giant_patch14_224 eva_giant_patch14_clip_224 eva_large_patch14_196 flexivit_base test_vit test_vit2 test_vit3
test_vit4 vit_base_patch14_dinov2 vit_base_patch16_224_miil vit_base_patch16_clip_224 vit_base_patch16_gap_224
vit_base_patch16_lingbot vit_base_patch16_radio_v3 vit_base_patch16_reg4_gap_256 vit_base_patch16_rope_224
vit_base_patch16_rope_ape_224 vit_base_patch16_rope_reg1_gap_256 vit_base_patch32_siglip_256
vit_base_patch32_siglip_gap_256 vit_betwixt_patch16_reg1_gap_256 vit_giant_patch14_reg1_tipsv2
vit_giant_patch16_lingbot vit_giant_patch16_radio_v3 vit_huge_plus_patch16_dinov3 vit_huge_plus_patch16_dinov3_qkvb
vit_intern300m_patch14_448 vit_mediumd_patch16_rope_reg1_gap_256 vit_pe_core_gigantic_patch14_448
vit_pe_lang_gigantic_patch14_448 vit_pe_spatial_base_patch16_512 vit_so150m2_patch16_reg1_gap_256
vit_so150m_patch16_reg4_gap_256 vit_so150m_patch16_reg4_map_256
""".split()  # noqa: SIM905  a line for each would be a page

# with those above: one of each that differ in more than their sizes in small ViTs (`signature`)
SIZES = """
aimv2_3b_patch14_224 beit3_giant_patch14_224 eva02_large_patch14_clip_224 vit_7b_patch16_dinov3
vit_base_patch14_reg1_tipsv2 vit_base_patch16_plus_240 vit_base_patch16_siglip_gap_224 vit_base_patch32_224
vit_base_patch32_clip_224 vit_base_patch32_clip_quickgelu_224 vit_base_patch32_plus_256 vit_base_patch8_224
vit_betwixt_patch16_reg4_gap_256 vit_betwixt_patch16_rope_reg4_gap_256 vit_giant_patch14_224
vit_giant_patch14_clip_224 vit_giant_patch14_reg4_dinov2 vit_giant_patch16_gap_224 vit_giantopt_patch16_siglip_256
vit_giantopt_patch16_siglip_gap_256 vit_gigantic_patch14_224 vit_gigantic_patch14_clip_224
vit_gigantic_patch14_clip_quickgelu_224 vit_huge_patch14_224 vit_huge_patch14_clip_224
vit_huge_patch14_clip_quickgelu_224 vit_huge_patch14_gap_224 vit_huge_patch16_gap_448 vit_huge_patch16_radio_v3
vit_huge_patch16_radio_v4 vit_large_patch14_224 vit_large_patch14_clip_224 vit_large_patch14_clip_quickgelu_224
vit_large_patch16_siglip_512 vit_large_patch16_siglip_gap_512 vit_little_patch16_reg1_gap_256
vit_little_patch16_reg4_gap_256 vit_pe_core_base_patch16_224 vit_pe_core_small_patch16_384
vit_pe_core_tiny_patch16_384 vit_pe_spatial_large_patch14_448 vit_so400m_patch14_reg1_tipsv2
vit_so400m_patch14_siglip_224 vit_so400m_patch14_siglip_gap_224 vit_so400m_patch16_radio_v4
vit_so400m_patch16_siglip_256 vit_so400m_patch16_siglip_gap_256 vit_wee_patch16_reg1_gap_256
""".split()  # noqa: SIM905
DISTINCT = [*STRUCTURES, *SIZES]


def rows_of(heading: str) -> dict[str, list[str]]:
    """The table under a heading of docs/vit_kinds.md: architecture → its cells."""
    table = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return {name: cells.split(" | ") for name, cells in re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)}


WORKING, REFUSED = rows_of("Architectures that work"), rows_of("Architectures that are refused")
REGISTERED = [name for module in ("vision_transformer", "eva") for name in timm.list_models(module=module)]
KINDS = [name for name in (*REGISTERED, "deit_tiny_distilled_patch16_224") if name not in REFUSED]


def parameters(kinds: Sequence[str]) -> list:
    return [pytest.param(kind, marks=() if kind in REPRESENTATIVE else pytest.mark.full) for kind in kinds]


every_architecture = pytest.mark.parametrize("kind", parameters(KINDS))
# the others are the same ViTs in the sizes of `case_of`
every_kind = pytest.mark.parametrize(
    "kind", parameters([kind for kind in KINDS if kind in {*REPRESENTATIVE, *DISTINCT}])
)
# where no more than the path matters that a kind takes through the code, which numbers do not change
every_structure = pytest.mark.parametrize(
    "kind", parameters([kind for kind in KINDS if kind in {*REPRESENTATIVE, *STRUCTURES}])
)


@dataclass(frozen=True)
class Case:
    """A source of a kind, a larger Aux-Net, and Des-Nets narrower and wider than the source; two patches a side."""

    src: models.ViTArch
    tgt: models.ViTArch
    narrow: models.ViTArch
    wide: models.ViTArch

    def source(self) -> nn.Module:
        """A ViT with weights of which none is 0 or 1, in evaluation mode."""
        torch.manual_seed(0)
        vit = create_vit(self.src, num_classes=CLASSES).requires_grad_(False)
        for parameter in vit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        return vit.eval()

    def aux_net(self, source: dict[str, Tensor] | None = None) -> models.LeTs:
        """An Aux-Net of ``tgt`` sizes that starts from ``source``, in evaluation mode."""
        torch.manual_seed(1)
        aux = models.create_aux_net(self.src, self.tgt, num_classes=CLASSES)
        aux.start_from(self.source().state_dict() if source is None else source)
        return aux.eval()

    def images(self, count: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, 3, *pair(self.src.img_size), generator=generator)


@cache
def case_of(kind: str) -> Case:
    """Sizes with heads as the architecture has them, as few as its pooling block allows."""
    arch, pool = models.parse_arch(kind), sizes_of(kind)["pool_head_dim"]
    unit = next(heads for heads in range(1, 100) if not pool or heads * arch.head_dim % pool == 0)

    def sized(depth: int, units: int) -> models.ViTArch:
        heads, side = units * unit, 2 * pair(arch.patch_size)[0]
        return replace(arch, depth=depth, num_heads=heads, width=heads * arch.head_dim, img_size=side)

    return Case(sized(2, 2), sized(3, 3), sized(1, 1), sized(4, 3))


def signature(vit: nn.Module, with_numbers: bool = True) -> tuple:
    """What a ViT is: its modules with their plain attributes, and the shapes of its weights."""
    plain_types = (bool, int, float, str, tuple, list) if with_numbers else (bool, str)

    def is_plain(value: object) -> bool:
        return value is None or type(value) in plain_types

    modules = []
    for name, module in vit.named_modules():
        own = {k: v for k, v in vars(module).items() if k != "training" and (is_plain(v) or callable(v))}
        plain = {k: v if is_plain(v) else getattr(v, "__name__", type(v).__name__) for k, v in own.items()}
        modules.append((name, type(module).__name__, str(sorted(plain.items()))))
    return *modules, *((name, with_numbers and tuple(tensor.shape)) for name, tensor in vit.state_dict().items())


def structure(vit: nn.Module) -> tuple:
    """What of a ViT decides the path through the code: its modules, weights and switches, without any number."""
    return signature(vit, with_numbers=False)


def gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of every parameter that the logits depend on."""
    model.zero_grad(set_to_none=True)
    logits = model(images)
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Some of the neurons of a ViT, in any order
# ---------------------------------------------------------------------------------------------------------------------

Neurons = Callable[[str, int | None], Tensor]  # axis of `models.axes`, layer → indices


def random_order(arch: models.ViTArch, seed: int) -> Neurons:
    """An order of the embedding neurons, and of heads and hidden neurons of each layer and of a pooling block."""
    generator = torch.Generator().manual_seed(seed)

    def order(count: int, size: int = 1) -> Tensor:
        """Of ``count`` neurons, which stay together in groups of ``size``."""
        groups = torch.randperm(count // size, generator=generator)
        return (groups[:, None] * size + torch.arange(size)).flatten()

    embedding = order(arch.width)
    heads, hidden = ([order(*n) for _ in range(arch.depth)] for n in ((arch.width, arch.head_dim), (arch.hidden,)))
    pool_heads, pool_hidden = order(arch.width, arch.pool_head_dim or 1), order(arch.pool_hidden)

    def along(axis: str, layer: int | None) -> Tensor:
        if axis in "QKVM":
            return (hidden if axis == "M" else heads)[layer]
        return embedding if axis in "EC" else pool_hidden if axis == "m" else pool_heads

    return along


def reordered(vit: dict[str, Tensor], neurons: Neurons) -> dict[str, Tensor]:
    """The state dict of a ViT of ``neurons`` of another one."""
    structure = structure_of({name: tuple(tensor.shape) for name, tensor in vit.items()})
    parts = {}
    for name, tensor in split(vit, structure).items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        for number, axis in enumerate(axes_of(name)):
            if axis != ".":
                tensor = tensor.index_select(number, neurons(axis, layer))
        parts[name] = tensor
    return fuse(parts, structure)
