"""The learngene file: save, load, read the published formats, make Des-Nets.

A learngene file is a safetensors file with the tensors of an Aux-Net and, in its header, what the tensors do not say.
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import lets, tleg
from .aux_net import AuxNet, WeightsOnMeta, vit_from_weights
from .vit import AUX_DEPTH, InputError, ViTArch, parse_arch

METHODS = {"lets": "LeTs", "tleg": "TLEG"}


@dataclass
class Learngene:
    """The trained weights that Des-Nets are initialised from.

    Attributes:
        method: ``lets`` or ``tleg``.
        tensors: the parameters of the Aux-Net, as listed at the top of ``lets.py`` and ``tleg.py``.
        config: the architectures; for LeTs also how many Aux layers share a coefficient row.
        options: what stage 1 recorded of its own options, plain data.
    """

    method: str
    tensors: dict[str, Tensor]
    config: dict
    options: dict = field(default_factory=dict)

    @classmethod
    def of(cls, aux_net: AuxNet, options: dict | None = None) -> "Learngene":
        """The learngene inside an Aux-Net. The tensors are the Aux-Net's own, not copies."""
        return cls(aux_net.method, aux_net.state_dict(), aux_net.config, options or {})

    @property
    def header(self) -> dict:
        """What a learngene file says besides the tensors."""
        return {"method": self.method, **self.config, "options": self.options}

    @property
    def arch(self) -> ViTArch:
        """The sizes of the Aux-Net."""
        return ViTArch(**self.config["tgt_arch"])

    @property
    def num_classes(self) -> int:
        return self.config["num_classes"]

    def __str__(self) -> str:
        src = f"{ViTArch(**self.config['src_arch'])} → " if "src_arch" in self.config else ""
        params = sum(t.numel() for t in self.tensors.values())
        return f"{METHODS[self.method]} learngene, {src}{self.arch}, {self.num_classes} classes, {params:,} parameters"

    def aux_net(self, **kwargs) -> AuxNet:
        """The Aux-Net that the learngene was trained in, in evaluation mode.

        Args:
            kwargs: passed on to timm's ``VisionTransformer``.
        """
        aux_net = self.empty_aux_net(**kwargs)
        aux_net.load_state_dict({name: t.clone() for name, t in self.tensors.items()}, assign=True)
        return aux_net.eval()

    def empty_aux_net(self, **kwargs) -> AuxNet:
        """The Aux-Net with its parameters on the meta device: names and shapes only."""
        kwargs = {key: self.config[key] for key in ("num_classes", "in_chans")} | kwargs
        with WeightsOnMeta():
            if self.method == "tleg":
                return tleg.TLEG(self.arch, **kwargs)
            return lets.LeTs(ViTArch(**self.config["src_arch"]), self.arch, self.config["layers_per_row"], **kwargs)

    @torch.no_grad()
    def descend(
        self,
        arch: str | ViTArch,
        mapping_layer: Sequence[int] | None = None,
        mapping_layer_coeff: Sequence[int] | None = None,
        width_select: str = "continuous",
        num_classes: int | None = None,
        **vit_kwargs,
    ) -> VisionTransformer:
        """A Des-Net: a plain timm ViT of ``arch`` sizes, initialised from this learngene.

        Args:
            arch: a name of the grammar, or the sizes.
            mapping_layer: LeTs: for each layer, the Aux layer whose learngene pair is used (default: spread evenly).
            mapping_layer_coeff: LeTs: for each layer, the Aux layer whose coefficient row is used.
            width_select: LeTs: which rows of the width matrices to keep, one of `WIDTH_SELECTIONS`.
            num_classes: ``None`` keeps the learngene's head, another number than its own gives a fresh one.
            vit_kwargs: passed on to timm's ``VisionTransformer``; ``img_size`` replaces that of ``arch``.

        Raises:
            InputError: the learngene cannot make this Des-Net; the message says what it can.
        """
        arch = parse_arch(arch) if isinstance(arch, str) else arch
        arch = ViTArch(**{**asdict(arch), "img_size": vit_kwargs.pop("img_size", arch.img_size)})
        if arch.patch_size != self.arch.patch_size:
            raise InputError(
                f"the Des-Net has patches of {arch.patch_size} pixels; those of this learngene have "
                f"{self.arch.patch_size}"
            )
        if self.method == "lets":
            weights = lets.descend(self.tensors, self.config, arch, mapping_layer, mapping_layer_coeff, width_select)
        else:
            for name, given in (
                ("mapping_layer", mapping_layer is not None),
                ("mapping_layer_coeff", mapping_layer_coeff is not None),
                ("width_select", width_select != "continuous"),
            ):
                if given:
                    raise InputError(f"{name} belongs to LeTs; this is a TLEG learngene, which has no such choice")
            weights = tleg.descend(self.tensors, self.config, arch)
        if num_classes not in (None, self.num_classes):
            head = weights["head.weight"]
            weights["head.weight"] = nn.init.trunc_normal_(head.new_empty(num_classes, arch.width), std=0.02)
            weights["head.bias"] = head.new_zeros(num_classes)
        if arch.img_size != self.arch.img_size:
            grid = arch.img_size // arch.patch_size
            weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [grid, grid], num_prefix_tokens=0)
        size = dict(num_classes=len(weights["head.bias"]), in_chans=self.config["in_chans"])
        return vit_from_weights(arch, weights, **size, **vit_kwargs)

    def save(self, path: str | os.PathLike) -> None:
        """Write the learngene file, whole or not at all."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        with written_whole(path) as unfinished:
            save_file(tensors, unfinished, metadata={"learngene": json.dumps(self.header)})


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def load_learngene(path_or_url: str | os.PathLike, head_dim: int = 64, use_ema: bool = False) -> Learngene:
    """Read this project's learngene file, a checkpoint of this program, or a published LeTs or TLEG checkpoint.

    Args:
        path_or_url: a file, or an ``http(s)://`` address, which is downloaded once into torch's hub folder.
        head_dim: neurons of an attention head, which the published files do not say.
        use_ema: take ``model_ema`` of a checkpoint instead of ``model``.

    Raises:
        InputError: the file is missing, damaged, no learngene, or holds anything but tensors and plain data.
    """
    path = fetch(path_or_url)
    content = read_checkpoint(path)
    key = "model_ema" if use_ema else "model"
    tensors = content.get(key)
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InputError(f"{path} holds no weights under {key!r}")
    try:
        if "learngene" in content:
            gene = _own(tensors, content["learngene"])
        elif "patch_embed.trans_width_emb.trans_weight" in tensors:
            gene = _published_lets(tensors, head_dim, content.get("args"))
        elif "blocks.block.norm1.instances.0.weight_ilayer" in tensors:
            gene = _published_tleg(tensors, head_dim)
        else:
            raise InputError("neither one of this project nor a published LeTs or TLEG checkpoint")
        _check(gene)
    except InputError as error:
        raise InputError(f"{path} is not a learngene that can be used: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise InputError(f"{path} is an incomplete learngene: {type(error).__name__} {error}") from error
    return gene


def fetch(path_or_url: str | os.PathLike) -> Path:
    """A local path for a path or an ``http(s)://`` address; a download is kept in torch's hub folder.

    Raises:
        InputError: there is no such file, or the address gave none.
    """
    address = str(path_or_url)
    if urlsplit(address).scheme not in ("http", "https"):
        path = Path(address)
        if not path.is_file():
            raise InputError(f"{path} is {'a directory' if path.is_dir() else 'missing'}: expected a file of weights")
        return path
    name = hashlib.sha256(address.encode()).hexdigest()[:16] + "-" + Path(urlsplit(address).path).name
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path))  # writes beside, then renames
        except OSError as error:
            raise InputError(f"{address} could not be downloaded: {error}") from error
    return path


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a checkpoint, without running code from it: the weights are under ``model``.

    A bare state dict and a safetensors file become ``{"model": …}``; the header of a learngene file is added as
    ``learngene``. The published checkpoints hold an ``argparse.Namespace``, which is allowed by name.

    Raises:
        InputError: the file is missing or damaged, or holds objects other than tensors and plain data.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise InputError(f"{path} is empty: expected a file of weights")
    try:
        if start[8:9] == b"{":  # safetensors: the header's length in eight bytes, then the header
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get("learngene")
                content = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
            return content if header is None else {**content, "learngene": json.loads(header)}
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's protocol; what is wrong is said below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way the parsers know
        foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if foreign:
            raise InputError(f"{path} is refused: besides tensors and plain data it holds {foreign[1]}") from error
        raise InputError(f"{path} is damaged or no file of weights: {type(error).__name__}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}: expected a checkpoint or a state dict")
    content = dict(content) if "model" in content else {"model": dict(content)}
    weights = content["model"]
    weights = weights.get("state_dict", weights) if isinstance(weights, Mapping) else {}
    if not any(isinstance(t, Tensor) for t in weights.values()):
        raise InputError(f"{path} holds no weights: expected a checkpoint or a state dict")
    return content


def _own(tensors: Mapping[str, Tensor], header: Mapping) -> Learngene:
    config = {key: value for key, value in header.items() if key not in ("method", "options")}
    if header["method"] not in METHODS:
        raise InputError(f"unknown method {header['method']!r}")
    return Learngene(header["method"], dict(tensors), config, header.get("options", {}))


def _check(gene: Learngene) -> None:
    """Raises InputError unless the tensors have the names and shapes of the method at these sizes, and are finite."""
    expected = {name: tuple(t.shape) for name, t in gene.empty_aux_net().state_dict().items()}
    found = {name: tuple(t.shape) for name, t in gene.tensors.items()}
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise InputError(f"{name} has shape {found.get(name)}, expected {expected.get(name)}")
    for name, tensor in gene.tensors.items():
        if not tensor.sum().isfinite():  # the sum of an inf or nan is one
            raise InputError(f"{name} holds values that are not finite")


# ---------------------------------------------------------------------------------------------------------------------
# The published formats
# ---------------------------------------------------------------------------------------------------------------------


def lets_layout(depth: int, rows: Sequence[int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Published LeTs key → name of the tensor here, and the place in its stacked axes."""
    layer = dict(q="attn_q", k="attn_k", v="attn_v", proj="attn_proj", fc1="mlp_fc1", fc2="mlp_fc2")
    layout = {"pos_embed": ("pos_embed", ())}
    for kind in ("weight", "bias"):
        layout[f"__sm_patch_embed_proj_{kind}"] = (f"patch_embed_{kind}", ())
        layout[f"__sm_fc_norm_{kind}"] = (f"fc_norm_{kind}", ())
        layout[f"__sm_head_{kind}"] = (f"head_{kind}", ())
        for m, name in enumerate(lets.MODULES):
            for j in range(depth):
                layout[f"__sm_{j}_{layer.get(name, name)}_{kind}"] = (f"{name}_{kind}", (j,))
            for k, r in enumerate(rows):
                module = layer.get(name, name).replace("_", ".")
                key = f"blocks.{r}.{module}.trans_depth_weight.trans_{kind}"
                layout[key] = ("g" if kind == "weight" else "h", (m, k))
    layout["patch_embed.trans_width_emb.trans_weight"] = ("E", ())
    layout["trans_width_cls.trans_weight"] = ("C", ())
    for name, matrix in (("Q", "q"), ("K", "k"), ("V", "v"), ("M", "ffn")):
        for j in range(depth):
            layout[f"blocks.{j}.trans_width_{matrix}.trans_weight"] = (name, (j,))
    return layout


