"""A run of either stage: set up, trained or evaluated, written and uploaded."""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from urllib.parse import urlsplit

import models
import utils
from build import (
    CHANNELS,
    autocast_of,
    build_criterion,
    build_ema,
    build_loaders,
    build_mixup,
    build_model,
    build_optimizer,
    build_teaching,
    check_means,
    des_option,
    device_of,
    doubts,
    input_size_of,
    load_gene,
    splits_needed,
    wants_size,
)
from classes import check_names, names_known
from configuration import about, check_kind, options_file, options_in_effect, parse_options, recipe
from datasets import DATA_SETS, SMALL, Batches, describe_classes
from engine import Position, evaluate, not_finite, train_one_epoch
from folders import download
from losses import DistillationLoss, FamilyLoss
from models import InputError
from optimizers import load_state, sample_of, tensors_in
from teacher import Teacher, TeacherCache
from utils import NotFiniteError, say

import torch
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

DOWNLOADING, SETTING_UP = timedelta(days=1), timedelta(hours=1)  # that one process may take longer than another
ROLLBACKS = 3  # between two checkpoints; more do not help

# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything that training and evaluation need; the model is the one without wrappers."""

    args: argparse.Namespace
    kind: str
    output_dir: Path | None
    device: torch.device
    autocast: AbstractContextManager
    train_loader: Batches
    test_loader: Batches
    classes: list[str]
    model: nn.Module
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    teacher: Teacher | TeacherCache | None
    criterion: DistillationLoss | FamilyLoss
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    epoch: int  # that is trained now, and how far it has come
    facts: dict[str, object]
    position: Position = field(default_factory=Position)
    output: utils.Output = field(default_factory=utils.Output)
    log: utils.EpochLog | None = None
    progress: utils.Progress | None = None
    earlier: list[dict] = field(default_factory=list)  # epochs that the checkpoint has on record
    checkpoint: Path | None = None  # the newest of this run, as far as the main process knows
    schedule_lag: int = 1  # DeiT steps the schedule after each epoch; 0 for a run begun when this program did not
    rollbacks: int = 0  # since that one

    @property
    def steps(self) -> int:
        """Batches of each process in a whole epoch."""
        return len(self.train_loader.dataset) // utils.world_size() // self.args.batch_size

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps + self.position.steps

    @property
    def epochs_done(self) -> float:
        return self.epoch + self.position.steps / max(1, self.steps)

    def set_learning_rate(self) -> None:
        """Epoch e trains at s(max(e − 1, 0)) of the schedule s, as in the published programs.

        The schedule is a function of the epoch, and of the options of this run rather than those it was begun with.
        """
        self.scheduler.step(max(self.epoch - self.schedule_lag, 0))


def set_up(args: argparse.Namespace) -> Run:
    """Check all options and build everything; no process waits for another here.

    Raises:
        InputError: an option, file or combination that cannot work.
    """
    kind = check_kind(args)
    if args.output_dir is None and (args.on_nan == "rollback" or args.wandb):
        needs = (
            "--wandb keeps its files in it" if args.wandb else "--on-nan rollback goes back to the checkpoints in it"
        )
        raise InputError(f"--output-dir is missing: {needs}")
    output_dir = writable_folder(args.output_dir)
    check_upload(args)
    device = device_of(args)
    autocast, half = autocast_of(args, device)
    if not args.eval:
        check_means(args, device)
    args.input_size = input_size_of(args, args.tgt_arch or args.des_arch or args.model)
    random_seed(args.seed)
    gene = load_gene(args) if kind == "descend" else None
    facts = facts_of(args, gene)
    train_loader, test_loader, classes = build_loaders(args, device)
    num_classes = len(classes)
    if utils.is_main():  # the others have the same files
        check_names(args, classes, gene)
    model = build_model(args, kind, num_classes, gene).to(device)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError) as error:
            raise InputError(f"--grad-checkpointing: {args.model} cannot recompute its activations") from error
    mixup, base_criterion = build_mixup(args, num_classes)
    optimizer, scheduler = build_optimizer(args, model)
    run = Run(
        args=args,
        kind=kind,
        output_dir=output_dir,
        device=device,
        autocast=autocast,
        train_loader=train_loader,
        test_loader=test_loader,
        classes=classes,
        model=model,
        ema=build_ema(args, model),
        mixup=mixup,
        teacher=build_teaching(args, train_loader.dataset, num_classes, device),
        criterion=build_criterion(args, base_criterion),
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=half),
        epoch=args.start_epoch,
        facts=facts,
    )
    if args.resume:
        resume(run)
    run.set_learning_rate()
    if args.push_to_hub and run.epoch >= args.epochs > 0:
        raise InputError(f"--push-to-hub: nothing is left to train or upload, epoch {run.epoch} has been reached")
    if output_dir is not None and not args.eval:
        run.log = utils.EpochLog(output_dir, run.earlier, run.output, mirror=wandb_of(args))
    return run


