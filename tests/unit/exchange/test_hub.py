"""A track goes to the Hub and comes back, through huggingface_hub, against a small Hub on this machine."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from saetrack.exchange import ImportedFacts, export_track, import_sae
from saetrack.hub import HubFolder
from saetrack.sae import StandardSAE
from saetrack.sae.formats import WRITERS, Origin
from saetrack.track import Track

COMMIT = "c0ffee" + "0" * 34


class SmallHub(ThreadingHTTPServer):
    """Repositories of ``me``: takes commits, lists their files and serves them; remembers what was fetched."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: SmallHub

    @property
    def repository(self) -> str:
        """The name in the path of the request; none has more parts than these."""
        found = re.search(r"^/(?:api/models/)?me/([\w-]+)", self.path)
        return found[1] if found else ""

    @property
    def files(self) -> dict[str, bytes]:
        return self.server.repositories[self.repository]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/api/repos/create"):
            name = json.loads(body)["name"]
            self.server.repositories.setdefault(name, {})
            self.answer({"url": f"http://127.0.0.1/me/{name}", "id": f"me/{name}"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"http://127.0.0.1/me/{self.repository}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.repository not in self.server.repositories:
            return self.answer({"error": "no"}, 404, {"X-Error-Code": "RepoNotFound"})
        if "/resolve/" in path:
            name = path.split("/", 5)[5]
            if name not in self.files:
                return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            content = self.files[name]
            self.server.fetched += [f"{self.repository}/{name}"] if self.command == "GET" else []
            etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.answer(content, headers=etag)
        if "/tree/" in path:
            blobs = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in self.files.items()]
            return self.answer(blobs)
        siblings = [{"rfilename": name} for name in self.files]
        return self.answer({"id": f"me/{self.repository}", "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    server = SmallHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def track(tmp_path: Path) -> Track:
    """A track of one snapshot, from a file of SAELens."""
    sae = StandardSAE(4, 3)
    for value in sae.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(2)))
    (tmp_path / "sae").mkdir()
    WRITERS["saelens"](sae.requires_grad_(False), tmp_path / "sae", Origin("org/llm", "step64", "gpt_neox.layers.1"))
    return import_sae(str(tmp_path / "sae"), tmp_path / "track", ImportedFacts())


def saetrack_with_hub(code: str, hub: SmallHub, tmp_path: Path) -> str:
    """What Python prints, in a process of its own: huggingface_hub reads where the Hub is once, when it is imported."""
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    changes = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_test"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **changes}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_track_is_pushed_and_opened_from_the_hub_and_snapshots_are_downloaded_when_asked_for(
    hub: SmallHub, track: Track, tmp_path: Path
) -> None:
    code = f"""

from saetrack.cli import main
from saetrack.track import Track
main(["export", {str(track.path)!r}, "--format", "saetrack", "--to", {str(tmp_path / "out")!r}, "--push", "me/tracked"])
track = Track.open("hf://me/tracked")
print("steps", track.steps, track[0].metadata["warm_start"])
fetched = [p.name for p in track[0].path.iterdir()]
print("before", sorted(fetched))
print("sum", float(track[0].sae().W_dec.sum()))
print("after", sorted(p.name for p in track[0].path.iterdir()))
main(["import", "me/tracked/snapshots/0000-step64", "--as", {str(tmp_path / "again")!r}])
try:
    Track.open("hf://me/nothing")
except FileNotFoundError as error:
    print("absent", error)
"""
    out = saetrack_with_hub(code, hub, tmp_path)
    assert "README.md" in hub.repositories["tracked"]
    assert "steps [64] imported" in out
    assert "before ['metadata.json']" in out
    assert f"sum {float(track[0].sae().W_dec.sum())}" in out
    assert "after ['metadata.json', 'sae_weights.safetensors']" in out
    assert torch.equal(Track.open(tmp_path / "again")[0].sae().W_dec, track[0].sae().W_dec)
    absent = next(line for line in out.splitlines() if line.startswith("absent"))
    assert "hf://me/nothing is neither in the Hub's cache nor on a Hub that can be reached" in absent


def test_every_format_goes_to_the_hub_and_comes_back_and_no_other_folder_is_downloaded(
    hub: SmallHub, track: Track, tmp_path: Path
) -> None:
    hub.repositories["sparsify"] = {"step1/gpt_neox.layers.1/sae.safetensors": b"large", "step1/a/b/cfg.json": b"{}"}
    code = f"""
from pathlib import Path
import torch
from saetrack.cli import main
from saetrack.exchange import ImportedFacts, import_sae
from saetrack.track import Track

facts = ImportedFacts("org/llm", None, 64, "gpt_neox.layers.1")
x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
wanted = Track.open({str(track.path)!r})[0].sae()(x)
for library in {[*WRITERS]}:
    folder = Path({str(tmp_path)!r}, library)
    main(["export", {str(track.path)!r}, "--format", library, "--to", str(folder), "--push", "me/" + library])
    there = f"me/{{library}}/step64/gpt_neox.layers.1"
    for address in (there, f"hf://{{there}}@main", *[there + "/ae.pt"] * (library == "dictionary_learning")):
        made = import_sae(address, folder / address.replace("/", "_"), facts)
        torch.testing.assert_close(made[0].sae()(x), wanted, rtol=1e-5, atol=1e-5)
        print("same", library, made[0].metadata["imported"]["format"])
    try:
        import_sae("me/" + library, folder / "root", facts)
    except FileNotFoundError as error:
        print("absent", error)
"""
    done = saetrack_with_hub(code, hub, tmp_path)
    lines = done.splitlines()
    assert [line.split() for line in lines if line.startswith("same")] == [
        ["same", library, library] for library in WRITERS for _ in range(2 + (library == "dictionary_learning"))
    ]
    absent = [line for line in lines if line.startswith("absent")]
    assert absent[0].endswith("it has some in step64/gpt_neox.layers.1: type me/saelens/step64/gpt_neox.layers.1.")
    assert "it has some in step1/a/b, step64/gpt_neox.layers.1: type me/sparsify/step1/a/b." in absent[1]
    assert not [name for name in hub.fetched if "step1/" in name]


def test_offline_a_track_opens_from_the_cache_of_the_hub(
    track: Track, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--me--tracked"
    export_track(track, "saetrack", "all", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for module in ("_snapshot_download", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    opened = Track.open("hf://me/tracked")
    assert opened.steps == [64]
    assert torch.equal(opened.decoder(), track.decoder())


@pytest.mark.parametrize("address", ["hf://", "hf://name", "hf://a/b/../c", "hf://a/b@"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is no address on the Hub; expected hf://owner/name"):
        HubFolder.open(address, ["*"])


def test_offline_an_unknown_repository_is_one_line() -> None:
    with pytest.raises(FileNotFoundError, match="hf://nobody/nothing is neither in the Hub's cache nor") as error:
        Track.open("hf://nobody/nothing")
    assert "\n" not in str(error.value)
