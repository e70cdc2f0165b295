"""A copy of the repository in which the commands of the documentation run as written, by bash, within seconds.

The copy has stand-ins for ``python``, ``torchrun`` and ``sbatch``. Each passes its command line to a server that has
imported the libraries already, and that forks a process for it:

    with Sandbox(folder, rules) as sandbox:
        status, output = sandbox.run("python main.py --model resnet18 --data-set DIGITS")

A rule decides what is done with a command line (`Rule`). Without a rule the command fails.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
NOT_COPIED = (".*", "__pycache__", "output", "runs", "*.tar*", "fixtures")
SECONDS = 300  # a block of commands that takes longer hangs, and is killed
NO_RULE = 97

CLIENT = """\
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    request = json.dumps([os.path.basename(sys.argv[2]), sys.argv[3:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    sys.exit((server.recv(1) or b"\\1")[0])
"""


class Rule(NamedTuple):
    """What is done with the command lines in which ``pattern`` is found.

    Attributes:
        options: appended to the command line, before ``--``; the last value of an option counts.
        action: ``run``, ``parse`` (the options only), or ``skip``.
        reason: why the command is not run.
    """

    pattern: str
    options: str = ""
    action: str = "run"
    reason: str = ""


class Sandbox:
    """The folder, and the server that answers inside the ``with`` block.

    Args:
        folder: where the copy of the repository is made; a path short enough for a socket.
        replace: text that the user would replace → what stands for it here.
        environment: of the commands.
    """

    def __init__(self, folder: Path, rules: Sequence[Rule], replace: Mapping[str, str], environment: Mapping[str, str]):
        self.folder, self.rules, self.replace = folder / "repository", rules, replace
        self.socket, self.log = folder / "socket", folder / "log.jsonl"
        self.environment = {**environment, "PATH": f"{self.folder}/.venv/bin:{os.environ['PATH']}"}
        self.environment.pop("PYTHON", None)

    def __enter__(self) -> "Sandbox":
        shutil.copytree(REPOSITORY, self.folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for path in (self.folder / "configs").iterdir():
            path.write_text(self._replaced(path.read_text()))
        self._write_stand_ins()
        rules = json.dumps(self.rules)
        command = [sys.executable, __file__, str(self.socket), str(self.log), str(self.folder), rules]
        self.process = subprocess.Popen(command, cwd=self.folder, env=self.environment)
        while not self.socket.exists():
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.05)
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        self.process.wait()

    def _write_stand_ins(self) -> None:
        """An environment that scripts/setup.sh takes for complete, whose programs are clients of the server."""
        binaries = self.folder / ".venv" / "bin"
        binaries.mkdir(parents=True)
        wanted = "".join((self.folder / name).read_text() for name in ("requirements.txt", "constraints.txt"))
        digest = subprocess.run(["sha256sum"], input=wanted, capture_output=True, text=True, check=True).stdout
        (self.folder / ".venv" / "installed").write_text(digest)
        (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
        (binaries / "client.py").write_text(CLIENT)
        for name in ("python", "python3", "torchrun", "sbatch"):
            program = binaries / name
            program.write_text(
                f'#!/bin/sh\nexec "{sys.executable}" -IS "{binaries}/client.py" "{self.socket}" "$0" "$@"\n'
            )
            program.chmod(0o755)
        if ruff := shutil.which("ruff", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
            (binaries / "ruff").symlink_to(ruff)

    def run(self, commands: str, program: str = "bash") -> tuple[int, str]:
        """Exit status and output of ``commands``, in the language of ``program``: ``bash`` or ``python``."""
        commands = self._replaced(commands)
        argv = ["bash", "-euo", "pipefail"] if program == "bash" else [str(self.folder / ".venv" / "bin" / "python")]
        done = subprocess.run(
            [*argv, "-c", commands],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        return done.returncode, done.stdout

    def _replaced(self, text: str) -> str:
        for given, stand_in in self.replace.items():
            text = text.replace(given, stand_in)
        return text

    def used_rules(self) -> set[str]:
        return {json.loads(line)[0] for line in self.log.read_text().splitlines()}


# ---------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------


def serve(address: str, log: str, folder: str, rules: Sequence[Rule]) -> None:
    """Fork a process for every command line that a client sends."""
    sys.path.insert(0, folder)
    for module in ("training.loop", "sklearn.datasets", "sklearn.model_selection", "matplotlib.figure"):
        import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for the forks
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".new")
        server.listen()
        os.rename(address + ".new", address)
        while True:
            connection, _ = server.accept()
            with connection:
                if os.fork() == 0:
                    answer(connection, log, folder, rules)


def answer(connection: socket.socket, log: str, folder: str, rules: Sequence[Rule]) -> None:
    """Be the process of one command line, and end with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        name, argv, cwd, environment = json.loads(file.read(int.from_bytes(length, "big")))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = f"{folder}/.venv/bin/python"  # for processes that the command starts
    code = 0
    try:
        execute(name, argv, log, rules)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for thread in threading.enumerate():  # TensorBoard's, which still writes
        if thread not in (threading.main_thread(), threading.current_thread()) and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    connection.sendall(bytes([code % 256]))
    os._exit(code)


def execute(name: str, argv: list[str], log: str, rules: Sequence[Rule]) -> None:
    if name == "torchrun":
        argv = launched(argv)
    elif name == "sbatch":
        argv = submitted(argv)
    command = " ".join([*(["sbatch"] if name == "sbatch" else []), *argv])
    rule = next((rule for rule in rules if re.search(rule.pattern, command)), None)
    if rule is None:
        print(f"no rule covers the command: {command}", file=sys.stderr)
        sys.exit(NO_RULE)
    with open(log, "a") as file:
        file.write(json.dumps([rule.pattern, command]) + "\n")
    end = argv.index("--") if "--" in argv else len(argv)
    argv = [*argv[:end], *rule.options.split(), *argv[end:]]
    if rule.action == "skip":
        return
    if rule.action == "parse":
        stop_after_parsing()
    if argv[0] == "-c":
        sys.path.insert(0, os.getcwd())
        exec(compile(argv[1], "<documentation>", "exec"), {"__name__": "__main__"})
        return
    while argv[0].startswith("-") and argv[0] != "-m":  # python -u
        argv = argv[1:]
    sys.argv = argv[1:] if argv[0] == "-m" else argv
    if argv[0] == "-m":
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def launched(argv: list[str]) -> list[str]:
    """The command line of one process under torchrun, whose own options are checked."""
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(argv)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return [options.training_script, *options.training_script_args]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def submitted(argv: list[str]) -> list[str]:
    """The main.py command line of a job, whose script is checked by ``bash -n``."""
    position = next(i for i, word in enumerate(argv) if not word.startswith("-"))
    if subprocess.run(["bash", "-n", argv[position]]).returncode:
        sys.exit(2)
    return ["main.py", *argv[position + 1 :]]


def stop_after_parsing() -> None:
    """Make the program end with status 0 as soon as its options are parsed."""
    parse = argparse.ArgumentParser.parse_known_args
    depth = 0

    def parse_and_stop(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> tuple:
        nonlocal depth
        depth += 1
        namespace, rest = parse(self, *args, **kwargs)
        depth -= 1
        if depth == 0:
            if rest:
                self.error(f"unrecognized arguments: {' '.join(rest)}")
            sys.exit(0)
        return namespace, rest

    argparse.ArgumentParser.parse_known_args = parse_and_stop


if __name__ == "__main__":
    serve(*sys.argv[1:4], [Rule(*rule) for rule in json.loads(sys.argv[4])])