def tleg_layout() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Published TLEG key → name of the tensor here."""
    layout = {"pos_embed": ("pos_embed", ())}
    for kind in ("weight", "bias"):
        layout[f"patch_embed.proj.{kind}"] = (f"patch_embed_{kind}", ())
        layout[f"norm.{kind}"] = (f"norm_{kind}", ())
        layout[f"head.{kind}"] = (f"head_{kind}", ())
        for module, timm_name in zip(tleg.MODULES, tleg.TIMM_NAMES, strict=True):
            for half, published in (("A", "ilayer"), ("B", "base")):
                key = f"blocks.block.{timm_name}.instances.0.{kind}_{published}"
                layout[key] = (f"{half}_{module}_{kind}", ())
    return layout


def to_published(gene: Learngene) -> dict[str, Tensor]:
    """The state dict that the published implementation of the method reads."""
    return {key: gene.tensors[name][place].clone() for key, (name, place) in _layout(gene).items()}


def _layout(gene: Learngene) -> dict[str, tuple[str, tuple[int, ...]]]:
    if gene.method == "tleg":
        return tleg_layout()
    rows = range(0, gene.arch.depth, gene.config["layers_per_row"])
    return lets_layout(gene.config["src_arch"]["depth"], rows)


def _from_published(tensors: Mapping[str, Tensor], method: str, config: dict) -> Learngene:
    gene = Learngene(method, {}, config)
    layout = _layout(gene)
    if unknown := tensors.keys() - layout.keys():
        raise InputError(f"{len(unknown)} keys do not belong to the published format, such as {min(unknown)}")
    own = gene.empty_aux_net().state_dict()
    gene.tensors = {name: torch.empty(t.shape) for name, t in own.items()}
    for key, (name, place) in layout.items():
        target = gene.tensors[name][place]
        if target.shape != tensors[key].shape:
            raise InputError(f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(target.shape)}")
        target.copy_(tensors[key])
    return gene


def _published_arch(width: int, depth: int, head_dim: int, tensors: Mapping[str, Tensor], patch_key: str) -> ViTArch:
    patch_size = tensors[patch_key].shape[-1]
    if width % head_dim:
        raise InputError(f"its width {width} is no multiple of {head_dim}, the size of a head (head_dim)")
    return ViTArch(width, depth, width // head_dim, patch_size, patch_size * math.isqrt(tensors["pos_embed"].shape[1]))


def _published_lets(tensors: Mapping[str, Tensor], head_dim: int, args: object) -> Learngene:
    new, s = tensors["patch_embed.trans_width_emb.trans_weight"].shape
    depth = sum(re.fullmatch(r"__sm_\d+_norm1_weight", key) is not None for key in tensors)
    found = (re.fullmatch(r"blocks\.(\d+)\.norm1\.trans_depth_weight\.trans_weight", key) for key in tensors)
    rows = sorted(int(match[1]) for match in found if match)
    layers_per_row = rows[1] - rows[0] if len(rows) > 1 else depth // 2
    # The last row may be shared by fewer layers; only the recorded options can say so.
    aux_depth = rows[-1] + layers_per_row
    with suppress(InputError):
        recorded = parse_arch(getattr(args, "tgt_arch", None) or "").depth
        aux_depth = recorded if rows[-1] < recorded <= aux_depth else aux_depth
    patch_key = "__sm_patch_embed_proj_weight"
    src = _published_arch(s, depth, head_dim, tensors, patch_key)
    tgt = _published_arch(s + new, aux_depth, head_dim, tensors, patch_key)
    config = {"src_arch": asdict(src), "tgt_arch": asdict(tgt), "layers_per_row": layers_per_row}
    return _from_published(tensors, "lets", {**config, **_head_and_channels(tensors, "__sm_head_weight", patch_key)})


def _published_tleg(tensors: Mapping[str, Tensor], head_dim: int) -> Learngene:
    patch_key = "patch_embed.proj.weight"
    arch = _published_arch(tensors["pos_embed"].shape[2], AUX_DEPTH, head_dim, tensors, patch_key)
    config = {"tgt_arch": asdict(arch), **_head_and_channels(tensors, "head.weight", patch_key)}
    return _from_published(tensors, "tleg", config)


def _head_and_channels(tensors: Mapping[str, Tensor], head_key: str, patch_key: str) -> dict:
    return {"num_classes": tensors[head_key].shape[0], "in_chans": tensors[patch_key].shape[1]}


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[str]:
    """A name to write to, beside ``path``; it becomes ``path`` when all is written, and is removed if that fails."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield str(unfinished)
        umask = os.umask(0)  # there is no other way to read it
        os.umask(umask)
        unfinished.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
