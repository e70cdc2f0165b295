"""The model of a run: Aux-Net, Des-Net, or any other, from its options."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Protocol

import models
from common.errors import InputError, error_context, one_line
from models.formats.weights import load_weights
from models.registry import choices_of_methods, method_of_stage_1
from models.sizes import SizeSampler, sizes_on_offer
from models.vit import dropout_rates
from training.config import TIMM, Config, ModelConfig, option_name, tagged_name
from training.foreign_weights import load_foreign_weights, timm_weights
from utils import print_main

import torch
from timm.models import get_pretrained_cfg, is_model_in_modules
from torch import nn

VIT_MODULES = {"vision_transformer", "deit", "eva"}  # of timm, in which --drop has DeiT's meaning
CHANNELS = 3  # of every data set here; grey images are made so


# ---------------------------------------------------------------------------------------------------------------------
# The three kinds of model. Which of them a run has is decided in main.py.
# ---------------------------------------------------------------------------------------------------------------------


class Builder(Protocol):
    """Builds the model of a run."""

    def __call__(
        self, config: ModelConfig, input_size: int, num_classes: int, gene: models.Learngene | None
    ) -> nn.Module:
        """
        Args:
            input_size: height and width of the images, in pixels.
            num_classes: of the data.
            gene: the learngene of --load-gene, if that is given.

        Raises:
            InputError: the options give no model.
        """


def build_aux_net(
    config: ModelConfig, input_size: int, num_classes: int, gene: models.Learngene | None = None
) -> models.AuxNet:
    """Stage 1: the Aux-Net of a method."""
    method = method_of_stage_1(config)
    rates = dict(drop_rate=config.drop, drop_path_rate=config.drop_path)
    with error_context(" ".join(f"{option_name(o)} {getattr(config, o)}" for o in method.arch_options)):
        sized(models.parse_arch(config.arch), input_size)
        aux_net = method.from_config(config, num_classes=num_classes, img_size=input_size, **rates)
    if config.src_path:
        taylor = [option_name(o) for o in ("order", "depth_order") if getattr(config, o) == "taylor"]
        with (
            error_context(f"{taylor[0]} taylor, unlike magnitude, needs the source's head") if taylor else nullcontext()
        ):
            source = source_of(config, input_size, num_classes, other_head=not taylor)
        aux_net.start_from(source.state_dict())
    if config.freeze_src:
        aux_net.freeze_learngene()
    if config.finetune:
        load_foreign_weights(aux_net, config.finetune, "--finetune", other_head=True)
    return aux_net


def source_of(config: ModelConfig, input_size: int, num_classes: int, other_head: bool = False) -> nn.Module:
    """The ViT of --src-arch with the weights of --src-path.

    Args:
        other_head: re-initialise a head for another number of classes, instead of raising an error.
    """
    source = create_sized(config.src_arch, num_classes, input_size)
    load_start(source, config, "src_path", input_size, other_head)
    return source


def load_start(model: nn.Module, config: ModelConfig, option: str, input_size: int, other_head: bool = True) -> None:
    """Load the weights of --src-path or --finetune, which may be timm's own (`TIMM`), into ``model``.

    Args:
        other_head: re-initialise a head for another number of classes, instead of raising an error.
    """
    source = getattr(config, option)
    if source != TIMM:
        return load_foreign_weights(model, source, option_name(option), other_head)
    name = tagged_name(config, option)
    size = {"img_size": input_size} if wants_size(name) else {}
    with error_context(f"{option_name(option)} {source}"):
        if not other_head and (found := get_pretrained_cfg(name).num_classes) != model.num_classes:
            raise InputError(f"timm's {name} has {found} classes, the data {model.num_classes}")
        weights = timm_weights(name, num_classes=model.num_classes, **size)
    load_weights(model, weights, f"{option_name(option)} {source} ({name})")


def build_des_net(config: ModelConfig, input_size: int, num_classes: int, gene: models.Learngene) -> nn.Module:
    """Stage 2: a plain ViT that is initialised from a learngene. Logs what is not taken from it as it is."""
    with error_context(config.des_option):
        arch = sized(models.parse_arch(config.des_name), input_size)
        des_net = gene.descend(
            arch,
            **descend_choices(config),
            skip_init=config.skip_init,
            num_classes=num_classes,
            in_chans=CHANNELS,
            drop_rate=config.drop,
            drop_path_rate=config.drop_path,
        )
    if gene.num_classes != num_classes:
        print_main(f"the learngene has {gene.num_classes} classes, the data {num_classes}: the head is re-initialised")
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


def build_plain_model(
    config: ModelConfig, input_size: int, num_classes: int, gene: models.Learngene | None = None
) -> nn.Module:
    """Any model of --model, from scratch or from --finetune. `training.initialise` follows with --init."""
    with error_context(f"--model {config.model}"):
        model = create_sized(
            config.model, num_classes, input_size, drop_rate=config.drop, drop_path_rate=config.drop_path
        )
    if config.finetune:
        load_start(model, config, "finetune", input_size)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Their parts
# ---------------------------------------------------------------------------------------------------------------------


def load_gene(config: ModelConfig) -> models.Learngene:
    """The learngene of --load-gene. A published one does not say the size of its heads: the Des-Net's is taken."""
    with error_context(config.des_option):
        sizes = () if config.des_name.startswith("@") else (models.parse_arch(config.des_name).head_dim,)
    with error_context(f"--load-gene {config.load_gene}"):
        gene = models.load_learngene(config.load_gene, *sizes, use_ema=config.gene_ema)
    print_main(f"{config.load_gene}: {gene}")
    return gene


