"""scripts/download_learngenes.py on its command line, with servers on this machine.

Google Drive is reached through a proxy, as gdown understands one, that answers in its place. The processes are forks of
one that has imported the libraries; how it forks stands at the end of this file.
"""

import hashlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest
import trustme
import yaml
from conftest import PYTHONPATH, run_and_exit
from hub_stand_in import HubStandIn

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = TESTS.parent / "scripts" / "download_learngenes.py"
GENE = (TESTS / "fixtures" / "tleg_learngene.pth").read_bytes()
DIGEST = hashlib.sha256(GENE).hexdigest()
# ids of Google Drive
FOLDER, INNER = "folder-that-everybody-may-see", "folder-inside-of-that-folder"
SMALL, BASE = "file-of-the-small-learngene", "file-of-the-base-learngene-"
SECONDS = 600  # a process that lasts longer hangs, and is ended


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def forks(hub, tmp_path_factory) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = PYTHONPATH
    environment |= hub.environment(tmp_path_factory.mktemp("hub"))
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, __file__], env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(forks, tmp_path) -> Callable[..., Outcome]:
    """The script as ``run(ARGUMENT…, registry=ENTRIES, VARIABLE=value…)``; ``tmp_path`` is where it starts."""

    def run(*arguments: str, registry: object = None, **environment: object) -> Outcome:
        if registry is not None:
            (tmp_path / "registry.yaml").write_text(registry if isinstance(registry, str) else yaml.dump(registry))
            arguments += ("--registry", "registry.yaml")
        environment = {"TORCH_HOME": str(tmp_path / "home")} | {name: str(v) for name, v in environment.items()}
        forks.stdin.write(json.dumps([str(tmp_path), arguments, environment]) + "\n")
        forks.stdin.flush()
        code = int(forks.stdout.readline())
        return Outcome(code, (tmp_path / "stdout").read_text(), (tmp_path / "stderr").read_text())

    return run


def entry(address: str, **others: object) -> dict:
    return dict(name="mine", method="tleg", architectures=["aux_deit_tiny_patch16_224"], address=address, **others)


def said_in_one_sentence(outcome: Outcome, *parts: str) -> bool:
    """Whether it is a user error that has all of ``parts``, after nothing but lines on what is downloaded."""
    *before, error = outcome.stderr.splitlines()
    assert (outcome.code, error[:7]) == (2, "error: "), outcome.stderr
    assert [line for line in before if not line.startswith("downloading ")] == []
    assert [part for part in parts if part not in error] == [], error
    return True


def describes_gene(line: str, path: str) -> bool:
    """Whether ``line`` says that ``path`` is the learngene of `GENE`, with its sizes."""
    sizes = "L12-H3 (width 12), patch 16, image 32, 10 classes"
    return line.startswith(f"{path}: TLEG learngene") and sizes in line


# ---------------------------------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------------------------------


