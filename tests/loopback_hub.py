"""A Hub on the loopback interface that serves the files of local folders, for the paths that begin with a model id."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


@contextmanager
def loopback_hub(repos: dict[str, Path]):
    """Serve `{"user/name": folder}`; gives the endpoint's address and the list of paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(path)
            for name, folder in repos.items():
                if path.startswith(f"api/models/{name}"):
                    files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                    return self.reply({"id": name, "sha": COMMIT, "siblings": files}, with_body)
                if path.startswith(f"{name}/resolve/"):
                    file = folder / path.split("/", 4)[4]
                    if file.is_file():
                        return self.send(file.read_bytes(), "application/octet-stream", with_body)
                    return self.reply({"error": "no such file"}, with_body, 404, "EntryNotFound")
            return self.reply({"error": "no such repository"}, with_body, 404, "RepoNotFound")

        def reply(self, content: object, with_body: bool, status: int = 200, code: str = "") -> None:
            self.send(json.dumps(content).encode(), "application/json", with_body, status, code)

        def send(self, body: bytes, kind: str, with_body: bool, status: int = 200, code: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
