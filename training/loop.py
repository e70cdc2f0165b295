"""The loop of a run: train, evaluate, log, save, stop, roll back."""

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import models
import utils
from common.devices import CPU, peak_memory
from common.errors import InputError
from common.files import atomic_write, read_checkpoint, remove_unfinished
from engine import Position, evaluate, not_finite, train_one_epoch
from models.compiled import compiled_for_training, vits_of
from models.formats.timm_folder import AVERAGED_FOLDER
from models.vit import FORWARD_AND_BACKWARD
from training.build import doubtful_options
from training.checkpoints import check_state, keep_best, restore, write_checkpoint
from training.config import options_file
from training.logs import Progress
from training.outputs import write_weights
from training.probe import fit_head
from training.run import Run
from training.teacher import TeacherCache
from utils import NotFiniteError, print_main

import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROLLBACKS = 3  # between two checkpoints; more do not help


def train(run: Run) -> int:
    """Train to the last epoch, and write the files of the run after each evaluation.

    Returns:
        The exit status: 0, or 128 + the number of the signal that stopped the run.
    """
    config = run.config
    initialised = config.model.load_gene or config.model.init or config.model.finetune
    if utils.is_main() and run.epoch < config.schedule.epochs:
        for warning in doubtful_options(config.optim, config.schedule, config.data.batch_size, run.scheduler):
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    begin_writing(run)
    with utils.StopSignals() as signals:
        try:
            if run.epoch == 0 and run.position.images == 0 and (initialised or config.schedule.epochs == 0):
                finish_epoch(run, -1, {}, signals)  # accuracy of the initialisation
            with compiled_for_training(run.trained) if run.config.runtime.compile else nullcontext():
                train_epochs(run, signals)
            say_cost(run)
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


def say_cost(run: Run) -> None:
    """Print what stage 1 of many sizes took, and what they would take one by one."""
    if run.supernet is None or run.epoch == 0:
        return
    macs, sizes = run.macs_of_epochs(), run.supernet.sampler.macs
    images = run.epoch * run.steps * run.config.data.batch_size * utils.world_size()
    alone = FORWARD_AND_BACKWARD * images * sum(sizes.values())
    print_main(
        f"{len(sizes)} sizes took {macs:.3g} MACs, {macs / alone:.2f} of what they take when each is trained alone for "
        f"{run.epoch} epoch{'s' * (run.epoch != 1)}, without those of a teacher"
    )


def stop(run: Run, stopped: utils.Stopped) -> int:
    """Write a checkpoint after a signal, and return the exit status."""
    where = f"in epoch {run.epoch} after {run.position.steps} steps"
    if not stopped.together and not utils.all_processes_reach(where):
        # the others wait for this process, or do not answer: none of them can continue
        last = f"{run.checkpoint} is the last checkpoint" if run.checkpoint else "there is no checkpoint"
        if utils.is_first_failure():
            print(f"stopped by {stopped}, {where}, while waiting for data: not saved, {last}", file=sys.stderr)
        utils.abort(stopped.status)
    write_checkpoint(run)
    written = run.checkpoint is not None and str(run.checkpoint) not in run.output.failed
    kept = "--resume auto continues" if written else "it could not be saved"
    kept = kept if run.config.output.output_dir else "nothing is kept without --output-dir"
    print_main(f"stopped by {stopped}, {where}: {kept}")
    return stopped.status


def begin_writing(run: Run) -> None:
    """Write args.yaml and the log of the epochs before, and what an interruption or a full disk has cut off."""
    epochs = run.config.schedule.epochs
    if run.log is not None:
        remove_unfinished(run.output_dir)
        remove_unfinished(run.output_dir / AVERAGED_FOLDER)
        with run.output.attempt(run.output_dir / "args.yaml"), atomic_write(run.output_dir / "args.yaml") as to:
            Path(to).write_text(yaml.safe_dump(options_file(run.config)))
        run.log.begin(round(1000 * run.epochs_done))
    if run.log is not None and run.checkpoint is not None:  # what an interruption or a full disk has cut off
        keep_best(run)
        if run.epoch >= epochs > 0:
            with run.output.attempt("what was trained"):
                write_weights(run)
    if run.epoch >= epochs > 0:
        print_main(f"nothing left to train: epoch {run.epoch} of --epochs {epochs} has been reached")
    run.progress = Progress(epochs * run.steps, "training", run.steps_done)


def train_epochs(run: Run, signals: utils.StopSignals) -> None:
    config, model = run.config, run.trained
    if utils.world_size() > 1:
        model = DistributedDataParallel(model)
    if config.runtime.compile and not vits_of(run.trained):  # of a ViT, the blocks are compiled
        model = torch.compile(model)
    timer = CheckpointTimer(run, signals)
    while run.epoch < config.schedule.epochs:
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
                clip_grad=config.optim.clip_grad,
                accum_iter=config.optim.accum_iter,
                ema=run.ema,
                ema_source=run.model,
                seed=config.runtime.seed,
                log_interval=config.runtime.log_interval,
                skip_nan=config.runtime.on_nan == "skip",
                position=run.position,
                before_batch=partial(draw_sizes, run),
                after_step=timer.after_step,
                report=partial(report, run),
            )
            if (run.epoch + 1) % config.output.eval_interval and run.epoch + 1 < config.schedule.epochs:
                run.epoch, run.position = run.epoch + 1, Position()  # nothing else, so that short epochs stay short
                continue
            finish_epoch(run, run.epoch, {f"train_{name}": value for name, value in trained.items()}, signals)
            timer.save()
        except NotFiniteError as error:
            roll_back(run, error)


