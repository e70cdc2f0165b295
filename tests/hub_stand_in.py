"""A Hugging Face Hub on this machine: repositories in memory, behind the HTTP interface of huggingface.co.

Those of data sets have names that begin with ``datasets/``. They can be read only.

The huggingface_hub library works with it as it is, in a process whose environment has `HubStandIn.environment`:

    with HubStandIn() as hub:
        revision = hub.add("owner/vit", {"config.json": b"{}"})
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})
        hub.files("owner/vit")["model.safetensors"]
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".parquet", ".tar")  # files that do not go into git, but into its Large File Storage


class Answer(NamedTuple):
    content: bytes | dict | list  # JSON, unless it is bytes
    status: int = 200
    headers: Mapping[str, str] = {}


class HubError(Exception):
    """An answer that refuses, with the headers by which huggingface_hub tells one error from another."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "", **content: object):
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        sent = {"X-Request-Id": "Root=1-0", **{name: value for name, value in headers.items() if value}}
        self.answer = Answer({"error": message, **content}, status, sent)


def oid(path: str, content: bytes) -> str:
    """The name of a file's content: LFS's of a large file, git's of any other."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub = self.server.hub
        hub.requests.append(f"{self.command} {self.path}")
        try:
            content, status, headers = hub.answer(self)
        except HubError as error:
            content, status, headers = error.answer
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `HubStandIn.requests` has it all."""