def writable_folder(path: str | None) -> Path | None:
    """The output folder, made if need be; only the main process writes."""
    if path is None or not utils.is_main():
        return None
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # the second takes the place of the first, as every file of a run that is written again
            with models.written_whole(folder / ".writable") as unfinished:
                Path(unfinished).write_bytes(b"as the files of the run are")
        (folder / ".writable").unlink()
        return folder
    except OSError as error:
        raise InputError(f"--output-dir {path} cannot be written: {error.strerror}") from error


def wandb_of(args: argparse.Namespace) -> Callable[[dict, int], None]:
    """Where numbers go besides the files: nowhere, or to Weights & Biases."""
    if args.wandb is None:
        return lambda numbers, place: None
    try:
        import wandb
    except ImportError as error:
        raise InputError(f"--wandb needs the package wandb, which is not installed ({error})") from error
    try:  # a run that is continued is another run of the same group
        run = wandb.init(project=args.wandb, group=Path(args.output_dir).name, dir=args.output_dir, config=recipe(args))
    except wandb.Error as error:
        raise InputError(f"--wandb {args.wandb} cannot be used: {models.in_a_line(error)}") from error
    return lambda numbers, place: run.log(dict(numbers), step=place)


def resume(run: Run) -> None:
    """Continue from a checkpoint of this program or a published one; with --eval only the weights are taken."""
    path = models.fetch(run.args.resume, on_hub="checkpoint.pth")
    content = models.read_checkpoint(path)
    restore(run, path, content)
    if run.args.eval:
        return
    run.checkpoint = Path(path)
    try:
        if type(content["epoch"]) is not int or not -1 <= content["epoch"] < 10**6:
            raise InputError(f"epoch is {models.shown(content['epoch'])!r}")
        run.epoch = content["epoch"] + 1
        run.position = position_in(content, run)
        run.schedule_lag = schedule_lag_in(content)
        log = content["log"] if "log" in content else read_log(run.args.output_dir)
        run.earlier = [line for line in log if line["epoch"] < run.epoch]
        if not all(type(value) in (int, float) for line in run.earlier for value in (*line.values(), accuracy(line))):
            raise InputError("its log holds something else than numbers")
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
        raise InputError(f"--resume {path} does not say where it was ({models.in_a_line(error)})") from error