def test_list_of_what_is_known(tmp_path):
    shown = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True)
    header, *rows = [line.split() for line in shown.stdout.splitlines()]
    assert header == ["name", "method", "architectures", "address", "sha256", "note"]
    address = "https://drive.google.com/drive/folders/1TROwdWr-V7Q1bAUFDH6zCZD4yANfDa6g"
    assert rows[0][0] == "digits-elastic"
    assert rows[-3][:5] == ["tleg", "tleg", "aux_deit_tiny_patch16_224", address, "unknown"]
    assert rows[-2:] == [["aux_deit_small_patch16_224"], ["aux_deit_base_patch16_224"]]
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_this_repository_is_not_downloaded(tmp_path):
    command = [sys.executable, SCRIPT, "digits-lets"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    path = TESTS.parent / "learngenes/digits-lets.safetensors"
    assert shown[0] == f"{path} is part of this repository"
    assert shown[1].startswith(f"{path}: LeTs learngene")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_list_of_a_registry_of_ones_own(run):
    lets = dict(method="lets", architectures=["deit_small_patch16_224_L8", "deit_base_patch16_224_L16_H12"])
    registry = [entry("hf-hub:me/mine") | lets, entry("http://h/x") | dict(name="other", sha256=DIGEST, note="to try")]
    outcome = run(registry=registry)
    assert [line.split() for line in outcome.stdout.splitlines()[1:]] == [
        ["mine", "lets", "deit_small_patch16_224_L8", "hf-hub:me/mine", "unknown"],
        ["deit_base_patch16_224_L16_H12"],
        ["other", "tleg", "aux_deit_tiny_patch16_224", "http://h/x", "known", "to", "try"],
    ]


@pytest.mark.parametrize(
    ("registry", "parts"),
    [
        ("mine: tleg", ["registry.yaml", "dict", "a list"]),
        ("- [", ["registry.yaml", "not YAML"]),
        ("- &a {name: x}\n- *a", ["registry.yaml", "alias"]),
        (["mine"], ["entry 1", "'mine'", "name, method"]),
        ([entry("http://h/x") | {"adress": "x"}], ["entry 1 (mine)", "'adress'", "address"]),
        ([{"name": "mine", "method": "tleg", "address": "http://h/x"}], ["entry 1", "architectures is missing"]),
        ([entry("http://h/x") | {"name": 7}], ["entry 1", "name is 7", "text"]),
        ([entry("http://h/x") | {"name": "../mine"}], ["entry 1", "letters"]),
        ([entry("http://h/x"), entry("http://h/y")], ["entry 2 (mine)", "another entry has this name"]),
        ([entry("http://h/x") | {"method": "other"}], ["entry 1", "'other'", "lets or elastic or tleg"]),
        ([entry("http://h/x") | {"method": "lets"}], ["entry 1", "the learngene, the Aux-Net"]),
        ([entry("http://h/x") | {"architectures": []}], ["entry 1", "one or more"]),
        ([entry("http://h/x") | {"architectures": [12]}], ["entry 1", "12"]),
        ([entry("http://h/x") | {"architectures": ["vit_b"]}], ["entry 1", "vit_b", "deit_{size}"]),
        ([entry("ftp://h/x")], ["entry 1", "ftp://h/x", "hf-hub:"]),
        ([entry("https://drive.google.com/drive/my-drive")], ["entry 1", "my-drive", "/drive/folders/"]),
        ([entry("learngenes/x.safetensors", sha256=DIGEST)], ["entry 1", "sha256", "this repository"]),
        ([entry("http://h/x", sha256="12")], ["entry 1", "12", "64 hexadecimal digits"]),
        ([entry(f"https://drive.google.com/drive/folders/{FOLDER}", sha256=DIGEST)], ["entry 1", "sha256", "folder"]),
    ],
)
def test_mistakes_in_a_registry(run, registry, parts):
    outcome = run("mine", registry=registry)
    assert said_in_one_sentence(outcome, *parts)


def test_registry_runs_nothing(run, tmp_path):
    outcome = run(registry="- !!python/object/apply:os.system [touch ran]\n")
    assert said_in_one_sentence(outcome, "registry.yaml", "python/object/apply:os.system")
    assert not (tmp_path / "ran").exists()


def test_mistakes_on_the_command_line(run, tmp_path):
    assert said_in_one_sentence(run("other", registry=[entry("http://h/x")]), "'other'", "mine")
    assert said_in_one_sentence(run("--registry", "none.yaml"), "none.yaml")
    assert said_in_one_sentence(run("mine", "--head-dim", "0", registry=[entry("http://h/x")]), "--head-dim 0")
    (tmp_path / "file").touch()
    outcome = run("mine", "--output-dir", "file", registry=[entry("http://h/x")])
    assert said_in_one_sentence(outcome, "--output-dir file")


# ---------------------------------------------------------------------------------------------------------------------
# Files at http addresses, and on the Hugging Face Hub
# ---------------------------------------------------------------------------------------------------------------------


class Web(SimpleHTTPRequestHandler):
    requests: list[str] = []  # noqa: RUF012  one list for the one server

    def log_message(self, format, *args):
        self.requests.append(self.path)


@pytest.fixture
def web(tmp_path) -> Iterator[str]:
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "gene.pth").write_bytes(GENE)
    (folder / "notes.txt").write_text("learning rate 5e-4\n")
    Web.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Web, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("known", [{}, {"sha256": DIGEST.upper()}])
def test_file_at_an_http_address(run, web, tmp_path, known):
    arguments = dict(registry=[entry(f"{web}/gene.pth", **known)])
    outcome = run("mine", "--head-dim", "4", **arguments)
    assert outcome.code == 0, outcome.stderr
    assert describes_gene(outcome.stdout, "learngenes/mine.pth")
    assert [path.name for path in (tmp_path / "learngenes").iterdir()] == ["mine.pth"]
    assert (tmp_path / "learngenes" / "mine.pth").read_bytes() == GENE

    shutil.rmtree(tmp_path / "web")
    shutil.rmtree(tmp_path / "home")
    again = run("mine", "--head-dim", "4", **arguments)
    assert (again.code, again.stdout) == (0, f"learngenes/mine.pth already exists\n{outcome.stdout}")
    assert Web.requests == ["/gene.pth"]


