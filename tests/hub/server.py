"""A small Hugging Face Hub on localhost: the part of its HTTP protocol that pushing and loading use.

create -> preupload (regular or LFS?) -> LFS batch, PUT, verify -> commit (NDJSON) -> info, tree, resolve

Everything is kept in memory. The sha256 and size of uploaded LFS objects are verified, a commit may refer only to
uploaded objects, and writing, or reading a private repository, requires the `TOKEN`. As on the real Hub, LFS
objects are in a storage service at another address, which must never receive the token.
"""

import base64
import hashlib
import json
import re
import threading
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repository import Repository, StoredFile, blob_id

TOKEN = "hf_local"
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".gz", ".zip", ".npz", ".msgpack", ".h5", ".onnx")
LFS_SIZE = 10_000_000  # size in bytes from which files are uploaded by LFS

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets)/{REPO}"
FILE = rf"/(?:(?P<kind>datasets)/)?{REPO}"
ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", rf"{FILE}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", r"/lfs/verify", "lfs_verify"),
    ("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"{FILE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)
STORAGE_ROUTES = (
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_download"),
)
OPEN_POSTS = ("validate_yaml", "paths_info")


class HubError(Exception):
    """An error response: HTTP status, the Hub's error code, and a message."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """``with HubServer() as hub:`` serves at ``hub.url``, and LFS objects at ``hub.storage_url``.

    ``hub.repositories`` maps "models/user/name" to its `Repository`, and ``hub.requests`` lists (method, path) of all
    requests.
    """

    def __init__(self):
        self.servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (handler,), {"hub": self}))
            for handler in (Handler, StorageHandler)
        ]
        hub, storage = (server.server_port for server in self.servers)
        # Another host too: huggingface_hub 1.33 withholds the token from other hosts, 2.x also from other ports.
        self.url, self.storage_url = f"http://127.0.0.1:{hub}", f"http://localhost:{storage}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.expected_sizes: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()

    def __enter__(self):
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()  # s until it sees the end
        return self

    def __exit__(self, *error):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: str) -> dict[str, str]:
        """Environment variables that make a process a client of this server, with its cache in ``home``."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class Handler(BaseHTTPRequestHandler):
    """One method for each of `ROUTES`; it returns (status, body, headers)."""

    protocol_version = "HTTP/1.1"
    # A response is one packet: a body in a second one would wait 40 ms for the acknowledgement of the headers.
    wbufsize = -1
    disable_nagle_algorithm = True
    routes = ROUTES
    hub: HubServer

    def log_message(self, *args) -> None:
        """Print nothing; `HubServer.requests` has all requests."""

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def answer(self, method: str) -> None:
        """Find the route, run its method, and send the result."""
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.body = self.read_body()
        try:
            with self.hub.lock:
                self.hub.requests.append((self.command, url.path))
                status, body, headers = self.route(method, url.path)
        except HubError as error:
            status, body = error.status, {"error": str(error)}
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            blocks = []
            while size := int(self.rfile.readline(), 16):
                blocks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(blocks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def route(self, method: str, path: str):
        for verb, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                if method == "POST" and name not in OPEN_POSTS and not self.authorized():
                    raise HubError(401, "Unauthorized", "Invalid username or password.")
                return getattr(self, name)(**{key: unquote(value or "") for key, value in match.groupdict().items()})
        raise HubError(404, "NotFound", f"no route for {method} {path}")

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, kind: str, repo: str) -> Repository:
        found = self.hub.repositories.get(f"{kind or 'models'}/{repo}")
        if found is None or (found.private and not self.authorized()):
            raise HubError(404, "RepoNotFound", "Repository not found")
        return found

    def revision(self, repository: Repository, revision: str) -> tuple[str, dict[str, StoredFile]]:
        sha = repository.head if revision in ("", "main") else revision
        if sha not in repository.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    # Writing

    def create(self):
        wanted = json.loads(self.body)
        kind = wanted.get("type") or "model"
        repo = f"{wanted['organization']}/{wanted['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{self.hub.url}/{prefix}{repo}"
        if f"{kind}s/{repo}" in self.hub.repositories:
            return 409, {"error": "You already created this repo", "url": url}, {}
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repository = self.hub.repositories[f"{kind}s/{repo}"] = Repository(private=bool(private))
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repository.add({".gitattributes": StoredFile(rules.encode(), lfs=False)}, "initial commit")
        return 200, {"url": url, "name": repo}, {}

    def validate_yaml(self):
        if not re.match(r"---\n.*?\n---\n", json.loads(self.body)["content"], re.DOTALL):
            return 400, {"errors": [{"message": "a card starts with a YAML block"}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def preupload(self, kind: str, repo: str, revision: str):
        _, present = self.revision(self.repository(kind, repo), revision)
        files = []
        for file in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(file["sample"])
            large = binary or file["path"].endswith(LFS_SUFFIXES) or file["size"] >= LFS_SIZE
            stored = present.get(file["path"])
            oid = None if stored is None else stored.sha256 if stored.lfs else stored.oid
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}, {}

    def lfs_batch(self, kind: str, repo: str):
        self.repository(kind, repo)
        wanted = json.loads(self.body)
        if wanted["operation"] != "upload" or "basic" not in wanted["transfers"]:
            raise HubError(422, "BadRequest", "only basic uploads are served")
        objects = []
        for item in wanted["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                self.hub.expected_sizes[item["oid"]] = item["size"]
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.storage_url}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_verify(self):
        wanted = json.loads(self.body)
        self.check_object(wanted["oid"], wanted["size"])
        return 200, {}, {}

    def check_object(self, oid: str, size: int) -> bytes:
        content = self.hub.objects.get(oid)
        if content is None or len(content) != size:
            raise HubError(400, "BadRequest", f"LFS object {oid} of {size} bytes was not uploaded")
        return content

    def commit(self, kind: str, repo: str, revision: str):
        repository = self.repository(kind, repo)
        sha, files = self.revision(repository, revision)
        if sha != repository.head:
            raise HubError(412, "PreconditionFailed", "commits go on top of main")
        files, summary = dict(files), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            action, value = operation["key"], operation["value"]
            if action == "header":
                summary = value["summary"]
            elif action == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), lfs=False)
            elif action == "lfsFile":
                files[value["path"]] = StoredFile(self.check_object(value["oid"], value["size"]), lfs=True)
            elif action == "deletedFile":
                del files[value["path"]]
            elif action == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: file for path, file in files.items() if not path.startswith(folder)}
            else:
                raise HubError(400, "BadRequest", f"unknown operation {action}")
        sha = repository.add(files, summary)
        return 200, {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"}, {}

    # Reading

    def info(self, kind: str, repo: str, revision: str):
        repository = self.repository(kind, repo)
        sha, files = self.revision(repository, revision)
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        siblings = [{"rfilename": path, "size": len(file.content)} for path, file in sorted(files.items())]
        answer = {"id": repo, "sha": sha, "private": repository.private, "gated": False, "disabled": False}
        return 200, {**answer, "siblings": siblings, "tags": [], "lastModified": now, "createdAt": now}, {}

    def tree(self, kind: str, repo: str, revision: str, path: str):
        _, files = self.revision(self.repository(kind, repo), revision)
        prefix = path.rstrip("/") + "/" if path else ""
        inside = {name: file for name, file in sorted(files.items()) if name.startswith(prefix)}
        if path and not inside:
            raise HubError(404, "EntryNotFound", f"{path} does not exist")
        recursive = self.query.get("recursive", "").lower() == "true"
        entries = [folder for folder in self.folders(inside) if len(folder["path"]) >= len(prefix)]
        entries += [file.describe(name) for name, file in inside.items()]
        return 200, [e for e in entries if recursive or "/" not in e["path"][len(prefix) :]], {}

    def paths_info(self, kind: str, repo: str, revision: str):
        _, files = self.revision(self.repository(kind, repo), revision)
        wanted = parse_qs(self.body.decode())["paths"]
        entries = [file.describe(path) for path, file in files.items()] + self.folders(files)
        return 200, [entry for entry in entries if entry["path"] in wanted], {}

    def folders(self, files: dict[str, StoredFile]) -> list[dict]:
        """Folders that contain ``files``, as listed by the tree endpoint."""
        paths = {"/".join(path.split("/")[:n]) for path in files for n in range(1, path.count("/") + 1)}
        return [
            {"type": "directory", "path": path, "oid": blob_id(path.encode()), "size": 0} for path in sorted(paths)
        ]

    def resolve(self, kind: str, repo: str, revision: str, path: str):
        sha, files = self.revision(self.repository(kind, repo), revision)
        if path not in files:
            error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha}
            return 404, {"error": "Entry not found"}, error
        file = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if not file.lfs:
            return self.ranged(file.content, headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": len(file.content)}
        return 302, b"", {**headers, "Location": f"{self.hub.storage_url}/lfs/{file.sha256}"}

    def ranged(self, content: bytes, headers: dict):
        """The content, or the part requested by a Range header."""
        headers["Content-Type"] = "application/octet-stream"
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return 200, content, headers
        start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        return 206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}


class StorageHandler(Handler):
    """The storage service: its links are signed, so it needs no token, and rejects requests that send one."""

    routes = STORAGE_ROUTES

    def route(self, method: str, path: str):
        if "Authorization" in self.headers:
            raise HubError(400, "BadRequest", "the token was sent to the storage service")
        return super().route(method, path)

    def lfs_upload(self, oid: str):
        if oid not in self.hub.expected_sizes:
            raise HubError(403, "Forbidden", "no upload of this object was announced")
        if hashlib.sha256(self.body).hexdigest() != oid or len(self.body) != self.hub.expected_sizes[oid]:
            raise HubError(400, "BadRequest", "the object has another sha256 or size than announced")
        self.hub.objects[oid] = self.body
        return 200, {}, {}

    def lfs_download(self, oid: str):
        if oid not in self.hub.objects:
            raise HubError(404, "EntryNotFound", "no such object")
        return self.ranged(self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
