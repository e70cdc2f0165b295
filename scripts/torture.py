#!/usr/bin/env python3
"""Kill training runs at random moments, continue each with --resume auto, and compare with runs left in peace.

scripts/torture.py --minutes 60
scripts/torture.py --kills 25 --processes 1

Each round trains a LeTs Aux-Net on scikit-learn's digits, with a teacher, mixup, drop-path and averaging. It is killed
by SIGKILL, at a random moment or just when a checkpoint is being written; some get SIGTERM, SIGUSR1 or SIGHUP
instead; the newest checkpoint is sometimes damaged while nobody looks; and every restart has another number of data
workers. In the end log.txt, learngene, average and the state of the optimiser have to equal, bit for bit, those of the
run that nobody disturbed. Exit status 1 if any of them differs.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}  # one thread: rounds of two processes share two cores
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from common import console
from common.files import read_checkpoint
from main import main as run_main

import torch
from tqdm import tqdm

COMMON = "--data-set DIGITS --input-size 16 --warmup-epochs 1 --device cpu --batch-size {batch} --log-interval 5"
TEACHER = "--model test_resnet --epochs 1 --num-workers 0"
STUDENT = (
    "--src-arch deit_nano_patch4_16_L2_H1 --tgt-arch deit_nano_patch4_16_L4_H2 --epochs 3 --lr 4e-3 --clip-grad 1 "
    "--teacher-model test_resnet --teacher-path {teacher} --distillation-type soft --distillation-alpha 0.5"
)
ENDINGS = {  # how a run is disturbed → how often
    "SIGKILL at a random moment": 12,
    "SIGKILL while a checkpoint is written": 5,
    "SIGTERM": 2,
    "SIGUSR1": 2,
    "SIGHUP": 1,
    "SIGKILL, and the newest checkpoint damaged": 1,
}
LONGEST = 240  # seconds; a run that takes longer hangs


# what the runs import when they need it, imported once for all of them
LATE = ("training.launch", "matplotlib.figure", "sklearn.datasets", "sklearn.model_selection")
for module in (*LATE, "torch.utils.tensorboard"):
    import_module(module)


class Group:
    """The processes of one run, forked from this one, so that nothing has to be imported again."""

    def __init__(self, command: str, processes: int, output: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.start, self.codes = time.monotonic(), {}
        self.pids = [self.fork(command, rank, processes, port, output) for rank in range(processes)]

    def fork(self, command: str, rank: int, processes: int, port: int, output: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        os.setsid()  # a group of its own, to be killed together with its data workers
        if processes > 1:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in world.items()}}
        to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(to, 1)
        os.dup2(to, 2)
        code = 1
        try:
            code = run_main(command.split())
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            os._exit(code)

    def running(self) -> bool:
        for pid in set(self.pids) - self.codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def signal(self, number: int) -> None:
        """To each process and its data workers, as SLURM does."""
        for pid in set(self.pids) - self.codes.keys():
            os.killpg(pid, number)

    def wait(self) -> set[int]:
        while self.running():
            if time.monotonic() - self.start > LONGEST:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"a run has not ended within {LONGEST} seconds")
            time.sleep(0.005)
        return set(self.codes.values())


def disturb(group: Group, how: str, seconds: float, folder: Path) -> bool:
    """Let the group run for a while and end it; False if it has ended by itself before."""
    end = time.monotonic() + seconds
    writing = how == "SIGKILL while a checkpoint is written"
    while group.running():
        if time.monotonic() > end and (not writing or any(folder.glob(".checkpoint.pth.*"))):
            group.signal(signal.SIGKILL if how.startswith("SIGKILL") else signal.Signals[how])
            group.wait()
            if how.endswith("damaged") and (folder / "checkpoint.pth").exists():
                damage(folder / "checkpoint.pth")
            return True
        time.sleep(0.001)
    return False


def damage(path: Path) -> None:
    """Cut a file off, or turn one of its bits, as disks do."""
    content = bytearray(path.read_bytes())
    if random.random() < 0.5:
        content = content[: random.randrange(len(content))]
    else:
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def differences(found: Path, expected: Path) -> list[str]:
    """What two finished runs differ in."""
    differing = [] if (found / "log.txt").read_bytes() == (expected / "log.txt").read_bytes() else ["log.txt"]
    for name in ("learngene.safetensors", "learngene_ema.safetensors"):
        a, b = (models.load_learngene(folder / name).tensors for folder in (found, expected))
        if not equal(a, b):
            differing.append(name)
    a, b = (read_checkpoint(folder / "checkpoint.pth") for folder in (found, expected))
    best = [read_checkpoint(folder / "best_checkpoint.pth") for folder in (found, expected)]
    if not equal(best[0]["model"], best[1]["model"]):
        differing.append("best_checkpoint.pth")
    for part in ("model", "model_ema", "optimizer", "epoch", "log"):
        if not equal(a[part], b[part]):
            differing.append(f"{part} of checkpoint.pth")
    return differing + [f"{path.name} is left over" for path in found.glob(".*")]


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Torture:
    """Rounds of one run each, and what was counted."""

    def __init__(self, folder: Path, processes: Sequence[int]):
        self.folder, self.counts = folder, Counter()
        self.endings = Counter()
        self.peaceful: dict[int, tuple[Path, float]] = {}
        self.finish(TEACHER + " " + COMMON.format(batch=64), 1, "teacher")
        for number in processes:
            start = time.monotonic()
            path = self.finish(self.command(number), number, f"undisturbed-{number}")
            self.peaceful[number] = path, time.monotonic() - start

    def command(self, processes: int) -> str:
        teacher = self.folder / "teacher" / "model.safetensors"
        return f"{COMMON.format(batch=64 // processes)} {STUDENT.format(teacher=teacher)}"

    def finish(self, command: str, processes: int, name: str) -> Path:
        """Run to the end."""
        path = self.folder / name
        codes = Group(f"{command} --output-dir {path}", processes, self.folder / f"{name}.txt").wait()
        if codes != {0}:
            sys.exit(f"error: {name} ended with {codes}:\n" + (self.folder / f"{name}.txt").read_text()[-3000:])
        return path

    def round(self, processes: int, most: float, bar: tqdm) -> None:
        """One run, disturbed until it is finished or ``most`` kills are reached in all rounds."""
        expected, seconds = self.peaceful[processes]
        path, output = self.folder / "round", self.folder / "round.txt"
        shutil.rmtree(path, ignore_errors=True)
        output.unlink(missing_ok=True)
        while True:
            options = f"--resume auto --output-dir {path} --num-workers {random.randrange(3)} --keep-checkpoints 2"
            options += f" --save-every-steps {random.randint(1, 6)}"
            group = Group(f"{self.command(processes)} {options}", processes, output)
            self.counts["starts"] += 1
            how = random.choices(list(ENDINGS), list(ENDINGS.values()))[0]
            if self.kills >= most or not disturb(group, how, random.uniform(0, 0.6 * seconds), path):
                codes = group.wait()
                if codes == {0}:
                    break
                sys.exit(f"error: a run ended with {codes}:\n{output.read_text()[-3000:]}")
            self.endings[how] += 1
            bar.update()
            bar.set_postfix(kills=self.kills, differences=self.counts["differences"])
        said = output.read_text()
        self.counts["checkpoints read"] += said.count("continuing from ")
        self.counts["damaged checkpoints passed over"] += said.count("passes over ")
        self.counts["rounds"] += 1
        for difference in differences(path, expected):
            self.counts["differences"] += 1
            tqdm.write(f"round {self.counts['rounds']}, {processes} process(es): {difference} differs")

    @property
    def kills(self) -> int:
        return sum(self.endings.values())

    def summary(self, seconds: float) -> str:
        names = ("rounds", "starts", "checkpoints read", "damaged checkpoints passed over", "differences")
        lines = [f"{self.counts[name]:6} {name}" for name in names]
        lines[2:2] = [f"{self.kills:6} kills", *(f"{self.endings[how]:10} {how}" for how in ENDINGS)]
        return "\n".join(
            [f"{seconds / 60:.1f} minutes, processes per run: {', '.join(map(str, self.peaceful))}", *lines]
        )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no round after so many minutes")
    parser.add_argument("--kills", type=int, default=None, help="stop after so many kills")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="per run, in turn")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: another one each time")
    args = parser.parse_args(argv)
    if args.kills is None and args.minutes == float("inf"):
        parser.error("give --minutes or --kills")
    seed = random.randrange(10**6) if args.seed is None else args.seed
    random.seed(seed)
    print(f"seed {seed}, Python {sys.version.split()[0]}, torch {torch.__version__}", flush=True)
    start, most = time.monotonic(), float("inf") if args.kills is None else args.kills
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        torture = Torture(Path(folder), args.processes)
        with tqdm(total=args.kills, unit="kill", disable=None) as bar:
            while time.monotonic() - start < 60 * args.minutes and torture.kills < most:
                torture.round(args.processes[torture.counts["rounds"] % len(args.processes)], most, bar)
        print(torture.summary(time.monotonic() - start))
    return 1 if torture.counts["differences"] else 0


if __name__ == "__main__":
    console.accept_any_text()
    sys.exit(main(sys.argv[1:]))
