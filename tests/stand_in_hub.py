"""A stand-in for the Hugging Face Hub on this machine: repositories in memory behind the Hub's own requests.

    with StandInHub() as hub:
        environment = hub.environment(home)

It answers what `huggingface_hub` asks when it creates, uploads, lists and downloads models (with Xet turned off), keeps
commits atomic, checks the digest of every large file and the metadata of every card, logs each request, and can be told
to fail. `python tests/stand_in_hub.py [PORT]` serves until it is stopped, to try `wkv publish` by hand.
"""

import base64
import hashlib
import json
import re
import sys
import tempfile
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from stand_in_hub_cards import check_card, check_eval_results

USER, TOKEN = "somebody", "a-token-of-the-stand-in"
# What the Hub keeps apart from git: these by their name, everything else by its size.
LARGE = re.compile(r"\.(safetensors|bin|pth|pt|gguf|png)$")
REGULAR_BYTES = 5_000_000
REPO = r"(?P<repo>[^/]+/[^/]+?)"


class RefusedError(Exception):
    """An answer other than 200, with the headers that tell the client which error it is."""

    def __init__(self, status: int, message: str, code: str = "", body: dict | None = None, **headers: str):
        super().__init__(message)
        # The client shows the first of them, and takes the second for the kind of error.
        self.headers = headers | {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.status, self.body = status, body or {"error": message}


class Request(NamedTuple):
    """What was asked: method, path with its query, bytes of the body."""

    method: str
    path: str
    size: int


class File(NamedTuple):
    """Contents of a file in a commit, and whether they are kept as a large file."""

    data: bytes
    is_large: bool

    @property
    def oid(self) -> str:
        """The digest by which the Hub compares files."""
        if self.is_large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


class Repo:
    """The commits of a repository and the branches that point to them."""

    def __init__(self, name: str, private: bool):
        self.private = private
        first = hashlib.sha1(name.encode()).hexdigest()
        self.commits = {first: {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}}
        self.branches = {"main": first}

    def sha(self, revision: str) -> str:
        """The commit that a branch or a commit's name stands for; raises RefusedError."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision: str = "main") -> dict[str, File]:
        """The files of a revision by their paths."""
        return self.commits[self.sha(revision)]


class StandInHub:
    """The repositories, the large files that were uploaded, the log, and the faults to show."""

    def __init__(self, port: int = 0):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[Request] = []
        # (errors, warnings) of every card that was sent.
        self.verdicts: list[tuple[list[str], list[str]]] = []
        # Status with which every request that writes is refused.
        self.refuse_writes: int | None = None
        # Words in the paths of requests that fail once with status 503.
        self.fail_once: set[str] = set()
        # The number of the upload that stops half way until `go_on` is set; `stopped` is set when it has come to that.
        self.stop_in_upload: int | None = None
        self.stopped, self.go_on = threading.Event(), threading.Event()
        self.uploads = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "StandInHub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home) -> dict[str, str]:
        """Variables with which a process takes this for the Hub; `home` is an empty folder for its caches."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}

    def sent(self, method: str, words: str = "") -> list[Request]:
        """The logged requests of a method whose path holds the words."""
        return [request for request in self.log if request.method == method and words in request.path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def log_message(self, *_):
        pass

    def _answer(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        try:
            body = self._body(path)
            self.hub.log.append(Request(self.command, self.path, len(body)))
            self._authorise(path)
            for methods, pattern, answer in ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    with self.hub.lock:
                        return answer(self, body, **match.groupdict())
            raise RefusedError(404, "no such page")
        except RefusedError as refusal:
            return self._send(json.dumps(refusal.body).encode(), refusal.status, **refusal.headers)
        except ConnectionError:
            self.close_connection = True

    def _body(self, path: str) -> bytes:
        size = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and path.startswith("/large/"):
            self.hub.uploads += 1
            if self.hub.uploads == self.hub.stop_in_upload:
                self.rfile.read(size // 2)
                self.hub.stopped.set()
                self.hub.go_on.wait()
                raise ConnectionError
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(size)
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _authorise(self, path: str) -> None:
        for word in self.hub.fail_once:
            if word in path:
                self.hub.fail_once.discard(word)
                raise RefusedError(503, "try again")
        if self.command in ("GET", "HEAD") or path == "/api/validate-yaml" or path.startswith("/large/"):
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusedError(401, "Invalid credentials in Authorization header")
        if self.hub.refuse_writes:
            raise RefusedError(self.hub.refuse_writes, "You don't have the rights to write to this repository")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise RefusedError(404 if repo is None else 401, "Repository not found", "RepoNotFound")
        return repo

    def _send(self, data: bytes, status: int = 200, kind: str = "application/json", **headers: str):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, content) -> None:
        self._send(json.dumps(content).encode())

    def whoami(self, body):
        access = {"displayName": "test", "role": "write"}
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token", "accessToken": access}})

    def validate(self, body):
        errors, warnings = check_card(json.loads(body)["content"])
        self.hub.verdicts.append((errors, warnings))
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        if errors:
            raise RefusedError(400, "Invalid metadata in README.md", body=answer)
        self._json(answer)

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if not name.startswith(f"{USER}/"):
            raise RefusedError(
                403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}"
            )
        if name in self.hub.repos:
            raise RefusedError(409, "You already created this model repo", body=answer | {"error": "exists"})
        self.hub.repos[name] = Repo(name, private=asked.get("visibility") == "private")
        self._json(answer)

    def branch(self, body, repo, branch):
        found = self._repo(repo)
        if branch in found.branches:
            raise RefusedError(409, "Reference already exists")
        found.branches[branch] = found.branches["main"]
        self._json({})

    def info(self, body, repo, revision="main"):
        found = self._repo(repo)
        sha = found.sha(revision or "main")
        siblings = [{"rfilename": path} for path in found.commits[sha]]
        self._json(
            {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "tags": [], "siblings": siblings}
        )

    def tree(self, body, repo, revision, folder):
        rows = []
        for path, file in self._repo(repo).files(revision).items():
            if path.startswith(f"{folder}/" if folder else ""):
                large = {"lfs": {"oid": file.oid, "size": len(file.data), "pointerSize": 130}} if file.is_large else {}
                rows.append({"type": "file", "path": path, "size": len(file.data), "oid": file.oid, **large})
        if not rows:
            raise RefusedError(404, f"{folder} does not exist", "EntryNotFound")
        self._json(rows)

    def preupload(self, body, repo, revision):
        files, answer = self._repo(repo).files(revision), []
        for asked in json.loads(body)["files"]:
            is_large = bool(LARGE.search(asked["path"])) or asked["size"] > REGULAR_BYTES
            there = files[asked["path"]].oid if asked["path"] in files else None
            mode = "lfs" if is_large else "regular"
            answer.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there})
        self._json({"files": answer})

    def batch(self, body, repo):
        self._repo(repo)
        objects = json.loads(body)["objects"]
        for wanted in objects:
            # What is there already needs no action.
            if wanted["oid"] not in self.hub.large:
                upload = {"href": f"{self.hub.url}/large/{wanted['oid']}", "header": {}}
                wanted["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/large-verify", "header": {}}}
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "the contents do not have this sha256")
        self.hub.large[oid] = body
        self._json({})

    def verify(self, body):
        asked = json.loads(body)
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(404, "not uploaded")
        self._json({})

    def commit(self, body, repo, revision):
        found = self._repo(repo)
        head = found.sha(revision)
        header, *changes = (json.loads(line) for line in body.splitlines())
        if header["key"] != "header" or not header["value"]["summary"]:
            raise RefusedError(400, "a commit begins with its header")
        if header["value"].get("parentCommit", head) != head:
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.commits[head])
        for change in changes:
            self._apply(files, change["key"], change["value"])
        sha = hashlib.sha1(head.encode() + body).hexdigest()
        found.commits[sha], found.branches[revision] = files, sha
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: dict[str, File], key: str, value: dict) -> None:
        path = value["path"]
        if key == "deletedFile":
            if files.pop(path, None) is None:
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large:
                raise RefusedError(400, f"{path} was not uploaded")
            files[path] = File(self.hub.large[value["oid"]], True)
        else:
            files[path] = File(base64.b64decode(value["content"]), False)
            text = files[path].data.decode(errors="replace")
            errors = check_card(text)[0] if path == "README.md" else []
            if re.fullmatch(r"\.eval_results/.*\.yaml", path):
                errors = check_eval_results(text)
            if errors:
                raise RefusedError(400, f"{path}: {errors[0]}")

    def resolve(self, body, repo, revision, path):
        found = self._repo(repo)
        sha = found.sha(revision)
        if path not in found.commits[sha]:
            raise RefusedError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        file = found.commits[sha][path]
        data, total, status = file.data, len(file.data), 200
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if file.is_large:
            headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(total)}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or total), total - 1)
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        self._send(data, status, "application/octet-stream", **headers)


MODEL = rf"/api/models/{REPO}"
READ = ("GET", "HEAD")
for _method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
    setattr(_Handler, f"do_{_method}", _Handler._answer)
ROUTES = [
    (READ, "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), rf"{MODEL}/branch/(?P<branch>.+)", _Handler.branch),
    (("POST",), rf"{MODEL}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), rf"{MODEL}/commit/(?P<revision>.+)", _Handler.commit),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/large/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    (("POST",), "/large-verify", _Handler.verify),
    (READ, rf"{MODEL}(?:/revision/(?P<revision>.+))?", _Handler.info),
    (READ, rf"{MODEL}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", _Handler.tree),
    (READ, rf"/(?:api/resolve-cache/models/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


if __name__ == "__main__":
    with StandInHub(int(sys.argv[1]) if len(sys.argv) > 1 else 0) as standing_in:
        for variable, text in standing_in.environment(tempfile.mkdtemp()).items():
            print(f"export {variable}={text}", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
