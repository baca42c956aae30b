"""A Hub on this machine that speaks as much of the API as a download needs, and fails when it is told to.

``HF_ENDPOINT`` is read when huggingface_hub is first imported, so it is used in a process of its own: start it there,
set the variable, and import saetrack afterwards.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = int | str | dict[str, str]


class HubServer(ThreadingHTTPServer):
    """Repositories with branches of files.

    ``faults`` maps a request, written as ``"GET branch/file"`` or ``"INFO branch"``, to what goes wrong the next times:
    a number is an HTTP status, ``"cut"`` closes the connection in the middle of the answer, ``"flip"`` sends other
    bytes, and headers are sent with status 429.
    ``asked`` lists the requests in the same words, those for a part of a file with `` from N``.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.branches: dict[str, dict[str, bytes]] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.asked: list[str] = []
        self.stopped = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop(self) -> None:
        """From now on connections are refused, and those that are open are dropped."""
        self.stopped = True
        self.shutdown()
        self.server_close()

    def commit(self, branch: str) -> str:
        content = repr(sorted((name, hashlib.sha256(c).hexdigest()) for name, c in self.branches[branch].items()))
        return hashlib.sha1(content.encode()).hexdigest()

    def branch(self, revision: str) -> str | None:
        return next((b for b in self.branches if revision in (b, self.commit(b))), None)


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.server.stopped:
            self.close_connection = True
            return
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/me/llm(?:/revision/(.+))?", path):
            self._info(match[1] or "main")
        elif path == "/api/models/me/llm/refs":
            refs = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": self.server.commit(b)} for b in self.branches]
            self._answer({"branches": refs, "converts": [], "tags": []})
        elif match := re.fullmatch(r"/me/llm/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2])
        else:
            self._answer({"error": "no such repository"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    @property
    def branches(self) -> dict[str, dict[str, bytes]]:
        return self.server.branches

    def _info(self, revision: str) -> None:
        branch = self.server.branch(revision)
        fault = self._fault(f"INFO {branch or revision}")
        if isinstance(fault, int | dict):
            return self._refuse(fault)
        if branch is None:
            return self._answer({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
        siblings: list[dict[str, Any]] = []
        for name, content in self.branches[branch].items():
            large = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
            siblings.append({"rfilename": name, "size": len(content), **({"lfs": large} if _is_large(name) else {})})
        said = {"id": "me/llm", "sha": self.server.commit(branch), "siblings": siblings}
        return self._answer(said, cut=20 if fault == "cut" else None)

    def _file(self, revision: str, name: str) -> None:
        branch = self.server.branch(revision)
        if branch is None:
            return self._answer({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if name not in self.branches[branch]:
            return self._answer({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = self.branches[branch][name]
        digest = (hashlib.sha256 if _is_large(name) else hashlib.sha1)(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": self.server.commit(branch)}
        if self.command == "HEAD":
            return self._answer(content, headers=headers)
        part = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(part[1]) if part else 0
        fault = self._fault(f"GET {branch}/{name}", f" from {begin}" if part else "")
        if isinstance(fault, int | dict):
            return self._refuse(fault)
        if part:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        sent = bytes(255 - byte for byte in content) if fault == "flip" else content
        return self._answer(sent[begin:], 206 if part else 200, headers, len(content) // 2 if fault == "cut" else None)

    def _refuse(self, fault: int | dict[str, str]) -> None:
        if isinstance(fault, dict):
            return self._answer({}, 429, fault)
        return self._answer({}, fault, {"Retry-After": "0"})

    def _fault(self, request: str, detail: str = "") -> Fault | None:
        self.server.asked.append(request + detail)
        waiting = self.server.faults.get(request, [])
        return waiting.pop(0) if waiting else None

    def _answer(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        return


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))