def read_log(folder: str | None) -> list[dict]:
    """The log that lies in the output folder; a published checkpoint has it beside itself, not in itself."""
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
        say(
            f"epoch {run.epoch} was begun by {processes} processes and is continued by {utils.world_size()}: no image "
            "is repeated or left out, but another process may see it"
        )
    own = (saved["loss"], saved["counted"]) if utils.is_main() else (0.0, 0.0)
    return Position(images // (run.args.batch_size * utils.world_size()), images, *map(float, own))


def schedule_lag_in(content: Mapping) -> int:
    """`Run.schedule_lag` of the run that wrote a checkpoint; before it was recorded, this program had none."""
    lag = content.get("schedule_lag", 1 if models.is_published(content) else 0)
    if type(lag) is not int or lag not in (0, 1):
        raise InputError(f"schedule_lag is {models.shown(lag)!r}, expected 0 or 1")
    return lag


def restore(run: Run, path: Path | str, content: Mapping, option: str = "--resume") -> None:
    """Take weights and, but for --eval, the state of optimiser, average and gradient scaler from a checkpoint.

    Args:
        option: what messages call it.
    """
    averaged = run.args.eval and run.args.model_ema
    source = f"{option} {path}" + " (model_ema)" * averaged
    no_average = "optimizer" in content and content.get("model_ema") is None
    if averaged and no_average:
        raise InputError(f"{option} {path} holds no model_ema: without --model-ema its own weights are evaluated")
    head_dim = run.model.arch.head_dim if isinstance(run.model, models.AuxNet) else 1  # which other models do not use
    with about(option):
        rename = models.published_names(content, path, head_dim)
        weights = rename(models.weights_of(content, path, "model_ema" if averaged else "model"))
    head = "head_weight" if isinstance(run.model, models.AuxNet) else f"{run.model.pretrained_cfg['classifier']}.weight"
    found, expected = (w[head].shape[:1] if head in w else () for w in (weights, run.model.state_dict()))
    if found and expected and found != expected:
        raise InputError(f"{source} has {found[0]} classes, the data {expected[0]}")
    utils.load_weights(run.model, weights, source)
    if difference := models.first_difference(
        models.class_names(path, content), names_known(run.args.data_set, run.classes)
    ):
        raise InputError(f"{source} was trained on other classes than the data have: {difference}")
    if run.args.eval:
        return
    if run.ema is not None and no_average:
        raise InputError(f"{source} holds no model_ema: --no-model-ema continues it")
    try:
        names = utils.parameter_names(run.optimizer, run.model)
        saved = {**content["optimizer"], "state": models.optimizer_state_of(content, path)}
        groups = [len(group["params"]) for group in saved["param_groups"]]
        if models.is_published(content):
            state = models.published_moments(saved["state"], models.weights_of(content, path), rename, names)
            saved = {"state": state, "param_groups": [{} for _ in run.optimizer.param_groups]}
        elif groups != [len(group["params"]) for group in run.optimizer.param_groups]:
            raise InputError("its optimizer has other groups of parameters")
        load_state(run.optimizer, saved, names, sample_of(run.args, run.optimizer))
        if run.ema is not None:
            average = rename(models.weights_of(content, path, "model_ema"))
            utils.load_weights(run.ema.module, average, f"{source} (model_ema)")
        if run.scaler.is_enabled() and content["scaler"]:  # empty after float32 or bfloat16
            run.scaler.load_state_dict(content["scaler"])
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise InputError(
            f"{source} holds no training state that fits these options ({models.in_a_line(error)}): "
            "--finetune takes weights alone"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(run: Run) -> int:
    """Train to the last epoch, and write what section 'What a run writes' of the README lists after evaluations.

    Returns:
        The exit status: 0, or 128 + the number of the signal that asked the run to stop.
    """
    args = run.args
    initialised = run.kind == "descend" or args.init or args.finetune
    for doubt in doubts(args, run.scheduler) if utils.is_main() and run.epoch < args.epochs else ():
        print(f"warning: {doubt}", file=sys.stderr, flush=True)
    begin_writing(run)
    with utils.StopSignals() as signals:
        try:
            if run.epoch == 0 and run.position.images == 0 and (initialised or args.epochs == 0):
                finish_epoch(run, -1, {}, signals)  # what the initialisation alone gives
            train_epochs(run, signals)
        except utils.Stopped as stopped:
            return stop(run, stopped)
        finally:
            run.progress.close()
            run.train_loader.close()
            if run.log is not None:
                run.log.close()
            if isinstance(run.teacher, TeacherCache):
                run.teacher.flush()
    return 0


def stop(run: Run, stopped: utils.Stopped) -> int:
    """Write what was trained, and return the exit status of a run that was asked to stop."""
    args, where = run.args, f"in epoch {run.epoch} after {run.position.steps} steps"
    if not stopped.together and not utils.all_are_at(where):
        # the others wait for this process, or do not answer: none of them can go on
        last = f"{run.checkpoint} is the last checkpoint" if run.checkpoint else "there is no checkpoint"
        if utils.first_to_fail():
            print(f"stopped by {stopped}, {where}, while waiting for data: not saved, {last}", file=sys.stderr)
        utils.leave_at_once(stopped.status)
    write_checkpoint(run)
    written = run.checkpoint is not None and str(run.checkpoint) not in run.output.failed
    kept = "--resume auto continues" if written else "it could not be saved"
    kept = kept if args.output_dir else "nothing is kept without --output-dir"
    say(f"stopped by {stopped}, {where}: {kept}")
    return stopped.status


def begin_writing(run: Run) -> None:
    args = run.args
    if run.log is not None:
        models.remove_unfinished(run.output_dir)
        models.remove_unfinished(run.output_dir / models.AVERAGED_FOLDER)
        with run.output.attempt(run.output_dir / "args.yaml"), models.written_whole(run.output_dir / "args.yaml") as to:
            Path(to).write_text(yaml.safe_dump(options_file(args)))
        run.log.begin(round(1000 * run.epochs_done))
    if run.log is not None and run.checkpoint is not None:  # what the killed or full disk has cut off
        keep_best(run)
        if run.epoch >= args.epochs > 0:
            with run.output.attempt("what was trained"):
                write_weights(run)
    if run.epoch >= args.epochs > 0:
        say(f"nothing left to train: epoch {run.epoch} of --epochs {args.epochs} has been reached")
    run.progress = utils.Progress(args.epochs * run.steps, "training", run.steps_done)


def train_epochs(run: Run, signals: utils.StopSignals) -> None:
    args, model = run.args, run.model
    if utils.world_size() > 1:
        model = DistributedDataParallel(model, device_ids=[run.device] if run.device.type == "cuda" else None)
    if args.compile:
        model = torch.compile(model)
    saving = Saving(run, signals)
    while run.epoch < args.epochs:
        run.set_learning_rate()
        run.train_loader.sampler.set_position(run.epoch, run.position.images)
        if isinstance(run.teacher, TeacherCache):
            run.teacher.set_position(run.epoch, run.position.images)
        try:
            trained = train_one_epoch(
                model,
                run.criterion,
                run.train_loader,
                run.optimizer,
                run.device,
                run.epoch,
                scaler=run.scaler,
                autocast=run.autocast,
                teacher=run.teacher,
                mixup=run.mixup,
                clip_grad=args.clip_grad,
                accum_iter=args.accum_iter,
                ema=run.ema,
                ema_source=run.model,
                seed=args.seed,
                log_interval=args.log_interval,
                skip_nan=args.on_nan == "skip",
                position=run.position,
                after_step=saving.after_step,
                report=partial(report, run),
            )
            if (run.epoch + 1) % args.eval_interval and run.epoch + 1 < args.epochs:
                run.epoch, run.position = run.epoch + 1, Position()  # and nothing else, so that short epochs stay short
                continue
            finish_epoch(run, run.epoch, {f"train_{name}": value for name, value in trained.items()}, signals)
            saving.save()
        except NotFiniteError as error:
            roll_back(run, error)


class Saving:
    """When a checkpoint is written, besides after every evaluation."""

    def __init__(self, run: Run, signals: utils.StopSignals):
        self.run, self.signals = run, signals
        self.steps, self.time = run.steps_done, time.monotonic()

    def after_step(self) -> None:
        """Save if it is time to, and stop if that was asked for."""
        args, steps = self.run.args, self.run.steps_done - self.steps
        late = args.save_every_minutes is not None and time.monotonic() - self.time > 60 * args.save_every_minutes
        number, late = utils.maximum(self.signals.noted, late)
        if number:
            raise utils.Stopped(int(number))
        if late or (args.save_every_steps and steps >= args.save_every_steps):
            self.save()

    def save(self) -> None:
        write_checkpoint(self.run)
        self.steps, self.time = self.run.steps_done, time.monotonic()


def report(run: Run, numbers: dict[str, float]) -> None:
    """What the engine has seen since the last time, for people to look at."""
    run.progress.advance(run.steps_done - run.progress.done)
    run.progress.show({"epoch": run.epoch, **numbers})
    if run.log is not None:
        on_device = run.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(run.device) if on_device else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        run.log.show({**{f"step/{name}": value for name, value in numbers.items()}, "memory": memory}, run.epochs_done)


def finish_epoch(run: Run, epoch: int, numbers: dict[str, float], signals: utils.StopSignals) -> None:
    """Evaluate, log, and write the weights. Epoch −1 is before training."""
    numbers |= {f"test_{name}": value for name, value in evaluate_run(run, run.model, signals.check).items()}
    if not math.isfinite(numbers["test_loss"]):
        raise not_finite(f"the test loss is {numbers['test_loss']} after epoch {epoch}", run.optimizer)
    replaced, left_out = (loader.skipped for loader in (run.train_loader, run.test_loader))
    replaced, left_out = utils.sum_over_processes(torch.tensor([replaced, left_out])).tolist()
    if run.ema is not None and epoch >= 0:
        average = evaluate_run(run, run.ema.module, signals.check)
        numbers |= {f"ema_test_{name}": value for name, value in average.items()}
    shown = ", ".join(f"{name} {numbers[name]:.2f} %" for name in ("test_acc1", "ema_test_acc1") if name in numbers)
    shown += f", unreadable images: {replaced} replaced, {left_out} left out of the test" * (replaced + left_out > 0)
    run.train_loader.skipped = run.test_loader.skipped = 0
    check_state(run)
    say(f"{f'epoch {epoch}' if epoch >= 0 else 'before training'}: {shown}")
    run.epoch, run.position = epoch + 1, Position()
    if run.log is None:
        return
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    with run.output.attempt("what was trained"):
        write_weights(run)
    run.log.add({**numbers, "epoch": epoch, "n_parameters": parameters})
    if isinstance(run.model, models.LeTs):
        run.log.show(run.model.coefficients(), epoch + 1)


def roll_back(run: Run, error: NotFiniteError) -> None:
    """Go on with the weights of the newest checkpoint, after the batches that led to ``error``.

    Raises:
        NotFiniteError: ``error``, where --on-nan does not ask for that or it does not help.
    """
    path, again = utils.from_main((run.checkpoint, run.rollbacks < ROLLBACKS))
    if run.args.on_nan != "rollback" or path is None or not again:
        raise error
    run.rollbacks += 1
    content = models.read_checkpoint(path)
    if utils.from_main((content["epoch"], content["position"])) != (content["epoch"], content["position"]):
        raise InputError(f"process {utils.rank()} finds another checkpoint in {path} than process 0")
    restore(run, path, content, "--on-nan rollback to")
    say(f"{error}; back to the weights of {path}, and on with the next batch of epoch {run.epoch}")


def evaluate_run(run: Run, model: nn.Module, after_batch: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Accuracy on the test images; the weights of an Aux-Net are expanded once for all of them.

    Where descendants are trained without their Aux-Net, it is that of the largest of them.
    """
    utils.share_buffers(model)
    if isinstance(model, models.LeTs) and model.alone:
        model = models.Learngene.of(model).descend(model.descendants[-1]).eval()
    elif isinstance(model, models.AuxNet):
        model = model.to_vit()
    if run.args.model_ema_force_cpu and run.device.type != "cpu" and model is not run.model:
        model = copy.deepcopy(model).to(run.device)  # the average stays where it is
    with utils.Progress(len(run.test_loader), "evaluating") as progress:

        def advance() -> None:
            progress.advance()
            after_batch()

        return evaluate(model, run.test_loader, run.device, run.autocast, advance)


def accuracy(epoch: Mapping[str, float]) -> float:
    return epoch["test_acc1"]


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
        "args": options_in_effect(run.args),
    }
    if run.ema is not None:
        content["model_ema"] = run.ema.module.state_dict()
    if isinstance(run.model, models.AuxNet):
        content["learngene"] = models.Learngene.of(run.model, recipe(run.args)).header
    if names := names_known(run.args.data_set, run.classes):
        content["classes"] = names
    path = run.output_dir / "checkpoint.pth"
    continues = run.checkpoint is not None and run.checkpoint.parent == run.output_dir
    with run.output.attempt(path):
        # what an earlier run has left is no older checkpoint of this one, to fall back to
        utils.save_checkpoint(path, content, run.args.keep_checkpoints if continues else 0)
        run.checkpoint, run.rollbacks = path, 0
    if str(path) not in run.output.failed:
        keep_best(run)


def check_state(run: Run) -> None:
    """Raises NotFiniteError, on all processes together, if anything that a checkpoint would hold is not finite."""
    tensors = [*run.model.state_dict().values(), *(run.ema.module.state_dict().values() if run.ema else ())]
    tensors += tensors_in(run.optimizer.state_dict()["state"])
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    finite = all(bool(tensor.isfinite().all()) for tensor in floating)
    if utils.maximum(not finite)[0]:
        finding = f"weights or their averages are not finite in epoch {run.epoch} after step {run.position.steps}"
        raise not_finite(finding, run.optimizer)


def keep_best(run: Run) -> None:
    """Give the newest checkpoint a second name if it is that of the epoch with the highest accuracy."""
    epochs = [epoch for epoch in run.log.epochs if epoch["epoch"] >= 0]
    best = max(epochs, key=accuracy, default=None)
    if run.position.images == 0 and best is not None and best["epoch"] == run.epoch - 1:
        with run.output.attempt(run.output_dir / "best_checkpoint.pth"):
            utils.link(run.checkpoint, run.output_dir / "best_checkpoint.pth")


def write_weights(run: Run) -> None:
    """Stage 1: the learngene files. Else: the model, and its average, in timm's own format."""
    if isinstance(run.model, models.AuxNet):
        options, names = recipe(run.args), names_known(run.args.data_set, run.classes)
        models.Learngene.of(run.model, options, classes=names).save(run.output_dir / "learngene.safetensors")
        if run.ema is not None:
            models.Learngene.of(run.ema.module, options, averaged=True, classes=names).save(
                run.output_dir / "learngene_ema.safetensors"
            )
        else:  # an earlier run's average would pass for that of this learngene
            (run.output_dir / "learngene_ema.safetensors").unlink(missing_ok=True)
        return
    write_model(run, run.model, run.output_dir)
    averaged, beside = run.output_dir / models.AVERAGED_FOLDER, run.output_dir / "model_ema.safetensors"
    if run.ema is not None:
        averaged.mkdir(exist_ok=True)
        write_model(run, run.ema.module, averaged)
        utils.link(averaged / "model.safetensors", beside)
    else:  # an earlier run's average would pass for that of this model
        for path in (beside, averaged / "model.safetensors", averaged / "config.json"):
            path.unlink(missing_ok=True)


def write_model(run: Run, model: nn.Module, folder: Path) -> None:
    """A folder that timm reads: ``model``, which is that of the run or its average."""
    name, size = run.args.des_arch or run.args.model, run.args.input_size
    small = DATA_SETS[run.args.data_set][2] is not None and size <= SMALL  # small images are used whole
    models.save_model(
        model,
        folder,
        replace(models.parse_arch(name), img_size=size) if models.follows_grammar(name) else name,
        model_args={"img_size": size} if not models.follows_grammar(name) and wants_size(name) else {},
        data_config={
            "input_size": [CHANNELS, size, size],
            "crop_pct": 1.0 if small else run.args.eval_crop_ratio,
            "crop_mode": "squash" if small else "center",
            "interpolation": "bicubic",  # of every evaluation here, whatever timm records for the architecture
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
        },
        label_names=run.classes,
        label_descriptions=describe_classes(run.classes),
    )


# ---------------------------------------------------------------------------------------------------------------------
# From and to other machines
# ---------------------------------------------------------------------------------------------------------------------


def fetch_addresses(args: argparse.Namespace) -> None:
    """Download what options name by address, once per machine, after the options are known to fit each other."""
    check_kind(args)
    gene = "learngene_ema.safetensors" if args.gene_ema else "learngene.safetensors"
    sources = {  # option → address, and the file of a Hub repository that is meant
        "--load-gene": (args.load_gene, gene),
        "--finetune": (args.finetune, gene if models.is_aux_name(args.model or "") else "model.safetensors"),
        "--resume": (args.resume, "checkpoint.pth"),
        "--init-path": (args.init_path, "model.safetensors"),
        "--src-path": (args.src_path, "model.safetensors"),
        "--teacher-path": (args.teacher_path, "model.safetensors"),
    }
    for option, (source, name) in sources.items():
        if source and is_address(source) and utils.local_rank() == 0:
            with about(option):
                models.fetch(source, on_hub=name)


def fetch_data(args: argparse.Namespace) -> None:
    """Download the data set, once per machine, if that is asked for and it is not there."""
    if args.download and utils.local_rank() == 0:
        download(args.data_set, args.data_path, splits_needed(args))


def check_upload(args: argparse.Namespace) -> None:
    """Raises InputError where --push-to-hub cannot succeed."""
    if args.push_to_hub is None:
        return
    if args.output_dir is None or args.eval:
        found = "--eval writes nothing" if args.eval else "--output-dir is missing"
        raise InputError(f"--push-to-hub uploads what a run writes into --output-dir: {found}")
    if utils.is_main():
        with about("--push-to-hub"):
            models.check_upload(args.push_to_hub)


def facts_of(args: argparse.Namespace, gene: models.Learngene | None) -> dict[str, object]:
    """Where the weights of a run come from, for its model card."""
    if args.src_arch:
        start = f"{public(args.src_path)}{', frozen' * args.freeze_src}" if args.src_path else "timm's initialisation"
        return {"learngene": args.src_arch, "Aux-Net": args.tgt_arch, "learngene starts from": start}
    facts = {"architecture": args.des_arch or args.model, "finetuned from": args.finetune and public(args.finetune)}
    if args.init:
        facts["initialised by"] = f"{args.init}, from {public(args.init_path)}"
    if gene is not None:
        facts |= {
            "learngene": gene,
            "its file": public(args.load_gene),
            "width selection": args.width_select,
        }
        if gene.method == "lets":
            with about(des_option(args)):
                depth = models.parse_arch(args.des_arch or args.model).depth
                lists = args.mapping_layer, args.mapping_layer_coeff, args.depth_select
                mapping = models.mapping_or_default(gene.config, depth, *lists)
            facts |= dict(zip(("mapping_layer", "mapping_layer_coeff"), mapping, strict=True))
    return {name: str(value) for name, value in facts.items() if value is not None}


def public(source: str) -> str:
    """An address without passwords and signatures, or the name of a file without the folders of this machine."""
    parts = urlsplit(source)
    if parts.scheme in ("http", "https"):
        return f"{parts.scheme}://{parts.hostname}{parts.path}"
    return source if is_address(source) else Path(source).name


def is_address(source: str) -> bool:
    return source.startswith(("http://", "https://", "hf-hub:"))


def push(run: Run) -> None:
    """Upload the output folder with a card."""
    args = run.args
    source = f"hf-hub:{args.push_to_hub}"
    if isinstance(run.model, models.AuxNet):
        usage = f'import models\n\ngene = models.load_learngene("{source}")'
    else:
        usage = f'import timm\n\nmodel = timm.create_model("{source}", pretrained=True)'
    facts = {**run.facts, "data": f"{args.data_set}, {len(run.classes)} classes, {args.input_size} pixels"}
    if args.train_images:
        facts["training images"] = f"{args.train_images:,}"
    if args.holdout:
        facts["test images"] = f"{args.holdout:,} training images that were held out"
    teacher = f"{args.teacher_model}, {args.distillation_type} distillation"
    facts["teacher"] = teacher if args.distillation_type != "none" else "none"
    facts["parameters"] = f"{sum(p.numel() for p in run.model.parameters()):,}"
    folder = run.output_dir
    if args.push_ema:  # a repository of its own, as timm takes model.safetensors and nothing else
        folder = folder / models.AVERAGED_FOLDER
        facts["weights"] = f"exponential moving average over the steps of training, decay {args.model_ema_decay:g}"
        utils.link(run.output_dir / "log.txt", folder / "log.txt")
    card = models.model_card(args.push_to_hub.partition("/")[2], facts, run.log.epochs, recipe(args), usage)
    with models.written_whole(folder / "README.md") as unfinished:
        Path(unfinished).write_text(card, encoding="utf-8", errors="backslashreplace")
    files = ["README.md", "log.txt"]
    if isinstance(run.model, models.AuxNet):
        files += ["learngene.safetensors"] + ["learngene_ema.safetensors"] * (run.ema is not None)
    else:
        files += ["model.safetensors", "config.json"]
    with about("--push-to-hub"):
        say(f"uploaded: {models.upload(folder, files, args.push_to_hub)}")


# ---------------------------------------------------------------------------------------------------------------------
# From the command line to the exit status
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Do what the command line ``argv`` says, and return the exit status."""
    args, mistake = None, None
    try:
        args = parse_options(argv)
    except InputError as error:
        mistake = error  # of all processes, to be said once
    try:
        utils.init_distributed(timedelta(minutes=args.dist_timeout if args else 1))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    with utils.failures_reported_once():
        with utils.errors_reported_once(patience=DOWNLOADING):
            if mistake:
                raise mistake
            find_checkpoint(args)
            fetch_addresses(args)
            fetch_data(args)
        args.resume = utils.from_main(args.resume)
        with utils.errors_reported_once(patience=SETTING_UP):  # the others find what the first has fetched
            run = set_up(args)
        say(f"{run.kind}: {describe(run.model)}, on {run.device}, {utils.world_size()} process(es)")
        status = evaluate_only(run) if run.args.eval else train(run)
        with utils.errors_reported_once(patience=DOWNLOADING):
            finish(run, status)
        utils.leave_together()
    return status


def evaluate_only(run: Run) -> int:
    if run.args.model_ema:
        say(f"the averaged weights of {run.args.resume} are evaluated")
    numbers = evaluate_run(run, run.model)
    say(json.dumps({f"test_{name}": value for name, value in numbers.items()}))
    return 0


def finish(run: Run, status: int) -> None:
    """Upload what was trained, if that was asked for.

    Raises:
        InputError: files of the last epoch could not be written.
    """
    if run.output.failed and status == 0:
        what, why = next(iter(run.output.failed.items()))
        raise InputError(f"--output-dir {run.output_dir} lacks what was trained last: {what} ({why})")
    if run.args.push_to_hub and utils.is_main() and status == 0:
        push(run)


def find_checkpoint(args: argparse.Namespace) -> None:
    """Put the newest whole checkpoint of the output folder, or none, in the place of --resume auto."""
    if args.resume == "auto" and args.output_dir is None:
        raise InputError("--output-dir is missing: --resume auto continues from the checkpoints in it")
    if args.resume == "auto" and utils.is_main():
        path = utils.newest_checkpoint(Path(args.output_dir))
        if path is None and args.eval:
            raise InputError(f"--resume auto finds no checkpoint in --output-dir {args.output_dir} to evaluate")
        args.resume = str(path) if path else None
        print(f"continuing from {path}" if path else f"no checkpoint in {args.output_dir}: starting afresh", flush=True)


def describe(model: nn.Module) -> str:
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters"
