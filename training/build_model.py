"""The model of a run, from its options."""

import argparse
from dataclasses import replace

import models
from common.errors import InputError, error_context, one_line
from datasets import DATA_SETS
from models.baselines import BASELINES, source_arch
from models.formats.foreign import without_training_parts
from models.formats.weights import found_in, load_weights
from models.vit import dropout_rates
from training.foreign_weights import fit_head, fit_images, load_foreign_weights, read_foreign_weights
from utils import print_main

import torch
from timm.models import get_pretrained_cfg, is_model_in_modules
from torch import nn

VIT_MODULES = {"vision_transformer", "deit"}  # of timm, in which --drop has DeiT's meaning
CHANNELS = 3  # of every data set here; grey images are made so


def input_size_of(args: argparse.Namespace, name: str) -> int:
    """``--input-size``, by default that of the architecture's name, else DeiT's 224 or the size of small images."""
    if args.input_size is not None:
        return args.input_size
    if models.follows_grammar(name):
        return models.parse_arch(name).img_size
    native = DATA_SETS[args.data_set][2]
    return 224 if native is None or native >= 32 else 32


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def build_model(args: argparse.Namespace, kind: str, num_classes: int, gene: models.Learngene | None) -> nn.Module:
    """The model of the run: an Aux-Net, a Des-Net of ``gene``, or any model of timm's."""
    size = dict(img_size=args.input_size, drop_rate=args.drop, drop_path_rate=args.drop_path)
    if gene is not None:
        return build_des_net(args, num_classes, gene, **size)
    if kind == "lets":
        with error_context(f"--src-arch {args.src_arch} --tgt-arch {args.tgt_arch}"):
            aux_net = models.create_aux_net(
                args.src_arch,
                args.tgt_arch,
                layers_per_row=args.layers_per_row,
                group_size=args.group_size,
                full_width=args.full_width,
                init_scheme=args.trans_init_scheme,
                init_noise=args.trans_init_noise,
                num_classes=num_classes,
                **size,
            )
        if args.descendants:
            train_descendants(aux_net, args)
        if args.src_path:
            small = create_sized(args.src_arch, num_classes, args.input_size)
            load_foreign_weights(small, args.src_path, "--src-path", other_head=True)
            aux_net.start_from(small.state_dict())
        if args.freeze_src:
            aux_net.freeze_learngene()
        return aux_net
    with error_context(f"--model {args.model}"):
        model = create_sized(
            args.model, num_classes, args.input_size, drop_rate=args.drop, drop_path_rate=args.drop_path
        )
    if args.finetune:
        load_foreign_weights(model, args.finetune, "--finetune", other_head=True)
    if args.init:
        initialise_from(model, args)
    return model


def train_descendants(aux_net: models.LeTs, args: argparse.Namespace) -> None:
    """Have Des-Nets trained beside the Aux-Net, or alone.

    Raises:
        InputError: the learngene makes no Des-Nets of these sizes, or no so many.
    """
    alone = args.descendant_weight == 1
    with error_context(f"--descendants {args.descendants}, of --descendant-depths and --descendant-heads"):
        aux_net.train_descendants(descendants_of(args), args.descendants, alone)


def descendants_of(args: argparse.Namespace) -> list[models.ViTArch]:
    """The sizes that stage 1 draws descendants from; the Aux-Net's own if it is not trained anyway."""
    src, tgt = (replace(models.parse_arch(name), img_size=args.input_size) for name in (args.src_arch, args.tgt_arch))
    return [
        replace(tgt, depth=depth, num_heads=heads, width=heads * tgt.head_dim)
        for depth in sorted(set(args.descendant_depths or range(src.depth, tgt.depth + 1)))
        for heads in sorted(set(args.descendant_heads or range(src.num_heads, tgt.num_heads + 1)))
        if (depth, heads) != (tgt.depth, tgt.num_heads) or args.descendant_weight == 1
    ]


