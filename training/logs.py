"""Logs of a run: progress, ``log.txt``, TensorBoard events, ``curves.png``."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import one_line
from common.files import atomic_write
from common.workers import worker_error_behind
from utils import is_main

from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Output:
    """Writes the files of a run: one that fails, on a full disk say, gives a warning, and the run goes on.

    Attributes:
        failed: what could not be written when it was last tried, and why.
    """

    def __init__(self):
        self.failed: dict[str, str] = {}
        self.warned: set[str] = set()

    @contextmanager
    def attempt(self, what: object) -> Iterator[None]:
        try:
            yield
            self.failed.pop(str(what), None)
        except OSError as error:
            if worker_error_behind(error):
                raise
            self.failed[str(what)] = error.strerror or str(error)
            self._warn(what, self.failed[str(what)])

    @contextmanager
    def attempt_extra(self, what: str) -> Iterator[None]:
        """The same for files that only show numbers: no error of their libraries ends a run."""
        try:
            yield
        except Exception as error:
            if worker_error_behind(error):
                raise
            reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {one_line(error)}"
            if what not in self.warned:
                self._warn(what, reason[:300])
            self.warned.add(what)

    def _warn(self, what: object, reason: str) -> None:
        tqdm.write(
            f"warning: {what} cannot be written ({reason}): the run goes on, what was written before is kept",
            file=sys.stderr,
        )


class Progress:
    """Progress and remaining time of a long step: a bar on a terminal, lines elsewhere; main process only."""

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

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        self.bar.update(steps)

    def show(self, numbers: Mapping[str, float]) -> None:
        """Show numbers beside the bar, or print a line with them."""
        shown = {name: f"{value:.4g}" for name, value in numbers.items()}
        self.bar.set_postfix(shown)
        if is_main() and not self.terminal:
            seconds = (time.monotonic() - self.start) / (self.done - self.initial)
            left = tqdm.format_interval(seconds * (self.total - self.done))
            line = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"{self.title} {self.done}/{self.total}, {line}, {left} left", flush=True)

    def close(self) -> None:
        self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class EpochLog:
    """``log.txt``, one JSON object per epoch, and these and more numbers as TensorBoard events and ``curves.png``."""

    def __init__(self, folder: Path, epochs: list[dict], output: Output, mirror: Callable[[dict, int], None]):
        """
        Args:
            epochs: the lines of the epochs before the first one of this run; `add` appends to it.
            mirror: called with all numbers and the step, in thousandths of an epoch, as TensorBoard gets them.
        """
        self.folder, self.epochs, self.output, self.mirror = folder, epochs, output, mirror
        self.path, self.curves = folder / "log.txt", folder / "curves.png"
        self.events = None

    def begin(self, place: int) -> None:
        """Write the lines before this run, and drop TensorBoard events after ``place`` thousandths of an epoch."""
        self.place = place
        self._write()
        if self.epochs:
            self._draw()

    def add(self, numbers: dict) -> None:
        """Append the line of an epoch, and write all files."""
        self.epochs.append(numbers)
        self._write()
        self.show(numbers, numbers["epoch"] + 1)
        self._draw()

    def show(self, numbers: Mapping[str, float], epochs: float) -> None:
        """Send numbers to TensorBoard and the mirror alone, after so many ``epochs``."""
        self.mirror(numbers, round(1000 * epochs))
        with self.output.attempt_extra("TensorBoard's events"):
            try:
                if self.events is None:
                    from torch.utils.tensorboard import SummaryWriter  # seconds that other runs need not wait for

                    self.events = SummaryWriter(str(self.folder), purge_step=self.place + 1)
                for name, value in numbers.items():
                    self.events.add_scalar(name, value, round(1000 * epochs))
                self.events.flush()
            except Exception:
                self.events, self.place = None, round(1000 * epochs)  # another file for what comes after
                raise

    def close(self) -> None:
        if self.events is not None:
            with self.output.attempt_extra("TensorBoard's events"):
                self.events.close()

    def _write(self) -> None:
        with self.output.attempt(self.path), atomic_write(self.path) as unfinished:
            Path(unfinished).write_text("".join(json.dumps(line) + "\n" for line in self.epochs))

    def _draw(self) -> None:
        with self.output.attempt_extra(str(self.curves)), atomic_write(self.curves) as unfinished:
            self._figure().savefig(unfinished, format="png", dpi=120)

    def _figure(self) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.5), layout="constrained")
        for axes, quantity, unit in zip(figure.subplots(1, 2), ("loss", "acc1"), ("loss", "accuracy, %"), strict=True):
            for name in sorted({name for line in self.epochs for name in line if name.endswith(quantity)}):
                points = [(line["epoch"] + 1, line[name]) for line in self.epochs if name in line]
                axes.plot(*zip(*points, strict=True), label=name.removesuffix("_" + quantity), marker=".")
            axes.set(xlabel="epoch", ylabel=unit)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        return figure
