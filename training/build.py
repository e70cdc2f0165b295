"""Device, precision, teacher, criterion, optimiser, schedule and average of a run, from its options."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import models
import utils
from common.devices import default_dtype
from common.errors import InputError, one_line
from losses import DistillationLoss, FamilyLoss, FeatureLoss
from models.compiled import compiled_for_evaluation
from models.features import Features
from models.preprocessing import DEFAULT, Preprocessing
from training.build_model import create_sized, source_of, wants_size
from training.config import SOURCE, Config, ModelConfig, OptimConfig, ScheduleConfig, TeacherConfig, options_of
from training.foreign_weights import load_foreign_weights
from training.optimizers import check_optimizer, compiles, create_optimizer, images_per_step, scaled_lr
from training.preprocessing import of_teacher, preprocessing_of, shown
from training.teacher import Renormalised, Teacher, TeacherCache, cache_key_of, open_cache
from utils import print_main

import torch
from timm.models import get_pretrained_cfg
from timm.optim import get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import Dataset

# ---------------------------------------------------------------------------------------------------------------------
# Device and precision
# ---------------------------------------------------------------------------------------------------------------------


def dtype_of(amp_dtype: str, device: torch.device) -> torch.dtype:
    """The precision of the forward pass."""
    if amp_dtype != "auto":
        return getattr(torch, amp_dtype)
    return default_dtype(device)


def autocast_of(amp_dtype: str, device: torch.device) -> tuple[AbstractContextManager, bool]:
    """The precision of the forward pass as a context, and whether it needs its gradients scaled (float16)."""
    dtype = dtype_of(amp_dtype, device)
    if dtype == torch.float32:
        return nullcontext(), False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns, and computes in float32
            return torch.autocast(device.type, dtype=dtype), dtype == torch.float16
    except (RuntimeError, UserWarning) as error:
        raise InputError(
            f"--amp-dtype {amp_dtype} cannot be used on {device} ({one_line(error)}); expected --amp-dtype float32"
        ) from error


def check_means(optim: OptimConfig, compile_model: bool, half: bool, device: torch.device) -> None:
    """Try optimiser, compiler and scaling of gradients before anything long.

    Args:
        compile_model: whether --compile is given, and there is something to train.
        half: whether the forward pass is in float16.

    Raises:
        InputError: --opt, --compile or --amp-dtype cannot be used.
    """
    if half:
        check_scaler(device)
    optimizer = check_optimizer(optim, device)
    if compile_model:
        check_compiler("--compile", device)
    elif compiles(optimizer):
        check_compiler(f"--opt {optim.opt}, which compiles its steps,", device)


def check_scaler(device: torch.device) -> None:
    """Raises InputError where torch cannot scale gradients on the device, as float16 needs it."""
    scaler, weight = torch.amp.GradScaler(device.type), torch.ones(1, device=device, requires_grad=True)
    try:
        scaler.scale(weight.sum()).backward()
        scaler.unscale_(torch.optim.SGD([weight]))
        scaler.update()
    except (RuntimeError, TypeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        raise InputError(
            f"--amp-dtype float16 cannot be used: torch cannot scale gradients on {device} ({one_line(error)[:200]}); "
            "expected --amp-dtype bfloat16 or float32"
        ) from error


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


# ---------------------------------------------------------------------------------------------------------------------
# Teacher and criterion
# ---------------------------------------------------------------------------------------------------------------------


def build_teacher(
    config: TeacherConfig,
    input_size: int,
    num_classes: int,
    device: torch.device,
    preprocessing: Preprocessing = DEFAULT,
) -> nn.Module | None:
    """The frozen teacher, or None without distillation.

    Args:
        preprocessing: of the images of the run. A teacher that was trained with another mean or deviation gets them
            renormalised.

    Raises:
        InputError: there are no weights, or they are of another architecture or another number of classes.
    """
    if config.distillation_type == "none":
        return None
    if config.teacher_path:
        teacher = create_sized(config.teacher_model, num_classes, input_size)
        load_foreign_weights(teacher, config.teacher_path, "--teacher-path", other_head=False)
    else:
        teacher = pretrained_teacher(config.teacher_model, input_size, num_classes)
    own = of_teacher(config)
    if (own.mean, own.std) != (preprocessing.mean, preprocessing.std):
        teacher = Renormalised(teacher, preprocessing, own)
        print_main(f"{config.option} sees the images with its own mean {shown(own.mean)}, std {shown(own.std)}")
    return teacher.requires_grad_(False).to(device).eval()


def pretrained_teacher(name: str, input_size: int, num_classes: int) -> nn.Module:
    """A model with timm's pretrained weights."""
    try:
        pretrained = get_pretrained_cfg(name)
        if pretrained is not None and pretrained.num_classes != num_classes:
            raise InputError(
                f"--teacher-model {name} has {pretrained.num_classes} classes as timm offers it, the "
                f"data {num_classes}: train one with --model {name} and give its --teacher-path"
            )
        size = {"img_size": input_size} if wants_size(name) else {}
        return models.create_model(name, pretrained=True, num_classes=num_classes, **size)
    except InputError:
        raise
    except (OSError, RuntimeError, TypeError) as error:  # no such weights, no network, a name of this project's
        raise InputError(f"--teacher-path is missing, and timm has no weights of {name}: {error}") from error