class CheckpointTimer:
    """Decides when a checkpoint is written, besides after every evaluation."""

    def __init__(self, run: Run, signals: utils.StopSignals):
        self.run, self.signals = run, signals
        self.steps, self.time = run.steps_done, time.monotonic()

    def after_step(self) -> None:
        """Write a checkpoint if it is time to, and stop if a signal has come."""
        output, steps = self.run.config.output, self.run.steps_done - self.steps
        late = output.save_every_minutes is not None and time.monotonic() - self.time > 60 * output.save_every_minutes
        number, late = utils.max_over_processes(self.signals.noted, late)
        if number:
            raise utils.Stopped(int(number))
        if late or (output.save_every_steps and steps >= output.save_every_steps):
            self.save()

    def save(self) -> None:
        write_checkpoint(self.run)
        self.steps, self.time = self.run.steps_done, time.monotonic()


def draw_sizes(run: Run, step: int) -> None:
    """Draw the sizes that the next batch trains, where descendants are trained."""
    if run.supernet is not None:
        run.supernet.drawn = run.sizes_of_step(run.epoch, step)


def report(run: Run, numbers: dict[str, float]) -> None:
    """Show and log the numbers of the last steps."""
    if run.supernet is not None:
        steps = range(max(0, run.position.steps - run.config.runtime.log_interval), run.position.steps)
        numbers |= {"MACs of a step": run.macs_of_steps(run.epoch, steps) / len(steps)}
    run.progress.advance(run.steps_done - run.progress.done)
    run.progress.show({"epoch": run.epoch, **numbers})
    if run.log is not None:
        shown, memory = {f"step/{name}": value for name, value in numbers.items()}, peak_memory(run.device)
        run.log.show(shown | ({} if memory is None else {"memory": memory}), run.epochs_done)


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
    if len(run.evaluated_members) > 1:
        smallest = evaluate_run(run, run.model, signals.check, run.evaluated_members[0])
        numbers |= {f"smallest_test_{name}": value for name, value in smallest.items()}
    shown = ", ".join(f"{name} {value:.2f} %" for name, value in numbers.items() if name.endswith("test_acc1"))
    shown += " (linear probe)" * (run.probe_loader is not None)
    shown += f", unreadable images: {replaced} replaced, {left_out} left out of the test" * (replaced + left_out > 0)
    run.train_loader.skipped = run.test_loader.skipped = 0
    check_state(run)
    print_main(f"{f'epoch {epoch}' if epoch >= 0 else 'before training'}: {shown}")
    run.epoch, run.position = epoch + 1, Position()
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    line = {**numbers, "epoch": epoch, "n_parameters": parameters}
    if run.supernet is not None and epoch >= 0:
        line["train_macs"] = run.macs_of_epochs()
    if run.log is None:
        run.epochs.append(line)
        return
    with run.output.attempt("what was trained"):
        write_weights(run)
    run.log.add(line)
    if isinstance(run.model, models.AuxNet) and (coefficients := run.model.coefficients()):
        run.log.show(coefficients, epoch + 1)


def roll_back(run: Run, error: NotFiniteError) -> None:
    """Continue with the weights of the newest checkpoint, after the batches that led to ``error``.

    Raises:
        NotFiniteError: ``error``, without --on-nan rollback, without a checkpoint, or after `ROLLBACKS` of them.
    """
    path, again = utils.broadcast_from_main((run.checkpoint, run.rollbacks < ROLLBACKS))
    if run.config.runtime.on_nan != "rollback" or path is None or not again:
        raise error
    run.rollbacks += 1
    content = read_checkpoint(path)
    if utils.broadcast_from_main((content["epoch"], content["position"])) != (content["epoch"], content["position"]):
        raise InputError(f"process {utils.rank()} finds another checkpoint in {path} than process 0")
    restore(run, path, content, "--on-nan rollback to")
    print_main(f"{error}; back to the weights of {path}, and on with the next batch of epoch {run.epoch}")


def evaluate_run(
    run: Run, model: nn.Module, after_batch: Callable[[], None] = lambda: None, member: models.ViTArch | None = None
) -> dict[str, float]:
    """Accuracy on the test images; the weights of an Aux-Net are expanded once for all of them.

    Args:
        member: the Des-Net of an Aux-Net to evaluate. Default: where descendants are trained without their Aux-Net, the
            largest of them; else the Aux-Net.
    """
    utils.broadcast_buffers(model)
    if run.evaluated_members:
        model = models.Learngene.of(model).descend(member or run.evaluated_members[-1]).eval()
    elif isinstance(model, models.AuxNet):
        model = model.to_vit()
    if run.config.optim.model_ema_force_cpu and run.device.type != CPU and model is not run.model:
        model = copy.deepcopy(model).to(run.device)  # the average stays where it is
    if run.probe_loader is not None:
        fit_head(model, run.probe_loader, len(run.classes), run.autocast)
    with Progress(len(run.test_loader), "evaluating") as progress:

        def advance() -> None:
            progress.advance()
            after_batch()

        return evaluate(model, run.test_loader, run.device, run.autocast, advance)


def evaluate_only(run: Run) -> None:
    """Evaluate the weights of the run, and print the numbers as JSON."""
    if run.config.optim.model_ema:
        print_main(f"the averaged weights of {run.config.runtime.resume} are evaluated")
    numbers = evaluate_run(run, run.model)
    print_main(json.dumps({f"test_{name}": value for name, value in numbers.items()}))