def descend_choices(config: ModelConfig) -> dict[str, object]:
    """The options that say how a Des-Net is made from a learngene, of all methods."""
    return {name: getattr(config, name) for name in choices_of_methods() if hasattr(config, name)}


def build_supernet(config: Config, aux_net: models.AuxNet, num_classes: int) -> models.Supernet:
    """The wrapper that trains --descendants beside the Aux-Net, or alone.

    Raises:
        InputError: the learngene makes no Des-Nets of these sizes, or not so many.
    """
    model, features = config.model, config.teacher.distillation_type == "feature"
    if features:
        aux_net.add_feature_maps()
    with error_context(f"--descendants {model.descendants} of the sizes that --descendant-… give"):
        sampler = size_sampler(model, config.data.input_size, num_classes, config.schedule.epochs)
        return models.Supernet(aux_net, sampler, features)


def size_sampler(config: ModelConfig, input_size: int, num_classes: int, epochs: int) -> SizeSampler:
    """What draws the sizes of the --descendants of a step."""
    archs = method_of_stage_1(config).archs_from_config(config)
    smallest, aux = (replace(arch, img_size=input_size) for arch in archs)
    alone = config.descendant_weight == 1
    axes = config.descendant_depths, config.descendant_heads, config.descendant_mlp_ratios
    return SizeSampler(
        {arch: arch.macs(num_classes, CHANNELS) for arch in sizes_on_offer(smallest, aux, *axes, alone)},
        per_step=config.descendants,
        kind=config.descendant_sampling,
        alone=alone,
        warmup_epochs=config.descendant_warmup_epochs,
        coarse_to_fine=config.descendant_coarse_to_fine,
        epochs=epochs,
    )


def create_sized(name: str, num_classes: int, input_size: int, **kwargs) -> nn.Module:
    """`models.create_model` for images of ``input_size``, where the architecture wants to know it.

    Raises:
        InputError: the model does not take an option that differs from its default, or not this size of image.
    """
    kwargs = {key: value for key, value in kwargs.items() if value}
    if "drop_rate" in kwargs and is_model_in_modules(name, VIT_MODULES):
        kwargs |= dropout_rates(kwargs.pop("drop_rate"))
    if models.is_vit(name) or wants_size(name):
        kwargs["img_size"] = input_size
    try:
        model = models.create_model(name, num_classes=num_classes, **kwargs)
        if not models.follows_grammar(name):
            check_image(model, input_size)
        return model.train()
    except InputError:
        raise
    except TypeError as error:
        raise InputError(f"{name} does not take one of {', '.join(kwargs)} (--drop, --drop-path): {error}") from error
    except (AssertionError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be made for --input-size {input_size}: {one_line(error)}") from error


def check_image(model: nn.Module, input_size: int) -> None:
    """Some models of timm say only when they see an image that they cannot take its size."""
    with torch.no_grad():
        model.eval()(torch.zeros(1, CHANNELS, input_size, input_size))


def sized(arch: models.ViTArch, input_size: int) -> models.ViTArch:
    """``arch`` for images of ``input_size``.

    Raises:
        InputError: a ViT of its kind does not take them.
    """
    arch = replace(arch, img_size=input_size)
    if arch.kind is not None:
        try:
            with torch.random.fork_rng(devices=[]):  # the first weights of a run do not depend on this
                check_image(models.create_vit(replace(arch, depth=1), num_classes=0), input_size)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise InputError(f"--input-size {input_size} cannot be used: {one_line(error)}") from error
    return arch


def wants_size(name: str) -> bool:
    """Whether a timm model is built for one size of image."""
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as error:  # resnet18.no_such_tag
        raise InputError(f"unknown model {name!r}: {error}") from error
    return bool(config and config.fixed_input_size)
