"""The ViTs that all methods expand, by their sizes."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from functools import cached_property, lru_cache, partial

from common.errors import InputError, shown
from models.axes import Structure, any_layer, structure_of
from models.kinds import Size, hidden_neurons, kind_args, plain_size, ratio_for, sizes_of
from models.meta import WeightsOnMeta

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

# no ViT comes near; they keep a damaged or hostile file from filling the memory with layers or positions
MAX_DEPTH = 256
MAX_POSITIONS = 2**27  # neurons of all patches of an image
MAX_MLP_RATIO = 64
FORWARD_AND_BACKWARD = 3  # times the MACs of a forward pass: backward computes two products for each of its own
PLAIN_VIT = "vit_base_patch16_224"  # the entry of timm's registry that makes a plain ViT, given its sizes


@dataclass(frozen=True)
class ViTArch:
    """The sizes of a ViT.

    Attributes:
        width: in neurons.
        patch_size, img_size: in pixels; height and width, where they differ.
        kind: the architecture of timm whose sizes these replace (`models.kinds`); None for the plain ViT.
        mlp_ratio: hidden neurons of a layer as a multiple of the width, as in `hidden_neurons`; None, and so the ratio
            that makes as many, for those of the architecture, 4 of the plain ViT.
    """

    width: int
    depth: int
    num_heads: int
    patch_size: Size
    img_size: Size
    kind: str | None = None
    mlp_ratio: float | None = None

    def __post_init__(self):
        for name in ("patch_size", "img_size"):
            object.__setattr__(self, name, plain_size(getattr(self, name)))
        if min(self.width, self.depth, self.num_heads, *pair(self.patch_size), *pair(self.img_size)) < 1:
            raise InputError(f"every size of an architecture is at least 1, not as in {self}")
        if self.depth > MAX_DEPTH:
            raise InputError(f"{self.depth} layers are too many: at most {MAX_DEPTH}")
        if self.width % self.num_heads:
            raise InputError(f"width {self.width} cannot be divided among {self.num_heads} heads")
        if min(self.grid) < 1:
            raise InputError(f"an image of {self.img_size} pixels has no patch of {self.patch_size}")
        if self.num_patches * self.width > MAX_POSITIONS:
            raise InputError(f"{self.num_patches:,} patches of width {self.width:,} are too many")
        if self.mlp_ratio is not None:
            object.__setattr__(self, "mlp_ratio", self._checked_ratio())

    def _checked_ratio(self) -> float | None:
        if not 0 < self.mlp_ratio <= MAX_MLP_RATIO:  # nor one that is not a number
            found = shown(self.mlp_ratio)
            raise InputError(f"mlp_ratio is {found}, expected a number above 0 and up to {MAX_MLP_RATIO}")
        hidden = hidden_neurons(self.mlp_ratio, self.width, self.kind)
        if hidden < 1:
            raise InputError(f"mlp_ratio {self.mlp_ratio} of width {self.width} is less than one hidden neuron")
        return None if hidden == replace(self, mlp_ratio=None).hidden else float(self.mlp_ratio)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (patch_height, patch_width) = pair(self.img_size), pair(self.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    @property
    def hidden(self) -> int:
        """Hidden neurons of a layer."""
        if self.mlp_ratio is not None:
            return hidden_neurons(self.mlp_ratio, self.width, self.kind)
        return 4 * self.width if self.kind is None else described(self).shapes["blocks.*.mlp.fc2.weight"][1]

    @property
    def label(self) -> str:
        """Layers, heads and, where it is not that of the architecture, the MLP ratio: ``L6-H3``, ``L6-H3-M2.5``."""
        return f"L{self.depth}-H{self.num_heads}" + (f"-M{shown_ratio(self.mlp_ratio)}" if self.mlp_ratio else "")

    @property
    def pool_hidden(self) -> int:
        """Hidden neurons of a pooling block; 0 without one."""
        if self.kind is None:
            return 0
        return described(self).shapes.get("attn_pool.mlp.fc2.weight", (0, 0))[1]

    def neurons(self, axis: str) -> int:
        """How many neurons an axis of `models.axes` counts."""
        return {"M": self.hidden, "m": self.pool_hidden}[axis] if axis in "Mm" else self.width

    @property
    def pool_head_dim(self) -> int:
        """Neurons of a head of a pooling block; 0 without one."""
        return sizes_of(self.kind)["pool_head_dim"] if self.kind is not None else 0

    def as_dict(self) -> dict:
        """The fields as plain data, for headers of files; without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def num_params(self, num_classes: int, in_chans: int = 3) -> int:
        """The parameters of `create_vit`'s model of these sizes, counted from shapes."""
        shapes = described(self, num_classes, in_chans).shapes
        return sum(math.prod(shape) * self.layers_with(name) for name, shape in shapes.items())

    def macs(self, num_classes: int, in_chans: int = 3) -> int:
        """Multiply-accumulate operations of one image's forward pass: its products of matrices, counted from shapes."""
        vit = described(self, num_classes, in_chans)
        attention = 2 * (self.depth * vit.tokens**2 + vit.pooled_tokens) * self.width  # q·kᵀ, and the mean of v
        return attention + sum(
            math.prod(shape) * vit.rows_through(name) * self.layers_with(name) for name, shape in vit.shapes.items()
        )

    def layers_with(self, name: str) -> int:
        """How many times the ViT has a parameter of `described`."""
        return self.depth if name.startswith("blocks.*.") else 1

    def __str__(self) -> str:
        kind = f"{self.kind}, " if self.kind else ""
        return (
            f"{kind}{self.label} (width {self.width}), "
            f"patch {shown_size(self.patch_size)}, image {shown_size(self.img_size)}"
        )