def build_teaching(
    config: Config, dataset: Dataset, num_classes: int, device: torch.device
) -> Teacher | TeacherCache | None:
    """The teacher as the engine calls it, through a cache with --teacher-cache, or None without distillation.

    Args:
        dataset: the images to train on.
    """
    model = None
    if config.teacher.distillation_type == "feature" and not config.runtime.eval:
        model = Features(source_of(config.model, config.data.input_size, 0, other_head=True)).to(device)
    elif config.teacher.teacher_model == SOURCE and not config.runtime.eval:
        model = source_of(config.model, config.data.input_size, num_classes).to(device)
    elif not config.runtime.eval:
        own = preprocessing_of(config.data)
        model = build_teacher(config.teacher, config.data.input_size, num_classes, device, own)
    if model is None:
        return None
    dtype = dtype_of(config.runtime.amp_dtype, device)
    teacher = Teacher(compiled_for_evaluation(model) if config.runtime.compile else model, dtype)
    if config.teacher.teacher_cache is None:
        return teacher
    top, processes = config.teacher.teacher_cache_top, utils.world_size()
    if top is not None and top >= num_classes:
        raise InputError(f"--teacher-cache-top {top}: the data have {num_classes} classes; without it all are kept")
    cache_key = cache_key_of(options_of(config), dataset, teacher, dtype, processes)
    folder, images_per_step = Path(config.teacher.teacher_cache), config.data.batch_size * processes
    if utils.is_main():
        open_cache(folder, cache_key)
    return TeacherCache(teacher, folder, cache_key, num_classes, images_per_step, top, utils.rank(), device)


def build_criterion(
    base_criterion: nn.Module, teacher: TeacherConfig, model: ModelConfig
) -> DistillationLoss | FamilyLoss:
    """Distillation over the base criterion; with descendants, the weighted sum over Aux-Net and descendants."""
    if teacher.distillation_type == "feature":
        criterion = FeatureLoss(base_criterion, teacher.distillation_alpha)
    else:
        criterion = DistillationLoss(
            base_criterion,
            teacher.distillation_type,
            teacher.distillation_alpha,
            teacher.distillation_tau,
            teacher.distillation_mean or "logits",
        )
    return FamilyLoss(criterion, model.descendant_weight, model.chain_weight) if model.descendants else criterion


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser, schedule, average
# ---------------------------------------------------------------------------------------------------------------------


def build_optimizer(
    optim: OptimConfig, schedule: ScheduleConfig, batch_size: int, seed: int, model: nn.Module
) -> tuple[torch.optim.Optimizer, Scheduler]:
    """DeiT's: the learning rate grows with the images of an optimiser step, its floor and warm-up start do not.

    Args:
        seed: of the schedule's noise.
    """
    optimizer = create_optimizer(optim, scaled_lr(optim, batch_size), model)
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=schedule.sched,
            num_epochs=max(1, schedule.epochs),
            decay_epochs=schedule.decay_epochs,
            decay_milestones=[30, 60],  # timm's for options without milestones
            warmup_epochs=schedule.warmup_epochs,
            cooldown_epochs=schedule.cooldown_epochs,
            decay_rate=schedule.decay_rate,
            min_lr=schedule.min_lr,
            warmup_lr=schedule.warmup_lr,
            noise=schedule.lr_noise,
            noise_pct=schedule.lr_noise_pct,
            noise_std=schedule.lr_noise_std,
            noise_seed=seed,
        )
    except (ValueError, AssertionError, IndexError) as error:
        raise InputError(f"--sched {schedule.sched} cannot be used: {error}") from error
    if scheduler is None or schedule.sched.startswith("plateau"):  # plateau needs more than the epoch to resume exactly
        raise InputError(
            f"--sched {schedule.sched} cannot be used: expected cosine, step, linear, poly, tanh or multistep"
        )
    return optimizer, scheduler


def doubtful_options(optim: OptimConfig, schedule: ScheduleConfig, batch_size: int, scheduler: Scheduler) -> list[str]:
    """Warnings about options that are legal and probably a mistake."""
    lr = scaled_lr(optim, batch_size)
    scaled = "" if optim.unscale_lr else f", scaled to {images_per_step(optim, batch_size)} images per optimiser step"
    effects = []
    if getattr(scheduler, "lr_min", 0) > lr:  # schedules in steps have none
        effects.append(f"below --min-lr {schedule.min_lr:g}, to which it rises through the whole run")
    if schedule.warmup_epochs and schedule.warmup_lr > lr:
        effects.append(f"below --warmup-lr {schedule.warmup_lr:g}, from which it falls during warm-up")
    found = [f"the learning rate {lr:g} (--lr {optim.lr:g}{scaled}) is {' and '.join(effects)}"] if effects else []
    if optim.opt_betas and not get_optimizer_info(optim.opt.rpartition("_")[2]).has_betas:
        found.append(f"--opt-betas has no effect: --opt {optim.opt} has no betas")
    return found


def build_ema(optim: OptimConfig, model: nn.Module) -> ModelEmaV3:
    """The exponential moving average of the weights over the steps of training."""
    return ModelEmaV3(model, decay=optim.model_ema_decay, device="cpu" if optim.model_ema_force_cpu else None)
