"""Checkpoints: write, find, resume."""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import models
import utils
from common.download import fetch
from common.errors import InputError, error_context, one_line, shown
from common.files import atomic_write, check_archive, hardlink_or_copy, read_checkpoint
from engine import Position, not_finite
from models.formats.class_names import class_names, first_difference
from models.formats.published import is_published, published_moments, published_names
from models.formats.weights import all_finite, load_weights, optimizer_state_of, weights_of
from training.config import CHECKPOINT, Config, options_in_effect, recipe
from training.foreign_weights import as_list
from training.label_check import names_known
from training.optimizers import load_state, sample_of, scaled_lr, tensors_in
from training.preprocessing import preprocessing_of
from training.run import Run, accuracy
from utils import print_main

import torch
from torch import Tensor, nn


def resume(run: Run) -> None:
    """Continue from a checkpoint of this program or a published one; with --eval only the weights are loaded.

    Raises:
        InputError: the checkpoint does not fit the model, the data or the options.
    """
    path = fetch(run.config.runtime.resume, on_hub=CHECKPOINT)
    content = read_checkpoint(path)
    restore(run, path, content)
    if run.config.runtime.eval:
        return
    run.checkpoint = Path(path)
    try:
        if type(content["epoch"]) is not int or not -1 <= content["epoch"] < 10**6:
            raise InputError(f"epoch is {shown(content['epoch'])!r}")
        run.epoch = content["epoch"] + 1
        run.position = position_in(content, run)
        run.schedule_lag = schedule_lag_in(content)
        log = content["log"] if "log" in content else read_log(run.config.output.output_dir)
        run.epochs = [line for line in log if line["epoch"] < run.epoch]
        if not all(type(value) in (int, float) for line in run.epochs for value in (*line.values(), accuracy(line))):
            raise InputError("its log holds something else than numbers")
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
        raise InputError(f"--resume {path} does not say where it was ({one_line(error)})") from error


def read_log(folder: str | None) -> list[dict]:
    """The log in the output folder: a published checkpoint does not contain it."""
    path = Path(folder or "") / "log.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if folder and path.is_file() else []