def shown_ratio(ratio: float) -> str:
    """The shortest decimal number that is read as ``ratio``: ``2``, ``2.5``, ``0.00001``."""
    return f"{Decimal(repr(ratio)).normalize():f}"


def check_kind(arch: ViTArch, learngene: ViTArch) -> None:
    """Raises InputError unless a Des-Net of ``arch`` is of the kind of the learngene."""
    if arch.kind != learngene.kind:
        des, gene = (a.kind or "plain deit_…_L{depth}" for a in (arch, learngene))
        raise InputError(f"the Des-Net is a ViT of the kind {des}; this learngene makes ViTs of the kind {gene}")


def check_hidden(arch: ViTArch, largest: ViTArch) -> None:
    """Raises InputError if a Des-Net of ``arch`` has more hidden neurons than the largest that a learngene makes."""
    if arch.hidden > largest.hidden:
        raise InputError(
            f"the Des-Net has {arch.hidden} hidden neurons in a layer; this learngene makes Des-Nets of up to "
            f"{largest.hidden} (MLP ratio {largest.hidden / arch.width:g} of width {arch.width})"
        )


def pair(size: Size) -> tuple[int, int]:
    """Height and width."""
    return size if isinstance(size, tuple) else (size, size)


def shown_size(size: Size) -> str:
    return "×".join(map(str, size)) if isinstance(size, tuple) else str(size)


@dataclass(frozen=True)
class Description:
    """What the sizes of a ViT do not say.

    Attributes:
        shapes: of the parameters, under timm's names; those of a layer once, with ``*`` for its number.
        patches: of an image.
        tokens: of an image in the blocks, the class token and others among them.
        pooled_tokens: those that a pooling block reads; 0 without one.
    """

    shapes: Mapping[str, tuple[int, ...]]
    patches: int
    tokens: int
    pooled_tokens: int

    @cached_property
    def structure(self) -> Structure:
        """How the parameters are made of those of `models.axes.AXES`."""
        return structure_of(self.shapes)

    def rows_through(self, name: str) -> int:
        """How many vectors of an image a parameter is multiplied with, as a matrix."""
        if not name.endswith(".weight") or len(self.shapes[name]) < 2:
            return 0
        if name.startswith("blocks.*."):
            return self.tokens
        if name.startswith("patch_embed."):
            return self.patches
        return self.pooled_tokens if name == "attn_pool.kv.weight" else 1


def described(arch: ViTArch, num_classes: int = 0, in_chans: int = 3) -> Description:
    """Shapes and tokens of `create_vit`'s model."""
    return _described(replace(arch, depth=1), num_classes, in_chans)


@lru_cache(1024)
def _described(arch: ViTArch, num_classes: int, in_chans: int) -> Description:
    with WeightsOnMeta():
        vit = create_vit(arch, num_classes=num_classes, in_chans=in_chans)
    pooled, tokens = 0, arch.num_patches + vit.num_prefix_tokens
    if getattr(vit, "attn_pool", None) is not None:
        pooled = tokens if getattr(vit, "pool_include_prefix", True) else arch.num_patches
    shapes = {any_layer(name): tuple(tensor.shape) for name, tensor in vit.state_dict().items()}
    return Description(shapes, arch.num_patches, tokens, pooled)


def create_vit(arch: ViTArch, **kwargs) -> VisionTransformer | Eva:
    """A timm ViT of the kind and sizes of ``arch``.

    The plain kind has no class token: patches → blocks → mean over patches → ``fc_norm`` → head.

    Args:
        kwargs: passed on to timm's class, where ``num_classes``, ``in_chans``, ``drop_path_rate``,
            ``img_size`` and ``patch_size`` are the usual ones. ``drop_rate`` has the meaning of the published programs
            (`dropout_rates`).
    """
    kwargs = dropout_rates(kwargs.pop("drop_rate", 0.0)) | kwargs
    if arch.kind is not None:
        return timm.create_model(arch.kind, **timm_kwargs(arch) | kwargs)
    sizes = timm_kwargs(arch) | dict(norm_layer=partial(nn.LayerNorm, eps=1e-6)) | kwargs
    pretrained_cfg = dict(
        input_size=(sizes.get("in_chans", 3), *pair(sizes["img_size"])),
        num_classes=1000,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        interpolation="bicubic",
        first_conv="patch_embed.proj",
        classifier="head",
    )
    return build_model_with_cfg(
        VisionTransformer,
        PLAIN_VIT,
        pretrained=False,
        pretrained_cfg=pretrained_cfg,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **sizes,
    )


def dropout_rates(drop_rate: float) -> dict[str, float]:
    """``drop_rate`` of a ViT in the published programs, in the words of timm ≥ 0.9, where it is that of the head alone.

    It applies to the position embedding, the output of the attention's projection, and both layers of the MLP.
    """
    return dict(pos_drop_rate=drop_rate, proj_drop_rate=drop_rate)


def timm_kwargs(arch: ViTArch) -> dict:
    """What timm's entry for the kind of ``arch`` (`PLAIN_VIT` for the plain kind) needs to make the same ViT.

    Plain data, so that it can stand in a ``config.json`` that timm alone reads. timm's own default for the
    epsilon of its layer norms is the 1e-6 that the plain kind needs.

    Raises:
        InputError: the kind cannot have these sizes.
    """
    if arch.kind is not None:
        return kind_args(**asdict(arch))
    sizes = dict(
        img_size=arch.img_size,
        patch_size=arch.patch_size,
        embed_dim=arch.width,
        depth=arch.depth,
        num_heads=arch.num_heads,
        class_token=False,
        global_pool="avg",
    )
    return sizes | ({} if arch.mlp_ratio is None else {"mlp_ratio": ratio_for(arch.hidden, arch.width)})
