"""Data workers that are killed, interrupted or stopped, and the descriptors that tie them to the main process."""

import multiprocessing
import os
import signal
import socket
from multiprocessing.resource_sharer import DupFd

import utils
from common import workers
from common.errors import InputError
from common.files import atomic_write, read_checkpoint
from pipeline.loader import CheckedLoader, Sample, collate
from training.logs import Output

import pytest
import torch
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.zeros(1), index, [])


def batches_of(num_workers: int, persistent: bool = False) -> CheckedLoader:
    loader = DataLoader(Numbers(), 2, num_workers=num_workers, persistent_workers=persistent, collate_fn=collate)
    return CheckedLoader(loader, False, torch.device("cpu"))


KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "


def wrapped() -> Exception:
    """What is raised by a library that handles an error of a worker, and fails in turn."""
    try:
        try:
            raise RuntimeError(KILLED)
        except RuntimeError:
            raise OSError(28, "No space left on device")  # noqa: B904  so that it is the context alone
    except OSError as error:
        return error


@pytest.mark.parametrize("error", [RuntimeError(KILLED), wrapped()])
@pytest.mark.parametrize("attempt", ["attempt", "attempt_extra"])
def test_a_dead_worker_is_no_file_that_cannot_be_written(tmp_path, capfd, monkeypatch, attempt, error):
    """Torch raises that in the main process wherever it is, here where a plot is written."""
    left = []
    monkeypatch.setattr("utils.abort", left.append)
    output, path = Output(), tmp_path / "curves.png"
    with pytest.raises(type(error)), utils.failures_reported_once():  # noqa: SIM117
        with getattr(output, attempt)(str(path)), atomic_write(path):
            raise error
    assert (left, output.failed, list(tmp_path.iterdir())) == ([1], {}, [])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: no memory is left for the images, or a data worker was killed")


def test_a_dead_worker_is_no_checkpoint_that_does_not_fit(tmp_path, capfd, monkeypatch):
    left = []
    monkeypatch.setattr("utils.abort", left.append)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {}}, path)
    monkeypatch.setattr("torch.load", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError(KILLED)))
    with pytest.raises(InputError), utils.failures_reported_once():
        read_checkpoint(path)
    assert left == [1]
    assert capfd.readouterr().err.startswith("error: no memory is left for the images, or a data worker was killed")


@pytest.mark.parametrize("persistent", [False, True])
def test_no_signal_interrupts_the_start_of_workers(monkeypatch, persistent):
    """It ends the wait that follows, and so no hook of a fork meets an exception."""
    batches, started = batches_of(1, persistent), []
    start = multiprocessing.process.BaseProcess.start

    def signalled(process):
        signal.raise_signal(signal.SIGTERM)
        started.append(process)
        start(process)

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", signalled)
    with utils.StopSignals() as signals:
        with pytest.raises(utils.Stopped):
            next(iter(batches))
        assert (len(started), signals.noted) == (1, signal.SIGTERM)
    batches.close()


def test_a_signal_interrupts_the_wait_for_workers_that_stay(monkeypatch):
    batches = batches_of(1, persistent=True)
    with utils.StopSignals() as signals:
        assert len([*batches]) == 2
        waits = []
        monkeypatch.setattr(type(batches.loader._iterator), "_reset", lambda *args: waits.append(signals.waiting))
        iter(batches._start())
    batches.close()
    assert waits == [True]


def test_a_worker_that_only_exited_is_asked_for_the_signal(monkeypatch):
    """Torch 2.6 does not say what ended a worker that would leave a core dump."""
    batches = batches_of(1)

    def broken(iterator):
        (worker,) = iterator._workers
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        raise RuntimeError(f"DataLoader worker (pid(s) {worker.pid}) exited unexpectedly")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._next_data", broken)
    with pytest.raises(RuntimeError, match="is killed by signal: Killed"):
        next(iter(batches))


def test_the_signal_is_known_some_time_after_the_files_of_a_worker_are_closed(monkeypatch):
    """The kernel closes the files of a process first, among them the pipe that tells its end."""
    read, write = os.pipe()

    def work() -> None:
        os.closerange(3, read)
        os.closerange(read + 1, 1024)
        os.read(read, 1)
        os.kill(os.getpid(), signal.SIGBUS)

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    join = process.join
    monkeypatch.setattr(process, "join", lambda *args: (os.write(write, b"x"), join(*args)))
    with pytest.raises(RuntimeError, match="is killed by signal: Bus error"):
        workers.raise_exit_reason([process])
    os.close(read)
    os.close(write)


def test_a_worker_whose_main_process_stops_receiving_is_silent(capfd):
    """A broken connection to the thread from which the main process takes tensors ends without a traceback."""
    batches = batches_of(1)
    batches.exit_pipe.open()

    def work() -> None:
        batches.exit_pipe.init_worker(0)
        shared = DupFd(0)
        with socket.socket(socket.AF_UNIX) as broken:
            broken.connect(shared._id[0])
        os.close(shared.detach())  # which that thread serves after the broken connection

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    batches.close()
    assert (process.exitcode, capfd.readouterr().err) == (0, "")


def test_an_exit_pipe_without_workers_opens_nothing(monkeypatch):
    monkeypatch.setattr("os.pipe", lambda: pytest.fail("a pipe is opened"))
    monkeypatch.setattr("common.workers.use_short_socket_folder", lambda: pytest.fail("TMPDIR is looked at"))
    assert len([*batches_of(0)]) == 2


def test_an_exit_pipe_closes_its_descriptors_once(monkeypatch):
    monkeypatch.setattr("common.workers._exit_pipes", set())
    exit_pipe = batches_of(1).exit_pipe
    exit_pipe.open()
    number = exit_pipe.write
    workers.close_exit_pipes()
    assert os.dup2(0, number) == number  # a file that is opened later
    exit_pipe.close()
    os.close(number)
