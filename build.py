"""What a run is made of, from its options: device, data, model, teacher, optimiser."""

import argparse
import inspect
import os
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import cache
import models
import utils
from batch_augment import BatchAugment
from cache import AugmentedBatches, CachedBatches
from configuration import about
from datasets import (
    DATA_SETS,
    SKIPPED_AT_ONCE,
    Batches,
    ReadDataset,
    SeededDataset,
    build_dataset,
    build_transform,
    collate,
    divide,
)
from folders import SPLITS, summary
from images import faster
from launchers import is_plain_task
from losses import BinaryCrossEntropy, DistillationLoss, FamilyLoss
from models import InputError
from optimizers import check_optimizer, compiles, create_optimizer, images_per_step, scaled_lr
from samplers import ExactSampler, TrainSampler
from shards import ShardCache
from teacher import Teacher, TeacherCache, claim, identity_of
from utils import say

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import get_pretrained_cfg, is_model_in_modules
from timm.optim import get_optimizer_info
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

VIT_MODULES = {"vision_transformer", "deit"}  # of timm, in which --drop has DeiT's meaning
CHANNELS = 3  # of every data set here; grey images are made so

# ---------------------------------------------------------------------------------------------------------------------
# What the options mean
# ---------------------------------------------------------------------------------------------------------------------