def position_in(content: Mapping, run: Run) -> Position:
    """Where in the epoch a checkpoint was written."""
    saved = content.get("position")  # published checkpoints are written between epochs
    if saved is None:
        return Position()
    steps, images, processes = (int(saved[name]) for name in ("steps", "images", "processes"))
    if not 0 <= steps <= images <= len(run.train_loader.dataset):
        raise InputError(f"position is {steps} steps, {images} of {len(run.train_loader.dataset)} images")
    if images and processes != utils.world_size():
        print_main(
            f"epoch {run.epoch} was begun by {processes} processes and is continued by {utils.world_size()}: no image "
            "is repeated or left out, but another process may see it"
        )
    own = (saved["loss"], saved["counted"]) if utils.is_main() else (0.0, 0.0)
    return Position(images // (run.config.data.batch_size * utils.world_size()), images, *map(float, own))


def schedule_lag_in(content: Mapping) -> int:
    """`Run.schedule_lag` of the run that wrote a checkpoint; before it was recorded, this program had none."""
    lag = content.get("schedule_lag", 1 if is_published(content) else 0)
    if type(lag) is not int or lag not in (0, 1):
        raise InputError(f"schedule_lag is {shown(lag)!r}, expected 0 or 1")
    return lag


def restore(run: Run, path: Path | str, content: Mapping, option: str = "--resume") -> None:
    """Load weights and, but for --eval, the state of optimiser, average and gradient scaler from a checkpoint.

    Args:
        option: what messages call it.

    Raises:
        InputError: the checkpoint does not fit the model, the data or the options.
    """
    averaged = run.config.runtime.eval and run.config.optim.model_ema
    source = f"{option} {path}" + " (model_ema)" * averaged
    no_average = "optimizer" in content and content.get("model_ema") is None
    if averaged and no_average:
        raise InputError(f"{option} {path} holds no model_ema: without --model-ema its own weights are evaluated")
    head_dim = run.model.arch.head_dim if isinstance(run.model, models.AuxNet) else 1  # which other models do not use
    with error_context(option):
        rename = published_names(content, path, head_dim)
        weights = rename(weights_of(content, path, "model_ema" if averaged else "model"))
    check_num_classes(weights, run.model, source)
    load_weights(run.model, weights, source)
    if difference := first_difference(class_names(path, content), names_known(run.config.data.data_set, run.classes)):
        raise InputError(f"{source} was trained on other classes than the data have: {difference}")
    if run.config.runtime.eval:
        return
    if run.ema is not None and no_average:
        raise InputError(f"{source} holds no model_ema: --no-model-ema continues it")
    try:
        restore_training_state(run, path, content, rename, source)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise InputError(
            f"{source} holds no training state that fits these options ({one_line(error)}): "
            "--finetune takes weights alone"
        ) from error


def check_num_classes(weights: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    """Raises InputError if a head in ``weights`` has another number of classes than that of ``model``."""
    if isinstance(model, models.AuxNet):
        heads = ["head_weight"]
    else:
        heads = [f"{name}.weight" for name in as_list(model.pretrained_cfg["classifier"])]
    own = model.state_dict()
    for head in heads:
        found, expected = (tensors[head].shape[:1] if head in tensors else () for tensors in (weights, own))
        if found and expected and found != expected:
            raise InputError(f"{source} has {found[0]} classes, the data {expected[0]}")


def restore_training_state(
    run: Run, path: Path | str, content: Mapping, rename: Callable[[dict], dict], source: str
) -> None:
    """Load the state of optimiser, average and gradient scaler.

    Args:
        rename: gives weights their names in ``run.model``.
        source: what messages call the checkpoint.
    """
    names = parameter_names(run.optimizer, run.model)
    saved = {**content["optimizer"], "state": optimizer_state_of(content, path)}
    groups = [len(group["params"]) for group in saved["param_groups"]]
    if is_published(content):
        state = published_moments(saved["state"], weights_of(content, path), rename, names)
        saved = {"state": state, "param_groups": [{} for _ in run.optimizer.param_groups]}
    elif groups != [len(group["params"]) for group in run.optimizer.param_groups]:
        raise InputError("its optimizer has other groups of parameters")
    optim = run.config.optim
    sample = sample_of(optim, scaled_lr(optim, run.config.data.batch_size), run.optimizer)
    load_state(run.optimizer, saved, names, sample)
    if run.ema is not None:
        average = rename(weights_of(content, path, "model_ema"))
        load_weights(run.ema.module, average, f"{source} (model_ema)")
    if run.scaler.is_enabled() and content["scaler"]:  # empty after float32 or bfloat16
        run.scaler.load_state_dict(content["scaler"])


def write_checkpoint(run: Run) -> None:
    """Everything to resume. Random numbers need no state: those of a step follow from the seed and its position.

    Raises:
        NotFiniteError: the weights are not finite; what was written before stays.
    """
    check_state(run)
    position = {**run.position.state(), "processes": utils.world_size()}
    if run.log is None:
        return
    content = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.scheduler.state_dict(),
        "schedule_lag": run.schedule_lag,
        "epoch": run.epoch - 1,
        "position": position,
        "scaler": run.scaler.state_dict(),
        "log": run.log.epochs,
        "args": options_in_effect(run.config),
        "preprocessing": preprocessing_of(run.config.data).as_config(),
    }
    if run.ema is not None:
        content["model_ema"] = run.ema.module.state_dict()
    if isinstance(run.model, models.AuxNet):
        content["learngene"] = models.Learngene.of(run.model, recipe(run.config)).header
    if names := names_known(run.config.data.data_set, run.classes):
        content["classes"] = names
    path = run.output_dir / CHECKPOINT
    continues = run.checkpoint is not None and run.checkpoint.parent == run.output_dir
    with run.output.attempt(path):
        # what an earlier run has left is no older checkpoint of this one, to fall back to
        save_checkpoint(path, content, run.config.output.keep_checkpoints if continues else 0)
        run.checkpoint, run.rollbacks = path, 0
    if str(path) not in run.output.failed:
        keep_best(run)


def check_state(run: Run) -> None:
    """Raises NotFiniteError, on all processes together, if anything that a checkpoint would hold is not finite."""
    tensors = [*run.model.state_dict().values(), *(run.ema.module.state_dict().values() if run.ema else ())]
    tensors += tensors_in(run.optimizer.state_dict()["state"])
    finite = all_finite([tensor for tensor in tensors if tensor.is_floating_point()])
    if utils.max_over_processes(not finite)[0]:
        finding = f"weights or their averages are not finite in epoch {run.epoch} after step {run.position.steps}"
        raise not_finite(finding, run.optimizer)


def keep_best(run: Run) -> None:
    """Give the newest checkpoint a second name if it is that of the epoch with the highest accuracy."""
    epochs = [epoch for epoch in run.log.epochs if epoch["epoch"] >= 0]
    best = max(epochs, key=accuracy, default=None)
    if run.position.images == 0 and best is not None and best["epoch"] == run.epoch - 1:
        with run.output.attempt(run.output_dir / "best_checkpoint.pth"):
            hardlink_or_copy(run.checkpoint, run.output_dir / "best_checkpoint.pth")


def find_checkpoint(config: Config) -> str | None:
    """The checkpoint that --resume means: with ``auto`` the newest whole one in the output folder, or None.

    Only the main process looks for files.

    Raises:
        InputError: there is none to evaluate.
    """
    resume, folder = config.runtime.resume, config.output.output_dir
    if resume != "auto" or not utils.is_main():
        return resume
    path = newest_checkpoint(Path(folder))
    if path is None and config.runtime.eval:
        raise InputError(f"--resume auto finds no checkpoint in --output-dir {folder} to evaluate")
    print(f"continuing from {path}" if path else f"no checkpoint in {folder}: starting from epoch 0", flush=True)
    return str(path) if path else None


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, content: dict, keep: int = 0) -> None:
    """Write tensors and plain data atomically; the ``keep`` files before it stay, as ``checkpoint.1.pth``, ….

    Raises:
        OSError: it cannot be written; ``path`` is then what it was before.
    """
    with atomic_write(path) as unfinished:
        torch.save(content, unfinished)
        for age in range(keep, 1, -1):
            if backup_path(path, age - 1).exists():
                os.replace(backup_path(path, age - 1), backup_path(path, age))
        if keep and path.exists():
            hardlink_or_copy(path, backup_path(path, 1))
    age = keep + 1
    while backup_path(path, age).exists():  # more were kept before
        backup_path(path, age).unlink()
        age += 1


def backup_path(path: Path, age: int) -> Path:
    """checkpoint.pth → checkpoint.2.pth"""
    return path.with_suffix(f".{age}{path.suffix}")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run, passing over damaged ones with a warning; None if there is none."""
    ages = (re.fullmatch(r"checkpoint(?:\.(\d+))?\.pth", path.name) for path in folder.glob("checkpoint*.pth"))
    for match in sorted((match for match in ages if match), key=lambda match: int(match[1] or 0)):
        path = folder / match[0]
        try:
            check_archive(path)
            return path
        except InputError as error:
            print(f"warning: --resume auto passes over {error}", file=sys.stderr, flush=True)
    return None


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of the optimiser's parameters in the order in which its state dict numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
