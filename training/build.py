"""What a run is made of, from its options: device, data, model, teacher, optimiser."""

import argparse
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import models
import utils
from common.errors import InputError, one_line
from common.launchers import is_plain_task
from losses import DistillationLoss, FamilyLoss
from training.build_model import (
    create_sized,
    wants_size,
)
from training.foreign_weights import load_foreign_weights
from training.optimizers import check_optimizer, compiles, create_optimizer, images_per_step, scaled_lr
from training.teacher import Teacher, TeacherCache, cache_key_of, open_cache

import torch
from timm.models import get_pretrained_cfg
from timm.optim import get_optimizer_info
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import Dataset

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
        reason = one_line(error).partition(" Set TORCHDYNAMO_VERBOSE")[0]  # hints for torch's developers
        raise InputError(
            f"{what} cannot be used: torch.compile fails on {device} ({reason}); it needs a C++ compiler such as g++, "
            "which CXX may name, and Python's headers"
        ) from error


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
    cache_key, folder = cache_key_of(args, dataset, teacher, dtype, processes), Path(args.teacher_cache)
    if utils.is_main():
        open_cache(folder, cache_key)
    return TeacherCache(teacher, folder, cache_key, num_classes, args.batch_size * processes, top, utils.rank(), device)


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
