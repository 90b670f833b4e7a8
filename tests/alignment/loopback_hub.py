"""A model hub on the loopback interface: one repository, served as the real one does, and a log of what was asked."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopback"


class LoopbackHub:
    """Serves ``folder`` as ``org/tiny`` to whoever shows ``TOKEN``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, str | None]] = []
        """(method, path, Authorization) of every request."""
        self.address = ""

    def downloads(self) -> list[str]:
        """Names of the files whose content was sent."""
        return [path.rsplit("/", 1)[1] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]

    def answer(self, method: str, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content for one request."""
        self.asked.append((method, path, token))
        if token != f"Bearer {TOKEN}":
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}"
        if path.startswith("/api/models/org/tiny/revision/"):
            if path.rsplit("/", 1)[1] not in ("main", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            files = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            return 200, {}, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": files}).encode()
        if path == f"/api/models/org/tiny/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": self.tag(file)}
                for file in sorted(self.folder.iterdir())
            ]
            return 200, {}, json.dumps(tree).encode()
        for revision in ("main", COMMIT):
            start = f"/org/tiny/resolve/{revision}/"
            if path.startswith(start):
                file = self.folder / path.removeprefix(start)
                headers = {"X-Repo-Commit": COMMIT}
                if not file.is_file():
                    return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
                return 200, {**headers, "ETag": f'"{self.tag(file)}"'}, file.read_bytes()
        if "/org/gated/" in path:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        revision_lost = path.startswith("/org/tiny/resolve/")
        return 404, {"X-Error-Code": "RevisionNotFound" if revision_lost else "RepoNotFound"}, b"{}"

    @staticmethod
    def tag(file: Path) -> str:
        return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def serve(folder: Path) -> Iterator[LoopbackHub]:
    """A running hub, whose ``address`` is for HF_ENDPOINT."""
    hub = LoopbackHub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            path = unquote(urlsplit(self.path).path)
            status, headers, content = hub.answer(self.command, path, self.headers.get("Authorization"))
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = reply  # noqa: N815 - the names that http.server calls

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
