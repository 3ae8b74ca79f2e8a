"""A server that speaks as much of the Hugging Face hub's protocol as fetching a repository needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import override

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_of(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repositories; the endpoint, and the files asked for (``repository/file``)."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def _serve(self, *, with_body: bool) -> None:
            path = self.path.split("?")[0].removeprefix("/")
            for name, folder in repositories.items():
                files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
                if path in (f"api/models/{name}", f"api/models/{name}/revision/main"):
                    siblings = [{"rfilename": file} for file in sorted(files)]
                    body = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
                    return self._answer(200, body, {"Content-Type": "application/json"}, with_body=with_body)
                if path.startswith(f"api/models/{name}/tree/"):
                    entries = [
                        {"type": "file", "path": key, "size": file.stat().st_size, "oid": _etag(file)}
                        for key, file in sorted(files.items())
                    ]
                    headers = {"Content-Type": "application/json"}
                    return self._answer(200, json.dumps(entries).encode(), headers, with_body=with_body)
                for revision in (COMMIT, "main"):
                    wanted = path.removeprefix(f"{name}/resolve/{revision}/")
                    if wanted in files:
                        if with_body:
                            asked.append(f"{name}/{wanted}")
                        headers = {"ETag": f'"{_etag(files[wanted])}"', "X-Repo-Commit": COMMIT}
                        return self._answer(200, files[wanted].read_bytes(), headers, with_body=with_body)
            body = b'{"error": "Repository not found"}'
            self._answer(404, body, {"X-Error-Code": "RepoNotFound"}, with_body=with_body)

        def do_GET(self) -> None:
            self._serve(with_body=True)

        def do_HEAD(self) -> None:
            self._serve(with_body=False)

        @override
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
