"""--push_to_hub through the real command and the hubs' real clients, against a local server that plays the hubs' endpoints."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.test_sft import PAIRS


class Hub(ThreadingHTTPServer):
    """Hugging Face's and ModelScope's endpoints for an upload. `commits`: {path: content} of each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.blobs: dict[str, bytes] = {}
        self.commits: list[dict[str, bytes]] = []
        self.created: list[dict] = []
        self.seen: list[str] = []
        self.refuse_after = 99  # commits


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, content: object, code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self) -> None:
        hub, path, body = self.server, self.path.split("?")[0], self.body()
        hub.seen.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "")
        if path.startswith("/blob/"):
            assert hashlib.sha256(body).hexdigest() == path.rsplit("/", 1)[1]
            hub.blobs[path.rsplit("/", 1)[1]] = body
            return self.answer({})
        if token and "good" not in token and "Basic" not in token:
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "anna", "type": "user"})
        if path == "/api/repos/create":
            hub.created.append(json.loads(body))
            return self.answer({"url": f"{hub.url}/{hub.created[-1].get('organization', 'anna')}/{hub.created[-1]['name']}"})
        if path == "/api/v1/login":
            user = {"AccessToken": "git", "Username": "anna", "Email": "anna@example.org"}
            return self.answer({"Code": 200, "Success": True, "Data": user})
        if path == "/openapi/v1/users/me":
            return self.answer({"success": True, "data": {"username": "anna", "email": "anna@example.org"}})
        if path == "/api/v1/models":
            hub.created.append(json.loads(body))
            return self.answer({"Code": 200, "Success": True, "Data": {}})
        if path.endswith("/commit/master"):  # ModelScope's; Hugging Face's branch is main
            actions = json.loads(body)["actions"]
            stored = {a["path"]: hub.blobs[a["sha256"]] if a["type"] == "lfs" else base64.b64decode(a["content"]) for a in actions}
            hub.commits.append(stored)
            return self.answer({"Code": 200, "Success": True, "Data": {}})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"} for f in files]
            return self.answer({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = {o["oid"]: {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}} for o in objects}
            return self.answer({"transfer": "basic", "objects": [{**o, "actions": upload[o["oid"]]} for o in objects]})
        if "/commit/" in path:
            if len(hub.commits) >= hub.refuse_after:
                return self.answer({"error": "quota"}, 403)
            files: dict[str, bytes] = {}
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    files[entry["value"]["path"]] = hub.blobs[entry["value"]["oid"]]
            hub.commits.append(files)
            return self.answer({"commitUrl": f"{hub.url}/anna/run/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True})
        if self.command == "GET" and "/api/models/" in path:
            return self.answer({"id": "anna/run", "sha": "0" * 40, "siblings": []})
        return self.answer({"error": f"not played: {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def words(tmp_path_factory, make_model) -> list[str]:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"query": question, "response": answer} for question, answer in PAIRS]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return ["--model", str(make_model("qwen3")), "--dataset", str(path), "--report_to", "none", "--sample_answers", "0", "--max_steps", "4"]


def sft(home: Path, hub: Hub | None, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    where = {} if hub is None else {"HF_ENDPOINT": hub.url, "MODELSCOPE_ENDPOINT": hub.url}
    names = ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "USE_HF", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"HOME": str(home), "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", "MODELSCOPE_HOME": str(home)}
    command = [sys.executable, "-m", "swiftlite.cli", "sft", "--push_to_hub", "true", "--output_dir", str(home / "out"), *flags]
    return subprocess.run(command, env={**env, **where, **more}, capture_output=True, text=True, timeout=120)


def pushed(run: Path, name: str) -> set[str]:
    return {p.name for p in (run / name).iterdir()} - {"trainer_state.json", "trainer_state.pt"}


def test_every_save_is_a_commit(tmp_path, hub, words):
    flags = [*words, "--use_hf", "true", "--hub_token", "good-secret", "--hub_private_repo", "true", "--save_steps", "2"]
    done = sft(tmp_path, hub, *flags, "--hub_model_id", "run", "--split_dataset_ratio", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    run = next((tmp_path / "out").glob("*/v*"))
    assert [one["name"] for one in hub.created] == ["run"] and hub.created[0]["visibility"] == "private"
    assert len(hub.commits) == 2  # steps 2 and 4; the result is there already at the end
    assert set(hub.commits[1]) - {".gitattributes", "README.md"} == pushed(run, "checkpoint-4")
    for name, content in hub.commits[1].items():
        assert content == (run / "checkpoint-4" / name).read_bytes()
    assert "pushed checkpoint-4 to Hugging Face: anna/run" in done.stdout
    for path in [p for p in run.rglob("*") if p.is_file()]:
        assert b"good-secret" not in path.read_bytes(), path  # settings are published


def test_modelscope_holds_the_result(tmp_path, hub, words):
    flags = [*words, "--hub_model_id", "anna/run", "--hub_private_repo", "true", "--hub_strategy", "end", "--split_dataset_ratio", "0"]
    done = sft(tmp_path, hub, *flags, MODELSCOPE_API_TOKEN="good")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "out").glob("*/v*")
    assert hub.created[0]["Name"] == "run" and hub.created[0]["Visibility"] == 1
    files = {name: content for commit in hub.commits for name, content in commit.items()}
    assert pushed(run, "checkpoint-4") <= set(files)
    assert files["adapter_model.safetensors"] == (run / "checkpoint-4" / "adapter_model.safetensors").read_bytes()
    assert "trainer_state.pt" not in files


def test_a_failing_push_ends_no_training(tmp_path, hub, words):
    hub.refuse_after = 1
    done = sft(tmp_path, hub, *words, "--use_hf", "true", "--save_steps", "2", "--hub_model_id", "bert/run", HF_TOKEN="good")
    assert done.returncode == 1
    run = next((tmp_path / "out").glob("*/v*"))
    assert (run / "checkpoint-4" / "adapter_model.safetensors").is_file() and (run / "report.html").is_file()
    assert "pushing checkpoint-4 to bert/run failed" in done.stdout
    assert "it is whole in" in done.stderr and "hf upload bert/run" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        ([], {}, "there is no token for ModelScope"),
        (["--use_hf", "true"], {}, "there is no token for Hugging Face"),
        (["--use_hf", "true", "--hub_token", "bad"], {}, "Hugging Face refuses"),
        (["--hub_token", "bad"], {}, "ModelScope refuses"),
        (["--use_hf", "true"], {"HF_TOKEN": "good", "HF_ENDPOINT": "http://127.0.0.1:9"}, "Hugging Face refuses"),
        (["--push_to_hub", "false", "--hub_model_id", "x"], {}, "add --push_to_hub true"),
    ],
)
def test_refusals_come_before_training(tmp_path, hub, words, flags, env, message):
    done = sft(tmp_path, hub, *words, *flags, **env)
    assert done.returncode in (1, 2) and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists() and not hub.commits


def test_a_client_that_is_missing_is_named(monkeypatch):
    from swiftlite.errors import HubError
    from swiftlite.options.parse import parse
    from swiftlite.train.push import Push

    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(HubError, match="needs the package modelscope"):
        Push.ready(parse("sft", ["--push_to_hub", "true", "--hub_token", "x"]), "run")