class HubStandIn:
    """The repositories, and the server that answers inside the ``with`` block.

    Args:
        token: the only one that is valid. Writing needs it, reading does not, but no other is accepted for either.
        user: whose token it is, and the only namespace to write in.
    """

    def __init__(self, token: str = "hf_test", user: str = "owner"):
        self.token, self.user = token, user
        self.requests: list[str] = []  # "METHOD path" of each, as they arrived
        self.in_git: set[str] = set()  # paths of large files that lie in git all the same
        self._repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repository → revision, newest last → path → content
        self._lfs: dict[str, bytes] = {}  # SHA-256 → content
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The variables by which a process uses this hub alone, with its cache in ``home``."""
        reach = {"HF_ENDPOINT": self.address, "HF_TOKEN": self.token, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        disabled = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"), "1")
        return {**reach, **disabled, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}

    def add(self, repo_id: str, files: Mapping[str, bytes]) -> str:
        """Commit ``files`` to a repository, that is created if it is not there, and return the new revision."""
        revisions = self._repos.setdefault(repo_id, {"": {}})  # before the first commit: no files
        parent = [*revisions][-1]
        tree = {**revisions[parent], **files}
        listing = [repo_id, parent, *(f"{oid(path, content)} {path}" for path, content in tree.items())]
        revision = hashlib.sha1("\n".join(listing).encode()).hexdigest()
        revisions[revision] = tree
        return revision

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path → content.

        Raises:
            HubError: there is no such repository or revision.
        """
        commit = self._resolve(repo_id, revision)
        return self._repos[repo_id][commit]

    def answer(self, request: Handler) -> Answer:
        if request.headers.get("Authorization", f"Bearer {self.token}") != f"Bearer {self.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        asked = f"{request.command} {urlsplit(request.path).path}"
        for pattern, answer in ROUTES.items():
            if match := re.fullmatch(pattern, asked):
                return answer(self, request, **{name: unquote(value) for name, value in match.groupdict().items()})
        raise HubError(404, f"not in the stand-in: {asked}")

    def _resolve(self, repo_id: str, revision: str) -> str:
        if repo_id not in self._repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if revision == "main":
            return [*self._repos[repo_id]][-1]
        if revision not in self._repos[repo_id]:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return revision

    def _require_writer(self, request: Handler, repo_id: str) -> None:
        if "Authorization" not in request.headers:
            raise HubError(401, "Invalid username or password.")
        if repo_id.split("/")[0] != self.user:
            raise HubError(403, f"{self.user} has no right to write {repo_id}")

    def _whoami(self, request: Handler) -> Answer:
        self._require_writer(request, self.user)
        return Answer({"type": "user", "name": self.user, "orgs": []})

    def _info(self, request: Handler, repo_id: str, revision: str = "main") -> Answer:
        siblings = [self._sibling(path, content) for path, content in self.files(repo_id, revision).items()]
        return Answer({"id": repo_id, "sha": self._resolve(repo_id, revision), "siblings": siblings, "private": False})

    def _sibling(self, path: str, content: bytes) -> dict:
        """A file as an answer to ``files_metadata=True`` describes it."""
        sibling = {"rfilename": path, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
        if path.endswith(LARGE) and path not in self.in_git:
            sibling["lfs"] = {"size": len(content), "sha256": oid(path, content), "pointerSize": 134}
        return sibling

    def _dataset(self, request: Handler, repo_id: str, revision: str = "main") -> Answer:
        answer = self._info(request, f"datasets/{repo_id}", revision)
        return answer._replace(content={**answer.content, "id": repo_id, "downloads": 0, "likes": 0, "tags": []})

    def _file_of_dataset(self, request: Handler, repo_id: str, revision: str, path: str) -> Answer:
        return self._file(request, f"datasets/{repo_id}", revision, path)

    def _tree(self, request: Handler, repo_id: str, revision: str) -> Answer:
        files = self.files(repo_id, revision).items()
        return Answer([{"type": "file", "path": path, "size": len(it), "oid": oid(path, it)} for path, it in files])

    def _file(self, request: Handler, repo_id: str, revision: str, path: str) -> Answer:
        commit = self._resolve(repo_id, revision)
        content = self.files(repo_id, commit).get(path)
        if content is None:
            raise HubError(404, "Entry not found", "EntryNotFound", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid(path, content)}"'}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if part is None:
            return Answer(content, 200, headers)
        start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        if start > end:
            raise HubError(416, "Range Not Satisfiable")
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return Answer(content[start : end + 1], 206, headers)

    def _create(self, request: Handler) -> Answer:
        asked = json.loads(request.body)
        repo_id = f"{asked.get('organization') or self.user}/{asked['name']}"
        self._require_writer(request, repo_id)
        url = f"{self.address}/{repo_id}"
        if repo_id in self._repos:
            raise HubError(409, "You already created this model repo", url=url)
        self.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return Answer({"url": url, "name": repo_id})

    def _validate_yaml(self, request: Handler) -> Answer:
        """Of the metadata with which a README.md begins."""
        metadata = re.match(r"---\n(.*?)^---$", json.loads(request.body)["content"], re.DOTALL | re.MULTILINE)
        if metadata is None:
            return Answer({"warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            yaml.safe_load(metadata[1])
        except yaml.YAMLError as error:
            raise HubError(400, "Invalid metadata", errors=[{"message": str(error)}]) from error
        return Answer({})

    def _preupload(self, request: Handler, repo_id: str, revision: str) -> Answer:
        self._require_writer(request, repo_id)
        there = {path: oid(path, content) for path, content in self.files(repo_id, revision).items()}
        files = []
        for path in (file["path"] for file in json.loads(request.body)["files"]):
            mode = "lfs" if path.endswith(LARGE) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there.get(path)})
        return Answer({"files": files})

    def _lfs_batch(self, request: Handler, repo_id: str) -> Answer:
        self._require_writer(request, repo_id)
        objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in json.loads(request.body)["objects"]]
        for missing in (item for item in objects if item["oid"] not in self._lfs):
            missing["actions"] = {"upload": {"href": f"{self.address}/lfs/{missing['oid']}"}}
        return Answer({"transfer": "basic", "objects": objects})

    def _lfs_put(self, request: Handler, sha256: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != sha256:
            raise HubError(400, "the content does not have this SHA-256")
        self._lfs[sha256] = request.body
        return Answer(b"")

    def _commit(self, request: Handler, repo_id: str, revision: str) -> Answer:
        self._require_writer(request, repo_id)
        if revision != "main":
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = {}
        for operation in map(json.loads, request.body.splitlines()):
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and len(self._lfs.get(value["oid"], b"")) == value["size"]:
                files[value["path"]] = self._lfs[value["oid"]]
            elif key != "header":
                raise HubError(400, f"{key} of {value['path']}: not uploaded, or not in the stand-in")
        new = self.add(repo_id, files)
        return Answer({"commitOid": new, "commitUrl": f"{self.address}/{repo_id}/commit/{new}"})


REPO, REVISION = r"(?P<repo_id>[^/]+(/[^/]+)?)", r"(?P<revision>[^/]+)"
ROUTES = {
    r"GET /api/whoami-v2": HubStandIn._whoami,
    rf"GET /api/models/{REPO}": HubStandIn._info,
    rf"GET /api/models/{REPO}/revision/{REVISION}": HubStandIn._info,
    rf"GET /api/models/{REPO}/tree/{REVISION}": HubStandIn._tree,
    rf"GET /api/datasets/{REPO}": HubStandIn._dataset,
    rf"GET /api/datasets/{REPO}/revision/{REVISION}": HubStandIn._dataset,
    rf"(GET|HEAD) /datasets/{REPO}/resolve/{REVISION}/(?P<path>.+)": HubStandIn._file_of_dataset,
    rf"(GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)": HubStandIn._file,
    r"POST /api/repos/create": HubStandIn._create,
    r"POST /api/validate-yaml": HubStandIn._validate_yaml,
    rf"POST /api/models/{REPO}/preupload/{REVISION}": HubStandIn._preupload,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": HubStandIn._lfs_batch,
    r"PUT /lfs/(?P<sha256>[0-9a-f]{64})": HubStandIn._lfs_put,
    rf"POST /api/models/{REPO}/commit/{REVISION}": HubStandIn._commit,
}