def test_file_on_the_hugging_face_hub(run, hub, tmp_path):
    weights = (TESTS / "fixtures" / "tleg_expected.safetensors").read_bytes()
    hub.add("owner/mine", {"learngene.safetensors": weights, "first.pth": GENE})
    first = entry("hf-hub:owner/mine/first.pth@main", sha256=DIGEST) | {"name": "first"}
    outcome = run("first", "mine", "--head-dim", "4", registry=[first, entry("hf-hub:owner/mine")])
    assert describes_gene(outcome.stdout, "learngenes/first.pth"), outcome
    assert said_in_one_sentence(outcome, "learngenes/mine.safetensors", "not a learngene")
    assert (tmp_path / "learngenes" / "first.pth").read_bytes() == GENE
    assert (tmp_path / "learngenes" / "mine.safetensors").read_bytes() == weights
    assert not any(path.is_symlink() for path in (tmp_path / "learngenes").iterdir())  # as in the hub's cache


def test_file_with_another_hash(run, web, hub, tmp_path):
    hub.add("owner/mine", {"learngene.safetensors": GENE})
    for address in (f"{web}/gene.pth", "hf-hub:owner/mine"):
        registry = [entry(address, sha256="0" * 64)]
        assert said_in_one_sentence(run("mine", registry=registry), "0" * 64, DIGEST)
    assert list((tmp_path / "learngenes").iterdir()) == []

    (tmp_path / "learngenes" / "mine.safetensors").write_bytes(GENE)
    outcome = run("mine", registry=registry)
    assert said_in_one_sentence(outcome, "learngenes/mine.safetensors", "0" * 64, DIGEST, "remove it")
    assert (tmp_path / "learngenes" / "mine.safetensors").read_bytes() == GENE


def test_file_that_is_no_learngene(run, web, tmp_path):
    outcome = run("mine", "--output-dir", "here", registry=[entry(f"{web}/notes.txt")])
    assert said_in_one_sentence(outcome, "not a learngene, but kept: here/mine.txt")
    assert (tmp_path / "here" / "mine.txt").read_text() == "learning rate 5e-4\n"


# ---------------------------------------------------------------------------------------------------------------------
# Google Drive
# ---------------------------------------------------------------------------------------------------------------------


class Drive(ThreadingHTTPServer):
    """A proxy that speaks for Google Drive instead of connecting to it."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), DriveHandler)
        self.folders = {  # id → its own name, and the names and ids of what it holds
            FOLDER: ("TLEG", {"small.pth": SMALL, "more": INNER}),
            INNER: ("more", {"base.pth": BASE}),
        }
        self.files = {SMALL: GENE, BASE: GENE}
        self.requests: list[str] = []
        self.refuses = self.quota_reached = False
        self.cut: int | None = None  # the bytes of a file after which the connection breaks
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "authority.pem")
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("drive.google.com", "drive.usercontent.google.com").configure_cert(self.tls)
        proxy = f"http://127.0.0.1:{self.server_port}"
        self.environment = {"HTTPS_PROXY": proxy, "REQUESTS_CA_BUNDLE": str(folder / "authority.pem")}


class DriveHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Drive

    def do_CONNECT(self) -> None:
        if self.server.refuses:
            return self.send_error(403)
        self.send_response_only(200)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
        self.close_connection = False

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        page, wanted = self.headers["Host"] + url.path, parse_qs(url.query)["id"][0]
        self.server.requests.append(f"{page} {wanted} {self.headers.get('Range', '')}".strip())
        if wanted not in {**self.server.folders, **self.server.files}:
            self.send_error(404)
        elif page == "drive.google.com/embeddedfolderview":
            title, items = self.server.folders[wanted]
            kinds = {id: "drive/folders" if id in self.server.folders else "file/d" for id in items.values()}
            link = '<a href="https://drive.google.com/{}/{}/view">{}</a>'
            links = [link.format(kinds[id], id, name) for name, id in items.items()]
            self.send(f"<title>{title}</title>{''.join(links)}".encode())
        elif self.server.quota_reached:
            self.send(b'<p class="uc-error-subcaption">Too many users have viewed this file.</p>')
        elif page == "drive.google.com/uc":  # too large to be scanned for viruses, and asks whether to go on
            action = "https://drive.usercontent.google.com/download"
            hidden = f'<input type="hidden" name="id" value="{wanted}">'
            self.send(f'<form id="download-form" action="{action}">{hidden}</form>'.encode())
        else:
            self.send_file(self.server.files[wanted])

    def send_file(self, content: bytes) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        headers["Content-Disposition"] = "attachment; filename*=UTF-8''learngene.pth"
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(content[start:], 206 if start else 200, headers, self.server.cut)

    def send(self, body: bytes, status: int = 200, headers: Mapping[str, str] = {}, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "text/html", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = cut is not None

    def finish(self) -> None:
        super().finish()
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: ``Drive.requests`` has what the tests need."""


