"""Files from an address, against real servers on this machine."""

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import models
from common.download import fetch

import pytest
import torch
from conftest import ENVIRONMENT, Outcome, Run, run_many
from hub_stand_in import HubStandIn

FIXTURES = Path(__file__).parents[1] / "fixtures"
GENE = (FIXTURES / "tleg_learngene.pth").read_bytes()
DIGEST = hashlib.sha256(GENE).hexdigest()
PAGE = b"\n<!DOCTYPE html><html><body>Sign in to download</body></html>"
SIGN_IN = b"<!-- please --><html><body>Sign in to download</body></html>"


@dataclass
class Server:
    """Serves ``content`` to whoever asks for gene.pth, with byte ranges, and breaks off where it is told to."""

    content: bytes = GENE
    version: str = '"1"'
    ranges: bool = True
    honest: bool = True  # or else ranges are of whatever version is there now
    break_after: list[int] = field(default_factory=list)  # bytes of each answer before the connection is cut
    silent: threading.Event = field(default_factory=threading.Event)  # until it is set, /silent gets no answer
    asked: list[str | None] = field(default_factory=list)  # the Range of each request, None without
    address: str = ""


def handler_of(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/silent":
                server.silent.wait()
                return
            contents = {"/gene.pth": server.content, "/page.pth": PAGE, "/sign-in.pth": SIGN_IN, "/empty.pth": b""}
            if self.path not in contents:
                self.send_error(404)
                return
            content = contents[self.path]
            asked = self.headers["Range"]
            server.asked.append(asked)
            begin = 0
            if asked and server.ranges and (self.headers["If-Range"] == server.version or not server.honest):
                begin = int(asked.removeprefix("bytes=").removesuffix("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - begin))
            self.send_header("ETag", server.version)
            self.send_header("Content-Type", "text/html" if content == SIGN_IN else "application/octet-stream")
            self.end_headers()
            end = begin + server.break_after.pop(0) if server.break_after else None
            self.wfile.write(content[begin:end])

        def log_message(self, format, *args):
            pass

    return Handler


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_of(server)) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        server.address = f"http://127.0.0.1:{http.server_port}"
        yield server
        server.silent.set()
        http.shutdown()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Where downloads are kept."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "hub" / "checkpoints"


def kept(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_learngene_from_an_address_is_downloaded_once(server, cache):
    file = models.load_learngene(FIXTURES / "tleg_learngene.pth", head_dim=4)
    for address in (f"{server.address}/gene.pth", f"{server.address}/gene.pth#sha256={DIGEST.upper()}"):
        gene = models.load_learngene(address, head_dim=4)
        assert all(torch.equal(gene.tensors[name], tensor) for name, tensor in file.tensors.items())
    assert server.asked == [None]
    assert len(kept(cache)) == 1


def test_broken_connection_is_taken_up_where_it_broke(server, cache):
    server.break_after = [100, 3000]
    path = fetch(f"{server.address}/gene.pth#sha256={DIGEST}")
    assert path.read_bytes() == GENE
    assert server.asked == [None, "bytes=100-", "bytes=3100-"]
    assert kept(cache) == [path]


def test_broken_download_is_taken_up_in_a_later_run(server, cache):
    server.break_after = [1000, 0]
    with pytest.raises(models.InputError, match="the 1,000 bytes received are kept for the next attempt"):
        fetch(f"{server.address}/gene.pth")
    assert fetch(f"{server.address}/gene.pth").read_bytes() == GENE
    assert server.asked == [None, "bytes=1000-", "bytes=1000-"]


@pytest.mark.parametrize("change", ["other version", "dishonest", "no ranges", "shorter"])
def test_halves_of_different_files_are_not_put_together(server, change):
    server.break_after = [1000, 0]
    with pytest.raises(models.InputError, match="kept for the next attempt"):
        fetch(f"{server.address}/gene.pth")
    if change == "no ranges":
        server.ranges = False
    else:
        server.content, server.version = GENE[:500] if change == "shorter" else GENE[::-1], '"2"'
        server.honest = change != "dishonest"
    assert fetch(f"{server.address}/gene.pth").read_bytes() == server.content


def test_wrong_hash_is_named_and_nothing_is_kept(server, cache):
    with pytest.raises(models.InputError, match=f"SHA-256 {DIGEST}, expected {'0' * 64}"):
        models.load_learngene(f"{server.address}/gene.pth#sha256={'0' * 64}")
    assert kept(cache) == []


def test_kept_file_with_another_hash_is_downloaded_again(server):
    server.content = b"an older file"
    fetch(f"{server.address}/gene.pth")
    server.content = GENE
    assert fetch(f"{server.address}/gene.pth#sha256={DIGEST}").read_bytes() == GENE


def test_silent_server_is_given_up(server, cache):
    with pytest.raises(models.InputError, match="/silent could not be downloaded: timed out"):
        fetch(f"{server.address}/silent", timeout=0.2)
    assert kept(cache) == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/gene.pth", "http://[::1/gene.pth", "https:///gene.pth"])
def test_no_server_is_one_sentence(cache, address):
    with pytest.raises(models.InputError) as error:
        models.load_learngene(address)
    assert address in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# On the command line
# ---------------------------------------------------------------------------------------------------------------------

# run → the address that --load-gene names, where SERVER and FIRST are filled in, and what is said
REFUSED = {
    "missing": ("SERVER/missing.pth", "missing.pth could not be downloaded: HTTP Error 404"),
    "page": ("SERVER/page.pth", "page.pth is a web page: expected the address of the file itself"),
    "sign-in": ("SERVER/sign-in.pth", "sign-in.pth is a web page"),
    "empty": ("SERVER/empty.pth", "empty.pth is empty"),
    "md5": ("SERVER/gene.pth#md5=12", "ends in #md5=12: expected #sha256= and 64 hexadecimal digits"),
    "hub-empty": ("hf-hub:owner/gene", "gene.safetensors is empty"),
    "hub-file": ("hf-hub:owner/gene/other.pth", "the repository has no other.pth"),
    "hub-revision": ("hf-hub:owner/gene@no-such", "hf-hub:owner/gene@no-such could not be downloaded"),
    "hub-repository": ("hf-hub:owner/nothing", "hf-hub:owner/nothing could not be downloaded"),
    "hub-digest": ("hf-hub:owner/gene@FIRST#sha256=" + 64 * "0", "it is another file"),
    "hub-name": ("hf-hub:gene", "expected hf-hub:owner/name[/file][@revision]"),
}
MADE = {
    "hub": (["--load-gene", "hf-hub:owner/gene@FIRST"], "TLEG learngene (learngene file), L4-H2"),
    "hub-ema": (
        ["--load-gene", "hf-hub:owner/gene@FIRST", "--gene-ema"],
        "TLEG learngene (learngene file, averaged weights), L4-H2",
    ),
}
STAGE_2 = [
    "--data-set",
    "DIGITS",
    "--epochs",
    "0",
    "--num-workers",
    "0",
    "--batch-size",
    "64",
    "--model",
    "deit_nano_patch4_16_L2",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> tuple[dict[str, Outcome], Server]:
    """What all the runs of main.py said."""
    folder = tmp_path_factory.mktemp("addresses")
    files = {}
    for name, averaged in (("learngene.safetensors", False), ("learngene_ema.safetensors", True)):
        aux_net = models.create_model("aux_deit_nano_patch4_16_L4", num_classes=10)
        models.Learngene.of(aux_net, averaged=averaged).save(folder / name)
        files[name] = (folder / name).read_bytes()
    with serving(Server()) as server, HubStandIn() as hub, pytest.MonkeyPatch.context() as patch:
        first = hub.add("owner/gene", files)
        hub.add("owner/gene", {"learngene.safetensors": b""})
        for name, value in {**hub.environment(folder / "hub"), "TORCH_HOME": str(folder)}.items():
            patch.setitem(ENVIRONMENT, name, value)
        runs = {
            name: ["--load-gene", address.replace("SERVER", server.address).replace("FIRST", first)]
            for name, (address, _) in REFUSED.items()
        }
        runs |= {name: [option.replace("FIRST", first) for option in options] for name, (options, _) in MADE.items()}
        runs = {name: Run([*STAGE_2, *options]) for name, options in runs.items()}
        runs["two-processes"] = Run([*STAGE_2, "--load-gene", f"{server.address}/gene.pth"], processes=2)
        return run_many(runs, folder / "runs"), server


@pytest.mark.parametrize("name", REFUSED)
def test_address_without_a_learngene_is_one_sentence(outcomes, name):
    outcome = outcomes[0][name]
    assert outcome.codes == [2]
    assert REFUSED[name][1] in outcome.stderr
    assert outcome.stderr.count("error:") == 1
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("name", MADE)
def test_learngene_from_the_hub(outcomes, name):
    outcome = outcomes[0][name]
    assert outcome.codes == [0], outcome.stderr
    assert MADE[name][1] in outcome.stdout


def test_processes_of_a_run_download_once(outcomes):
    outcome, server = outcomes[0]["two-processes"], outcomes[1]
    # its heads have 4 neurons, those of the Des-Net 32: the run ends after the download
    assert outcome.codes == [2, 2]
    assert "the size of a head" in outcome.stderr
    assert outcome.stderr.count("downloading") == 1
    assert server.asked.count(None) == 4  # once for this run, and once for each of the other answers


@pytest.mark.full
def test_hub_file_is_there_when_the_hub_is_not(tmp_path, monkeypatch):
    """In processes of their own: huggingface_hub reads its address once, when it is imported."""
    code = "import sys, common.download as d; print(d.fetch(sys.argv[1]).read_bytes().decode())"

    def fetch(environment: dict[str, str], address: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, address]
        root = Path(__file__).parents[2]
        return subprocess.run(command, env={**ENVIRONMENT, **environment}, cwd=root, capture_output=True, text=True)

    with HubStandIn() as hub:
        hub.add("owner/vit", {"model.safetensors": b"weights"})
        environment = hub.environment(tmp_path / "hub")
        assert fetch(environment, "hf-hub:owner/vit").stdout == "weights\n"
    for offline in ("0", "1"):
        environment["HF_HUB_OFFLINE"] = offline
        assert fetch(environment, "hf-hub:owner/vit").stdout == "weights\n"
        missing = fetch(environment, "hf-hub:owner/other")
        assert "hf-hub:owner/other is not in the local cache, and the Hub is unreachable" in missing.stderr
