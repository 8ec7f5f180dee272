"""The Hugging Face Hub, by a stand-in on this machine that answers as the real one does."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_saving import saved

from ucc_search.artifacts import find_artifact
from ucc_search.errors import ModelError
from ucc_search.hub import is_hub_id, push


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: just what creating, committing and downloading ask for."""

    repos: dict[str, dict[str, bytes]]
    token = "Bearer hf_stand_in"

    def log_message(self, *args):
        pass

    def answer(self, body, status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != self.token:
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}" if made.get("organization") else made["name"]
            self.repos.setdefault(name, {})
            return self.answer({"url": f"{self.base()}/{name}", "name": name})
        if self.path == "/api/validate-yaml":  # the card's metadata
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer({"files": files})
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            if entry["key"] == "file":
                self.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self.answer(
            {"commitUrl": f"{self.base()}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40, "success": True}
        )

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            name = "/".join(self.path.split("?")[0].split("/")[3:5])
            if name not in self.repos:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            names = sorted(self.repos[name])
            if "/tree/" in self.path:
                files = self.repos[name]
                tree = [
                    {"type": "file", "path": n, "size": len(files[n]), "oid": sha(files[n])} for n in names
                ]
                return self.answer(tree)
            return self.answer({"id": name, "sha": "a" * 40, "siblings": [{"rfilename": n} for n in names]})
        _, user, repo, _, _, path = self.path.split("?")[0].split("/", 5)
        data = self.repos[f"{user}/{repo}"].get(path)
        if data is None:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        return self.answer(data, ETag=f'"{sha(data)}"', X_Repo_Commit="a" * 40)

    do_HEAD = do_GET

    def base(self):
        return f"http://{self.headers['Host']}"


def sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub():
    handler = type("HubOfOneTest", (Hub,), {"repos": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler.repos, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


PUSH = """
import sys, torch
from ucc_search.cli import main
sys.argv = ["ucc-search", "push", sys.argv[1], "--repo-id", "someone/small"]
main()
"""
LOAD = """
import sys, torch, ucc_search
from safetensors.torch import load_file, save_file
model = ucc_search.load_model("someone/small")
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[1])["images"])}, sys.argv[2])
"""


def in_new_process(code, endpoint, home, *arguments, token="hf_stand_in"):
    """The client reads its address and token when it is imported."""
    known = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, **known, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_pushed_model_loads_by_its_id_in_another_process(tmp_path, hub):
    import torch
    from safetensors.torch import load_file, save_file

    repos, endpoint = hub
    model, images = saved(tmp_path / "model")
    done = in_new_process(PUSH, endpoint, tmp_path / "home", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert "someone/small/commit/" in done.stdout
    assert {"README.md", "arch.json", "model.safetensors"} <= set(repos["someone/small"])
    repos["someone/small"]["evil.bin"] = b"a pickle"
    save_file({"images": images}, tmp_path / "images.safetensors")
    paths = tmp_path / "images.safetensors", tmp_path / "logits.safetensors"
    done = in_new_process(LOAD, endpoint, tmp_path / "other", *paths)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(load_file(paths[1])["logits"], model(images), rtol=0, atol=1e-6)
    assert not list((tmp_path / "other").rglob("evil.bin"))  # plan and weights alone are fetched


def test_without_a_valid_token_the_hub_says_no_in_a_sentence(tmp_path, hub):
    repos, endpoint = hub
    saved(tmp_path / "model")
    done = in_new_process(PUSH, endpoint, tmp_path / "home", tmp_path / "model", token="hf_wrong")
    assert done.returncode == 2
    assert "did not take the model" in done.stderr
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
    assert repos == {}


@pytest.mark.parametrize("repo_id", ["small", "a/b/c", "../x", "a/b@main", "/a"])
def test_a_wrong_id_is_refused_before_anything_is_written(tmp_path, repo_id):
    saved(tmp_path)
    with pytest.raises(ModelError, match="expected user/name"):
        push(find_artifact(tmp_path), repo_id)


def test_ids_are_told_from_paths():
    assert is_hub_id("user/name")
    assert is_hub_id("user/name@v1")
    assert not is_hub_id("./user/name")
    assert not is_hub_id("runs/digits/trials/3")
