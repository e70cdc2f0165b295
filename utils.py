"""Distributed set-up, checkpoints and logging."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from models import InputError, written_whole

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Distributed set-up
# ---------------------------------------------------------------------------------------------------------------------


def init_distributed() -> None:
    """Join the process group that a launcher (torchrun, torch.distributed.launch) describes in the environment."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= world_size()
    return value


def share_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first: batch norm's statistics are of each process's own images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def leave_together() -> None:
    """End the process group when all processes have come here: with older torch, one that is left alone can hang."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def errors_reported_once() -> Iterator[None]:
    """An InputError on any process ends all of them with status 2, said once, by the first that met it.

    Every process has to pass here, and nothing inside may wait for another process.
    """
    if dist.is_initialized():
        # a group with more patience than that of training: one process may be downloading for the others
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    message = None
    try:
        yield
    except InputError as error:
        message = str(error)
    messages = [message]
    if dist.is_initialized():
        messages = [None] * world_size()
        dist.all_gather_object(messages, message, group=group)
    failed = [r for r, m in enumerate(messages) if m is not None]
    if failed:
        if rank() == failed[0]:
            print(f"error: {message}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            dist.barrier()  # the launcher ends everybody as soon as one process is gone: not before it is said
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, content: dict) -> None:
    """Write tensors and plain data, whole or not at all."""
    with written_whole(path) as unfinished:
        torch.save(content, unfinished)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """``model.load_state_dict``, strictly.

    Raises:
        InputError: names or shapes differ; the message gives the first difference.
    """
    expected = model.state_dict()
    for name in [*expected, *weights]:
        ours = tuple(expected[name].shape) if name in expected else "nothing"
        theirs = tuple(weights[name].shape) if isinstance(weights.get(name), Tensor) else "nothing"
        if ours != theirs:
            raise InputError(f"{source} is of another architecture: {name} has {theirs}, this model {ours}")
    model.load_state_dict(weights)


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of the optimiser's parameters in the order in which its state dict numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping, names: list[str]) -> None:
    """Take over an optimiser's ``state``; learning rate, decay and the like stay those of the options.

    Args:
        names: of the parameters, in the order of their numbers.

    Raises:
        InputError: the state is not that of these parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    needed = (
        {"exp_avg", "exp_avg_sq", "step"} if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) else set()
    )
    for number, values in state.items():
        if missing := needed - values.keys():
            raise InputError(f"its optimizer has no {min(missing)} of {names[number]}")
        for name in values.keys() & {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "step"}:
            value = values[name]
            shape = () if name == "step" else parameters[number].shape
            if not isinstance(value, Tensor) or value.shape != shape or not value.sum().isfinite():
                raise InputError(f"its optimizer's {name} of {names[number]} is not that of this model")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ---------------------------------------------------------------------------------------------------------------------
# Logging
# ---------------------------------------------------------------------------------------------------------------------


class Progress:
    """How far a long step is and the time it has left: a bar on a terminal, lines elsewhere; main process only."""

    def __init__(self, total: int, title: str, initial: int = 0):
        self.title, self.total, self.initial, self.done = title, total, initial, initial
        self.start = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            desc=title,
            initial=initial,
            disable=not (self.terminal and is_main()),
            leave=False,
            dynamic_ncols=True,
        )

    def advance(self) -> None:
        self.done += 1
        self.bar.update()

    def show(self, **numbers: float) -> None:
        """Numbers to stand beside the bar, or in the line that is printed now."""
        shown = {name: f"{value:.4g}" for name, value in numbers.items()}
        self.bar.set_postfix(shown, refresh=False)
        if is_main() and not self.terminal:
            seconds = (time.monotonic() - self.start) / (self.done - self.initial)
            left = tqdm.format_interval(seconds * (self.total - self.done))
            line = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"{self.title} {self.done}/{self.total}, {line}, {left} left", flush=True)

    def close(self) -> None:
        self.bar.close()


class EpochLog:
    """``log.txt``, one JSON object per epoch, and the same numbers as TensorBoard events and ``curves.png``."""

    def __init__(self, folder: Path, start_epoch: int):
        """Raises InputError if ``log.txt`` of the run that is continued cannot be read; writes nothing yet."""
        self.path, self.curves, self.start_epoch = folder / "log.txt", folder / "curves.png", start_epoch
        try:
            lines = self.path.read_text().splitlines() if start_epoch > 0 and self.path.is_file() else []
            self.epochs = [line for line in map(json.loads, lines) if line["epoch"] < start_epoch]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{self.path} cannot be continued ({error}): expected a JSON object per line") from error

    def begin(self) -> None:
        """Keep the epochs before the first one of this run, and nothing else of an earlier run."""
        from torch.utils.tensorboard import SummaryWriter

        self._write()
        self.events = SummaryWriter(str(self.path.parent), purge_step=self.start_epoch)

    def add(self, numbers: dict) -> None:
        self.epochs.append(numbers)
        self._write()
        for name, value in numbers.items():
            self.events.add_scalar(name, value, numbers["epoch"])
        self.events.flush()

    def close(self) -> None:
        self.events.close()
        self._draw()

    def _write(self) -> None:
        with written_whole(self.path) as unfinished:
            Path(unfinished).write_text("".join(json.dumps(line) + "\n" for line in self.epochs))

    def _draw(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.5), layout="constrained")
        for axes, quantity, unit in zip(figure.subplots(1, 2), ("loss", "acc1"), ("loss", "accuracy, %"), strict=True):
            for name in sorted({name for line in self.epochs for name in line if name.endswith(quantity)}):
                points = [(line["epoch"] + 1, line[name]) for line in self.epochs if name in line]
                axes.plot(*zip(*points, strict=True), label=name.removesuffix("_" + quantity), marker=".")
            axes.set(xlabel="epoch", ylabel=unit)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        with written_whole(self.curves) as unfinished:
            figure.savefig(unfinished, format="png", dpi=120)