def initialise_from(model: nn.Module, args: argparse.Namespace) -> None:
    """Give ``model`` weights from a trained ViT of other sizes (`models.BASELINES`)."""
    arch = replace(models.parse_arch(args.model), img_size=args.input_size)
    with error_context(f"--init-path {args.init_path}"):
        weights = read_foreign_weights(args.init_path, model)
        weights, remarks = without_training_parts(weights, model.state_dict().keys())
        head = {name: weights[name] for name in ("head.weight", "head.bias") if name in weights}
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
        source = source_arch(weights, arch.head_dim)
        for remark in (f"{source}, for {args.init.replace('_', ' ')}", *remarks):
            print_main(f"{args.init_path}: {remark}")
        try:
            weights = BASELINES[args.init](weights | head, source, arch)
        except KeyError as error:
            raise InputError(f"it has no {error.args[0]}: found {found_in(weights)}") from error
        weights, remarks = fit_head(fit_images(weights, model, args.init_path), model, other_head=True)
    load_weights(model, weights, f"--init-path {args.init_path}")
    for remark in remarks:
        print_main(f"{args.init_path}: {remark}")


def load_gene(args: argparse.Namespace) -> models.Learngene:
    """The learngene of stage 2. A published one does not say the size of its heads: the Des-Net's is taken."""
    with error_context(des_option(args)):
        head_dim = models.parse_arch(args.des_arch or args.model).head_dim
    with error_context(f"--load-gene {args.load_gene}"):
        gene = models.load_learngene(args.load_gene, head_dim=head_dim, use_ema=args.gene_ema)
    print_main(f"{args.load_gene}: {gene}")
    return gene


def des_option(args: argparse.Namespace) -> str:
    return f"--des-arch {args.des_arch}" if args.des_arch else f"--model {args.model}"


def build_des_net(
    args: argparse.Namespace, num_classes: int, gene: models.Learngene, img_size: int, **rates
) -> nn.Module:
    """The Des-Net, and a line for each part of it that does not come from the learngene as it is."""
    with error_context(des_option(args)):
        arch = replace(models.parse_arch(args.des_arch or args.model), img_size=img_size)
        choices = args.mapping_layer, args.mapping_layer_coeff, args.width_select, args.depth_select, args.skip_init
        des_net = gene.descend(arch, *choices, num_classes=num_classes, in_chans=CHANNELS, **rates)
    if gene.num_classes != num_classes:
        print_main(f"the learngene has {gene.num_classes} classes, the data {num_classes}: the head is fresh")
    if gene.arch.patch_size != arch.patch_size:
        print_main(
            f"patches of {gene.arch.patch_size} pixels in the learngene, {arch.patch_size} here: they are resampled"
        )
    if gene.arch.num_patches != arch.num_patches:
        print_main(
            f"{gene.arch.num_patches} patches in the learngene, {arch.num_patches} here: their positions are resampled"
        )
    if gene.config["in_chans"] != CHANNELS:
        print_main(
            f"{gene.config['in_chans']} channel(s) in the learngene, {CHANNELS} here: the patch embedding is adapted"
        )
    return des_net


def create_sized(name: str, num_classes: int, input_size: int, **kwargs) -> nn.Module:
    """`models.create_model` for images of ``input_size``, where the architecture wants to know it.

    Raises:
        InputError: the model does not take an option that differs from its default, or not this size of image.
    """
    kwargs = {key: value for key, value in kwargs.items() if value}
    if "drop_rate" in kwargs and not models.follows_grammar(name) and is_model_in_modules(name, VIT_MODULES):
        kwargs |= dropout_rates(kwargs.pop("drop_rate"))
    if models.follows_grammar(name) or wants_size(name):
        kwargs["img_size"] = input_size
    try:
        model = models.create_model(name, num_classes=num_classes, **kwargs)
        if not models.follows_grammar(name):  # some say only when they see an image that they cannot take its size
            with torch.no_grad():
                model.eval()(torch.zeros(1, CHANNELS, input_size, input_size))
        return model.train()
    except InputError:
        raise
    except TypeError as error:
        raise InputError(f"{name} does not take one of {', '.join(kwargs)} (--drop, --drop-path): {error}") from error
    except (AssertionError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be made for --input-size {input_size}: {one_line(error)}") from error


def wants_size(name: str) -> bool:
    """Whether a timm model is built for one size of image."""
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as error:  # resnet18.no_such_tag
        raise InputError(f"unknown model {name!r}: {error}") from error
    return bool(config and config.fixed_input_size)