def device_of(args: argparse.Namespace) -> torch.device:
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", args.device)
    if match is None:
        raise InputError(f"--device {args.device} is unknown: expected auto, cuda, cuda:N or cpu")
    number, available = int(match[1] or utils.local_rank()), torch.cuda.device_count()
    if match[1] is None and available == 1 and is_plain_task():
        number = 0  # srun --gpus-per-task shows each task its own device alone
    if number >= available:
        raise InputError(f"--device {args.device}: CUDA device {number} is needed, there are {available} here")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def amp_dtype_of(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """The precision of the forward pass."""
    if args.amp_dtype != "auto":
        return getattr(torch, args.amp_dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16


def autocast_of(args: argparse.Namespace, device: torch.device) -> tuple[AbstractContextManager, bool]:
    """The precision of the forward pass as a context, and whether it needs its gradients scaled (float16)."""
    dtype = amp_dtype_of(args, device)
    if dtype == torch.float32:
        return nullcontext(), False
    return torch.autocast(device.type, dtype=dtype), dtype == torch.float16


def check_means(args: argparse.Namespace, device: torch.device) -> None:
    """Find out whether what trains a model works here, before anything long.

    Raises:
        InputError: --opt or --compile cannot be used.
    """
    optimizer = check_optimizer(args, device)
    if args.compile and args.epochs > 0:
        check_compiler("--compile", device)
    elif compiles(optimizer):
        check_compiler(f"--opt {args.opt}, which compiles its steps,", device)


def check_compiler(what: str, device: torch.device) -> None:
    """Compile a trivial function: what torch needs for that depends on the device, its version and the machine.

    Raises:
        InputError: ``what`` cannot be used, as it cannot be compiled.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of torch, of a compiler, of the system
        reason = models.in_a_line(error).partition(" Set TORCHDYNAMO_VERBOSE")[0]  # hints for torch's developers
        raise InputError(
            f"{what} cannot be used: torch.compile fails on {device} ({reason}); it needs a C++ compiler such as g++, "
            "which CXX may name, and Python's headers"
        ) from error


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
        with about(f"--src-arch {args.src_arch} --tgt-arch {args.tgt_arch}"):
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
    with about(f"--model {args.model}"):
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
    with about(f"--descendants {args.descendants}, of --descendant-depths and --descendant-heads"):
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
    """Give ``model`` weights from a trained ViT of other sizes (`models.RIVALS`)."""
    arch = replace(models.parse_arch(args.model), img_size=args.input_size)
    with about(f"--init-path {args.init_path}"):
        weights = read_foreign_weights(args.init_path, model)
        weights, remarks = models.without_training_parts(weights, model.state_dict().keys())
        head = {name: weights[name] for name in ("head.weight", "head.bias") if name in weights}
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
        source = models.source_arch(weights, arch.head_dim)
        for remark in (f"{source}, for {args.init.replace('_', ' ')}", *remarks):
            say(f"{args.init_path}: {remark}")
        try:
            weights = models.RIVALS[args.init](weights | head, source, arch)
        except KeyError as error:
            raise InputError(f"it has no {error.args[0]}: found {models.found_in(weights)}") from error
        weights, remarks = fit_head(fit_images(weights, model, args.init_path), model, other_head=True)
    utils.load_weights(model, weights, f"--init-path {args.init_path}")
    for remark in remarks:
        say(f"{args.init_path}: {remark}")


def load_gene(args: argparse.Namespace) -> models.Learngene:
    """The learngene of stage 2. A published one does not say the size of its heads: the Des-Net's is taken."""
    with about(des_option(args)):
        head_dim = models.parse_arch(args.des_arch or args.model).head_dim
    with about(f"--load-gene {args.load_gene}"):
        gene = models.load_learngene(args.load_gene, head_dim=head_dim, use_ema=args.gene_ema)
    say(f"{args.load_gene}: {gene}")
    return gene


def des_option(args: argparse.Namespace) -> str:
    return f"--des-arch {args.des_arch}" if args.des_arch else f"--model {args.model}"


def build_des_net(
    args: argparse.Namespace, num_classes: int, gene: models.Learngene, img_size: int, **rates
) -> nn.Module:
    """The Des-Net, and a line for each part of it that does not come from the learngene as it is."""
    with about(des_option(args)):
        arch = replace(models.parse_arch(args.des_arch or args.model), img_size=img_size)
        choices = args.mapping_layer, args.mapping_layer_coeff, args.width_select, args.depth_select, args.skip_init
        des_net = gene.descend(arch, *choices, num_classes=num_classes, in_chans=CHANNELS, **rates)
    if gene.num_classes != num_classes:
        say(f"the learngene has {gene.num_classes} classes, the data {num_classes}: the head is fresh")
    if gene.arch.patch_size != arch.patch_size:
        say(f"patches of {gene.arch.patch_size} pixels in the learngene, {arch.patch_size} here: they are resampled")
    if gene.arch.num_patches != arch.num_patches:
        say(f"{gene.arch.num_patches} patches in the learngene, {arch.num_patches} here: their positions are resampled")
    if gene.config["in_chans"] != CHANNELS:
        say(f"{gene.config['in_chans']} channel(s) in the learngene, {CHANNELS} here: the patch embedding is adapted")
    return des_net


def create_sized(name: str, num_classes: int, input_size: int, **kwargs) -> nn.Module:
    """`models.create_model` for images of ``input_size``, where the architecture wants to know it.

    Raises:
        InputError: the model does not take an option that differs from its default, or not this size of image.
    """
    kwargs = {key: value for key, value in kwargs.items() if value}
    if "drop_rate" in kwargs and not models.follows_grammar(name) and is_model_in_modules(name, VIT_MODULES):
        kwargs |= models.dropout_rates(kwargs.pop("drop_rate"))
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
        raise InputError(f"{name} cannot be made for --input-size {input_size}: {models.in_a_line(error)}") from error


def wants_size(name: str) -> bool:
    """Whether a timm model is built for one size of image."""
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as error:  # resnet18.no_such_tag
        raise InputError(f"unknown model {name!r}: {error}") from error
    return bool(config and config.fixed_input_size)


def load_foreign_weights(model: nn.Module, source: str, option: str, other_head: bool) -> None:
    """Weights from a file or address, through timm's own filter for checkpoints of this architecture.

    Args:
        other_head: whether a head for another number of classes is left out, or an error.
    """
    with about(option):
        if isinstance(model, models.AuxNet):
            gene = models.load_learngene(source, head_dim=model.arch.head_dim)
            say(f"{source}: {gene}")
            return utils.load_weights(model, gene.tensors, f"{option} {source}")
        weights = read_foreign_weights(source, model)
    found = list(weights)
    with about(f"{option} {source}"):
        weights, remarks = fit_head(fit_images(weights, model, source), model, other_head)
        weights, more = models.without_training_parts(weights, model.state_dict().keys())
    utils.load_weights(model, weights, f"{option} {source}", found)
    for remark in remarks + more:
        say(f"{source}: {remark}")


def read_foreign_weights(source: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights in a file or at an address, under the names of ``model``, and a line for what is not as it is there.

    Raises:
        InputError: there are none.
    """
    path = models.fetch(source)
    weights, remarks = models.find_weights(models.read_checkpoint(path), path)
    weights, more = models.fit_names(models.fuse_qkv(weights), model)
    for remark in remarks + more:
        say(f"{source}: {remark}")
    return weights


def fit_images(weights: dict[str, torch.Tensor], model: nn.Module, source: str) -> dict[str, torch.Tensor]:
    """Weights of another implementation, resolution or number of channels, fitted to ``model`` by timm's functions."""
    weights = models.rename_levit(weights, model)
    module = sys.modules[type(model).__module__]
    filter_fn = getattr(module, "checkpoint_filter_fn", getattr(module, "_filter_fn", None))
    first = as_list(model.pretrained_cfg.get("first_conv"))
    positions, kernels = weights.get("pos_embed"), {name: weights.get(f"{name}.weight") for name in first}
    if filter_fn is not None:
        try:
            parameters = inspect.signature(filter_fn).parameters
            layer_scale = {"adapt_layer_scale": True} if "adapt_layer_scale" in parameters else {}  # as in DeiT III
            takes_model = len(parameters) > 1  # as most, but not all of timm's do
            weights = filter_fn(weights, model, **layer_scale) if takes_model else filter_fn(weights)
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as e:
            lacks = "".join(f", it has no {t}" for t in model.state_dict() if "token" in t and t not in weights)
            found = f"found {models.shapes_in(weights)}"
            raise InputError(f"does not fit {type(model).__name__}{lacks}: {found} ({models.in_a_line(e)})") from e
    if positions is not None and "pos_embed" in weights and positions.shape != weights["pos_embed"].shape:
        before, now = tuple(positions.shape), tuple(weights["pos_embed"].shape)
        say(f"{source} has positions {before}, here are {now}: they are resampled")
    for name in first:
        kernel, own = weights.get(f"{name}.weight"), model.get_submodule(name).weight
        if kernel is not None and kernels[name] is not None and kernels[name].shape != kernel.shape:
            say(
                f"{source} has patches {tuple(kernels[name].shape)}, here are {tuple(kernel.shape)}: they are resampled"
            )
        if kernel is not None and kernel.ndim == own.ndim == 4 and kernel.shape[1] != own.shape[1]:
            say(f"{source} is for images of {kernel.shape[1]} channel(s), here are {own.shape[1]}: it is adapted")
            weights = {**weights, f"{name}.weight": models.adapt_channels(kernel, own.shape[1])}
    return weights


def fit_head(
    weights: dict[str, torch.Tensor], model: nn.Module, other_head: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The head of ``model`` in place of none, another kind, or one for another number of classes, and a line for each.

    Raises:
        InputError: that is so, without ``other_head``.
    """
    remarks = []
    for name in as_list(model.pretrained_cfg["classifier"]):
        own = {key: value for key, value in model.state_dict().items() if key.startswith(f"{name}.")}
        theirs = [key for key in weights if key.startswith(f"{name}.")]
        head = weights.get(f"{name}.weight")
        if own and set(theirs) != own.keys():
            if not other_head:
                missing = next((key for key in own if key not in theirs), f"{name} of this kind")
                raise InputError(f"has no {missing}, the head that a teacher needs: found {models.found_in(weights)}")
            remarks.append(f"it has {'another' if theirs else 'no'} head ({name}): it is fresh")
            norm = pooled_norm(weights, model)
            remarks += ["it has no fc_norm: it is fresh"] if norm else []
            own |= norm
        elif head is not None and head.ndim and head.shape[0] != model.num_classes:
            if not other_head:
                raise InputError(f"has {head.shape[0]} classes, the data {model.num_classes}")
            remarks.append(f"it has {head.shape[0]} classes, the data {model.num_classes}: the head is fresh")
        else:
            continue
        weights = {key: value for key, value in weights.items() if key not in theirs} | own
    return weights, remarks


def pooled_norm(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The fc_norm of ``model`` where ``weights`` have none, which belongs to the head in those who leave that out."""
    return {key: t for key, t in model.state_dict().items() if key.startswith("fc_norm.") and key not in weights}


def as_list(names: str | Sequence[str] | None) -> Sequence[str]:
    """Names as timm's configurations give them: one, several, or none."""
    return (names,) if isinstance(names, str) else names or ()


def build_teacher(args: argparse.Namespace, num_classes: int, device: torch.device) -> nn.Module | None:
    """The frozen teacher, or None without distillation."""
    if args.distillation_type == "none":
        return None
    if args.teacher_path:
        teacher = create_sized(args.teacher_model, num_classes, args.input_size)
        load_foreign_weights(teacher, args.teacher_path, "--teacher-path", other_head=False)
    else:
        try:
            config = get_pretrained_cfg(args.teacher_model)
            if config is not None and config.num_classes != num_classes:
                raise InputError(
                    f"--teacher-model {args.teacher_model} has {config.num_classes} classes as timm offers it, the "
                    f"data {num_classes}: train one with --model {args.teacher_model} and give its --teacher-path"
                )
            size = {"img_size": args.input_size} if wants_size(args.teacher_model) else {}
            teacher = models.create_model(args.teacher_model, pretrained=True, num_classes=num_classes, **size)
        except InputError:
            raise
        except (OSError, RuntimeError, TypeError) as error:  # no such weights, no network, a name of this project's
            raise InputError(
                f"--teacher-path is missing, and timm has no weights of {args.teacher_model}: {error}"
            ) from error
    return teacher.requires_grad_(False).to(device).eval()


def build_teaching(
    args: argparse.Namespace, dataset: Dataset, num_classes: int, device: torch.device
) -> Teacher | TeacherCache | None:
    """The teacher as the engine asks it, perhaps through a cache, or None without distillation.

    Args:
        dataset: the images to train.
    """
    model = None if args.eval else build_teacher(args, num_classes, device)
    if model is None:
        return None
    dtype = amp_dtype_of(args, device)
    teacher = Teacher(torch.compile(model) if args.compile else model, dtype)
    if args.teacher_cache is None:
        return teacher
    top, processes = args.teacher_cache_top, utils.world_size()
    if top is not None and top >= num_classes:
        raise InputError(f"--teacher-cache-top {top}: the data have {num_classes} classes; without it all are kept")
    identity, folder = identity_of(args, dataset, teacher, dtype, processes), Path(args.teacher_cache)
    if utils.is_main():
        claim(folder, identity)
    return TeacherCache(teacher, folder, identity, num_classes, args.batch_size * processes, top, utils.rank(), device)


# ---------------------------------------------------------------------------------------------------------------------
# Data, optimiser, average
# ---------------------------------------------------------------------------------------------------------------------


def build_sets(args: argparse.Namespace) -> tuple[Dataset, Dataset, list[str], BatchAugment | None]:
    """Training and test images, the names of the classes, and with --cache-data what augments the former.

    With --holdout some of the training images are in the place of the test images, which are not even read. With --eval
    there are no training images, and need not be.
    """
    if args.cache_data:
        cache.check_small(args.data_set, args.input_size)
    sets, augment, shards, found = [], None, None, []
    if args.shard_cache is not None:
        shards = ShardCache(Path(args.shard_cache), int(args.shard_cache_gb * 1e9))
    for is_train in (False,) if args.eval else (True, False):
        transform = build_transform(
            args.data_set,
            is_train,
            args.input_size,
            color_jitter=args.color_jitter,
            aa=args.aa,
            interpolation=args.train_interpolation if is_train else "bicubic",
            reprob=args.reprob,
            remode=args.remode,
            recount=args.recount,
            eval_crop_ratio=args.eval_crop_ratio,
            three_augment=args.three_augment,
            src=args.src,
        )
        if args.cache_data:
            augment = BatchAugment(transform) if is_train else augment
            transform = cache.resized(transform)
        elif is_train:
            transform = faster(transform)
        of_train = is_train or args.holdout is not None
        alone = len(splits_needed(args)) == 1
        sets.append(
            build_dataset(args.data_set, args.data_path, of_train, transform, args.inat_category, shards, alone)
        )
        found.append(summary(SPLITS[not of_train], *sets[-1], args.data_path))
    for line in dict.fromkeys(filter(None, found)):
        say(line)
    (train, classes), (test, test_classes) = sets[0], sets[-1]
    if classes != test_classes:
        raise InputError(
            f"--data-path {args.data_path}: the {len(classes)} classes to train are not the {len(test_classes)} to test"
        )
    if args.holdout or (args.train_images and not args.eval):
        to_train, held_out = divide(train.targets, args.train_images, args.holdout)
        train, test = Subset(train, to_train), Subset(test, held_out) if args.holdout else test
    return Subset(test, []) if args.eval else train, test, classes, augment


def splits_needed(args: argparse.Namespace) -> tuple[str, ...]:
    """The splits of the data set that the run reads."""
    if args.holdout:
        return ("train",)
    return ("val",) if args.eval else SPLITS


def build_loaders(args: argparse.Namespace, device: torch.device) -> tuple[Batches, Batches, list[str]]:
    """Training and test images in batches, and the names of the classes."""
    train, test, classes, augment = build_sets(args)
    if args.nb_classes not in (None, len(classes)):
        raise InputError(f"--nb-classes {args.nb_classes}: the data have {len(classes)} classes, expected as many")
    if args.batch_size * utils.world_size() > len(train) and args.epochs > 0 and not args.eval:
        raise InputError(
            f"--batch-size {args.batch_size} on {utils.world_size()} process(es) is more than the {len(train)} "
            "training images"
        )
    process = dict(rank=utils.rank(), world_size=utils.world_size())
    workers = min(args.num_workers, len(os.sched_getaffinity(0)))  # more than processors only get in each other's way
    pinned = args.pin_mem and device.type == "cuda"
    common = dict(num_workers=workers, pin_memory=pinned, collate_fn=collate)
    sampler = TrainSampler(
        len(train),
        args.batch_size,
        repeats=3 if args.repeated_aug else 1,
        seed=args.seed,
        shard_sizes=getattr(train, "shard_sizes", None),
        **process,
    )
    sizes = dict(train=args.batch_size, test=int(1.5 * args.batch_size))
    train, test = SeededDataset(train, SKIPPED_AT_ONCE if args.skip_bad_images else 0), ReadDataset(test)
    if args.cache_data:
        keys = [] if args.eval else [(i, 0) for i in range(len(train))]  # nothing is random yet
        cache.check_memory(len(keys) + len(test), args.input_size, device)
        read = partial(cache.read_all, args.input_size, device, args.skip_bad_images, **common)
        train_loader = AugmentedBatches(*read(train, keys), sampler, sizes["train"], augment)
        return train_loader, CachedBatches(*read(test, range(len(test))), sizes["test"], **process), classes
    train_loader = DataLoader(
        train,
        batch_size=sizes["train"],
        sampler=sampler,
        drop_last=True,
        persistent_workers=workers > 0,
        **common,
    )
    test_loader = DataLoader(test, batch_size=sizes["test"], sampler=ExactSampler(len(test), **process), **common)
    return *(Batches(loader, args.skip_bad_images, device) for loader in (train_loader, test_loader)), classes


def build_mixup(args: argparse.Namespace, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """Mixup and cutmix, and the criterion that fits their targets."""
    if args.mixup <= 0 and args.cutmix <= 0 and args.cutmix_minmax is None:
        smoothed = args.smoothing > 0
        if args.bce_loss:
            return None, BinaryCrossEntropy(args.smoothing)
        return None, LabelSmoothingCrossEntropy(args.smoothing) if smoothed else nn.CrossEntropyLoss()
    if args.batch_size % 2 and args.epochs > 0 and not args.eval:
        raise InputError(f"--batch-size {args.batch_size} is odd: --mixup and --cutmix pair the images of a batch")
    mixup = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax and box_sides(args.cutmix_minmax, args.input_size),
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=0.0 if args.bce_loss else args.smoothing,  # its criterion smooths
        num_classes=num_classes,
    )
    return mixup, BinaryCrossEntropy(args.smoothing) if args.bce_loss else SoftTargetCrossEntropy()


def box_sides(minmax: Sequence[float], input_size: int) -> list[float]:
    """``--cutmix-minmax`` for timm, which draws sides in pixels below the upper end: equal ends would leave it none.

    Raises:
        InputError: no box has such sides.
    """
    low, high = (int(share * input_size) for share in minmax)
    if low > high or low >= input_size:
        raise InputError(
            f"--cutmix-minmax {minmax[0]:g} {minmax[1]:g}: expected MIN ≤ MAX, and MIN below the whole image"
        )
    return [(side + 0.5) / input_size for side in (low, max(high, low + 1))]


def build_criterion(args: argparse.Namespace, base_criterion: nn.Module) -> DistillationLoss | FamilyLoss:
    """Distillation over the base criterion, of the Aux-Net alone or of its descendants, too."""
    criterion = DistillationLoss(base_criterion, args.distillation_type, args.distillation_alpha, args.distillation_tau)
    return FamilyLoss(criterion, args.descendant_weight) if args.descendants else criterion


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> tuple[torch.optim.Optimizer, Scheduler]:
    """DeiT's: the learning rate grows with the images of an optimiser step, its floor and warm-up start do not."""
    length = argparse.Namespace(**{**vars(args), "epochs": max(1, args.epochs)})
    optimizer = create_optimizer(args, model)
    try:
        scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(length))
    except (ValueError, AssertionError, IndexError) as error:
        raise InputError(f"--sched {args.sched} cannot be used: {error}") from error
    if scheduler is None or args.sched.startswith("plateau"):  # plateau needs more than the epoch to resume exactly
        raise InputError(f"--sched {args.sched} cannot be used: expected cosine, step, linear, poly, tanh or multistep")
    return optimizer, scheduler


def doubts(args: argparse.Namespace, scheduler: Scheduler) -> list[str]:
    """What the options ask for, and who wrote them may not want: a sentence each. Nothing is changed."""
    lr = scaled_lr(args)
    scaled = "" if args.unscale_lr else f", scaled to {images_per_step(args)} images per optimiser step"
    effects = []
    if getattr(scheduler, "lr_min", 0) > lr:  # schedules in steps have none
        effects.append(f"below --min-lr {args.min_lr:g}, to which it rises through the whole run")
    if args.warmup_epochs and args.warmup_lr > lr:
        effects.append(f"below --warmup-lr {args.warmup_lr:g}, from which it falls during warm-up")
    found = [f"the learning rate {lr:g} (--lr {args.lr:g}{scaled}) is {' and '.join(effects)}"] if effects else []
    if args.opt_betas and not get_optimizer_info(args.opt.rpartition("_")[2]).has_betas:
        found.append(f"--opt-betas has no effect: --opt {args.opt} has no betas")
    return found


def build_ema(args: argparse.Namespace, model: nn.Module) -> ModelEmaV3 | None:
    """The average over the steps of training; evaluation needs none beside the weights that it evaluates."""
    if not args.model_ema or args.eval:
        return None
    return ModelEmaV3(model, decay=args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