@pytest.fixture
def drive(tmp_path) -> Iterator[Drive]:
    with Drive(tmp_path) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


FOLDER_ENTRY = entry(f"https://drive.google.com/drive/folders/{FOLDER}?usp=sharing")


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_folder_of_google_drive(run, drive, tmp_path):
    outcome = run("mine", "--head-dim", "4", registry=[FOLDER_ENTRY], **drive.environment)
    assert outcome.code == 0, outcome.stderr
    small, base = outcome.stdout.splitlines()
    assert describes_gene(small, "learngenes/mine/small.pth")
    assert describes_gene(base, "learngenes/mine/more/base.pth")
    assert files_in(tmp_path / "learngenes") == ["mine/more/base.pth", "mine/small.pth"]
    (tmp_path / "other").touch()
    for path in ("mine/more/base.pth", "mine/small.pth"):
        assert (tmp_path / "learngenes" / path).read_bytes() == GENE
        assert (tmp_path / "learngenes" / path).stat().st_mode == (tmp_path / "other").stat().st_mode

    (tmp_path / "learngenes" / "mine" / "small.pth").unlink()
    drive.requests.clear()
    again = run("mine", "--head-dim", "4", registry=[FOLDER_ENTRY], **drive.environment)
    assert (again.code, again.stdout) == (0, f"learngenes/mine/more/base.pth already exists\n{outcome.stdout}")
    assert [request.split()[1] for request in drive.requests] == [FOLDER, INNER, SMALL, SMALL]


def test_file_of_google_drive(run, drive, tmp_path):
    registry = [entry(f"https://drive.google.com/file/d/{SMALL}/view", sha256="0" * 64)]
    assert said_in_one_sentence(run("mine", registry=registry, **drive.environment), "0" * 64, DIGEST)
    assert files_in(tmp_path / "learngenes") == []

    registry[0]["sha256"] = DIGEST
    outcome = run("mine", "--head-dim", "4", registry=registry, **drive.environment)
    assert describes_gene(outcome.stdout, "learngenes/mine.pth"), outcome
    assert (tmp_path / "learngenes" / "mine.pth").read_bytes() == GENE


def test_download_that_broke_is_continued(run, drive, tmp_path):
    registry = [entry(f"https://drive.google.com/uc?id={SMALL}")]
    content = drive.files[SMALL] = bytes(range(256)) * 2**12
    drive.cut = 3 * 2**18
    outcome = run("mine", registry=registry, **drive.environment)
    assert said_in_one_sentence(outcome, f"{drive.cut} bytes", "mine could not be downloaded", registry[0]["address"])
    assert files_in(tmp_path / "learngenes") == []

    drive.cut = None
    outcome = run("mine", registry=registry, **drive.environment)
    assert said_in_one_sentence(outcome, "not a learngene, but kept: learngenes/mine.pth")
    assert drive.requests[-1] == f"drive.usercontent.google.com/download {SMALL} bytes={2**19}-"  # of gdown's blocks
    assert (tmp_path / "learngenes" / "mine.pth").read_bytes() == content


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"folders": {}}, "404"),
        ({"folders": {FOLDER: ("TLEG", {})}}, "no files"),
        ({"quota_reached": True}, "Too many users have viewed this file."),
        ({"refuses": True}, "403 Forbidden"),
    ],
)
def test_google_drive_gives_nothing(run, drive, tmp_path, state, reason):
    for name, value in state.items():
        setattr(drive, name, value)
    outcome = run("mine", registry=[FOLDER_ENTRY], **drive.environment)
    assert said_in_one_sentence(outcome, "mine", reason, FOLDER_ENTRY["address"], "in a browser")
    assert files_in(tmp_path / "learngenes") == []


# ---------------------------------------------------------------------------------------------------------------------
# The other side of `run`
# ---------------------------------------------------------------------------------------------------------------------


def fork_runs() -> None:
    """For each line of standard input, run the script in a fork of this process, and print its exit status."""
    for module in ("models", "gdown"):  # the seconds that are spent once
        import_module(module)
    for line in sys.stdin:
        folder, arguments, environment = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become_script(folder, arguments, environment)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def become_script(folder: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Make this process one of the script, and end with it."""
    signal.alarm(SECONDS)  # would end the process
    os.chdir(folder)
    os.environ.update(environment)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    run_and_exit(SCRIPT, arguments)


if __name__ == "__main__":
    sys.path.insert(0, str(SCRIPT.parents[1]))
    fork_runs()
