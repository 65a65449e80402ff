"""Loading adapters over HTTP: every way it can go wrong has an answer, tokens are those of the right weights, nothing leaks."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engine import hf, wait_until
from transformers import AutoModelForCausalLM

from swiftlite.server.adapters import RuntimeAdapters
from swiftlite.server.errors import APIError

PROMPT = list(range(3, 40))
COUNT = 4


@pytest.fixture(scope="module")
def model_dir(make_model) -> Path:
    return make_model("llama")


@pytest.fixture(scope="module")
def root(model_dir, make_adapter, make_model, tmp_path_factory) -> Path:
    """a0 to a3, and everything that must be refused."""
    folder = tmp_path_factory.mktemp("root")
    for seed in range(COUNT):
        shutil.copytree(make_adapter(model_dir, seed), folder / f"a{seed}")
    shutil.copytree(make_adapter(make_model("llama", intermediate_size=96), 5), folder / "other-base")
    shutil.copytree(make_adapter(model_dir, 6, rank=513, target_modules=["q_proj"]), folder / "wide")
    shutil.copytree(make_adapter(model_dir, 7, rank=512, lora_alpha=64, target_modules=["q_proj", "down_proj"]), folder / "rank512")

    def broken(name: str) -> Path:
        shutil.copytree(folder / "a0", folder / name)
        return folder / name

    path = broken("nan")
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, path / "adapter_model.safetensors")
    path = broken("pickle")
    torch.save(tensors, path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    path = broken("half")
    content = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    path = broken("huge-header")
    (path / "adapter_model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
    path = broken("rank0")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "r": 0}))
    path = broken("prefixed")  # module names of another wrapper: never silently the base's answer
    tensors = load_file(folder / "a0" / "adapter_model.safetensors")
    save_file({key.replace("model.layers", "language_model.layers"): t for key, t in tensors.items()}, path / "adapter_model.safetensors")
    outside = tmp_path_factory.mktemp("outside")
    shutil.copytree(folder / "a0", outside / "secret")
    (folder / "link").symlink_to(outside / "secret")
    path = broken("linked-file")
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.safetensors").symlink_to(outside / "secret" / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def expected(model_dir, root) -> dict[str | None, list[int]]:
    """Greedy answers to PROMPT by PEFT, adapter by adapter."""
    from peft import PeftModel

    found: dict[str | None, list[int]] = {}
    for name in (None, *(f"a{i}" for i in range(COUNT)), "rank512"):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        found[name] = hf(PeftModel.from_pretrained(model, root / name).eval() if name else model, PROMPT)
    assert len(set(map(tuple, found.values()))) == COUNT + 2
    return found


@contextlib.contextmanager
def running(service, api_key: str | None = None, runtime: RuntimeAdapters | None = None) -> Iterator[int]:
    import uvicorn

    from swiftlite.server.app import create_app
    from swiftlite.server.listen import bind

    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(service, api_key, runtime), http="h11", log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture(scope="module")
def service(model_dir):
    from swiftlite.chat.template import Template
    from swiftlite.engine.config import EngineConfig
    from swiftlite.engine.engine import Engine
    from swiftlite.server.service import Service

    engine = Engine(model_dir, EngineConfig(num_blocks=256, max_num_seqs=32, max_lora_rank=512), dtype="float32", device="cpu")
    made = Service(engine, Template.load(model_dir, engine.tokenizer), "tiny-llama", aliases=("org/tiny",))
    yield made
    made.close()


@pytest.fixture(scope="module")
def port(service, root) -> Iterator[int]:
    with running(service, runtime=RuntimeAdapters(Path(os.path.realpath(root)))) as port:
        yield port


@pytest.fixture(autouse=True)
def nothing_left(service):
    yield
    for name in list(service.adapters):
        service.remove_adapter(name)
    wait_until(lambda: not service.engine.stats()["running"] and not service.engine.adapters())
    service.engine.check()
    assert service.engine.runner.lora.store.stacks == {}


def call(port: int, path: str, body: dict | None = None, key: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def load(port: int, name: str, path: str, **more) -> tuple[int, str]:
    return call(port, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **more})


def unload(port: int, name: str) -> tuple[int, str]:
    return call(port, "/v1/unload_lora_adapter", {"lora_name": name})


def ask(port: int, model: str, tokens: int = 12) -> list[int]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    code, text = call(port, "/v1/completions", body)
    assert code == 200, text
    return json.loads(text)["choices"][0]["token_ids"]


def states(port: int) -> dict[str, dict]:
    return {row["id"]: row for row in json.loads(call(port, "/v1/adapters")[1])["data"]}


def test_load_ask_unload_as_vllm_does(port, root, expected) -> None:
    assert load(port, "x", "a0") == (200, "Success: LoRA adapter 'x' added successfully.")
    assert load(port, "y", str(root / "a1")) == (200, "Success: LoRA adapter 'y' added successfully.")
    assert (ask(port, "x"), ask(port, "y"), ask(port, "tiny-llama")) == (expected["a0"], expected["a1"], expected[None])
    row = states(port)["x"]
    assert (row["state"], row["version"], row["rank"], row["tier"], row["requests"], row["served"]) == ("ready", 1, 4, "device", 0, 1)
    assert row["bytes"] > 1000 and len(row["digest"]) == 64
    listed = call(port, "/v1/models")[1] + call(port, "/v1/adapters")[1]
    assert str(root) not in listed and [card["id"] for card in json.loads(call(port, "/v1/models")[1])["data"]] == ["tiny-llama", "x", "y"]
    assert unload(port, "x") == (200, "Success: LoRA adapter 'x' removed successfully.")
    code, text = call(port, "/v1/completions", {"model": "x", "prompt": PROMPT})
    assert code == 404 and "does not exist" in text
    assert ask(port, "y") == expected["a1"] and "x" not in states(port)


def test_reload_in_place_serves_the_new_weights_and_no_old_prefix(port, expected) -> None:
    load(port, "x", "a0")
    first = states(port)["x"]["version"]  # of this name since the start
    assert ask(port, "x") == expected["a0"]
    code, text = load(port, "x", "a1")
    assert code == 400 and "has already been loaded" in text and json.loads(text)["error"]["type"] == "InvalidUserInput"
    assert ask(port, "x") == expected["a0"]
    assert load(port, "x", "a1", load_inplace=True)[0] == 200
    assert ask(port, "x") == expected["a1"] and states(port)["x"]["version"] == first + 1
    assert load(port, "x", "a0", load_inplace=True)[0] == 200
    assert ask(port, "x") == expected["a0"]


def test_changed_weights_under_one_path_are_other_weights(port, root, expected) -> None:
    shutil.copytree(root / "a2", root / "changing")
    load(port, "x", "changing")
    assert ask(port, "x") == expected["a2"]
    shutil.copy(root / "a3" / "adapter_model.safetensors", root / "changing" / "adapter_model.safetensors")
    assert ask(port, "x") == expected["a2"]
    assert load(port, "x", "changing", load_inplace=True)[0] == 200
    assert ask(port, "x") == expected["a3"]


def test_two_names_for_one_directory_share_their_weights(port, service, expected) -> None:
    load(port, "x", "a0")
    load(port, "y", "a0")
    assert service.engine.runner.lora.store.used_slots == 1
    assert ask(port, "x") == ask(port, "y") == expected["a0"]
    unload(port, "x")
    assert ask(port, "y") == expected["a0"]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("missing", 404, "there is no adapter at lora_path `missing`"),
        ("nan", 400, "not finite"),
        ("pickle", 400, "can run code when it is opened"),
        ("half", 400, "not a whole safetensors file"),
        ("huge-header", 400, "not a whole safetensors file"),
        ("rank0", 400, "rank must be at least 1"),
        ("wide", 400, "has rank 513"),
        ("other-base", 400, "belongs to another base model"),
        ("prefixed", 400, "belongs to another base model"),
        ("..", 403, "not inside"),
        (".", 403, "not inside"),
        ("../outside0/secret", 403, "not inside"),
        ("a0/../../outside0/secret", 403, "not inside"),
        ("/etc", 403, "not inside"),
        ("link", 403, "not inside"),
        ("linked-file", 403, "not inside"),
        ("a0\0", 403, "not inside"),
        ("x" * 5000, 403, "not inside"),
    ],
)
def test_what_is_refused_changes_nothing(port, root, expected, path, status, words) -> None:
    load(port, "x", "a0")
    for name, inplace in (("new", False), ("x", True)):
        code, text = load(port, name, path, load_inplace=inplace)
        assert (code, words in text) == (status, True), text
        assert str(root) not in text and str(root.parent) not in text.replace(path, "")
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
    assert ask(port, "x") == expected["a0"] and list(states(port)) == ["x"]


def test_names_that_are_refused(port) -> None:
    base = dict.fromkeys(("tiny-llama", "tiny_llama", "org/tiny"), "conflicts")
    for name, words in {**base, "a/b": "cannot be", "": "must be provided"}.items():
        code, text = load(port, name, "a0")
        assert code == 400 and words in text
    assert load(port, "x", "")[0] == 400 and unload(port, "")[0] == 400
    code, text = unload(port, "nobody")
    assert code == 404 and "cannot be found" in text
    assert unload(port, "tiny-llama")[0] == 404


def test_off_unless_allowed_and_behind_the_admin_key(service, root) -> None:
    with running(service) as port:
        assert load(port, "x", "a0")[0] == 404 and call(port, "/v1/adapters")[0] == 200
    runtime = RuntimeAdapters(Path(os.path.realpath(root)), "boss")
    body = {"lora_name": "x", "lora_path": "a0"}
    with running(service, "guest", runtime) as port:
        for key, status in ((None, 401), ("guest", 401), ("wrong", 401), ("boss", 200)):
            assert call(port, "/v1/load_lora_adapter", body, key)[0] == status
        for key, status in ((None, 401), ("guest", 200), ("boss", 200)):
            assert call(port, "/v1/adapters", key=key)[0] == status
        assert call(port, "/v1/unload_lora_adapter", {"lora_name": "x"}, "guest")[0] == 401
    with running(service, None, runtime) as port:
        assert call(port, "/v1/unload_lora_adapter", {"lora_name": "x"})[0] == 401
        assert call(port, "/v1/models")[0] == 200
        assert call(port, "/v1/unload_lora_adapter", {"lora_name": "x"}, "boss")[0] == 200


def test_rank_512_is_served(port, expected) -> None:
    assert load(port, "x", "rank512")[0] == 200 and states(port)["x"]["rank"] == 512
    assert ask(port, "x") == expected["rank512"]


@pytest.mark.parametrize("where", ["pack", "lanes", "store"])
def test_a_load_that_fails_half_way_leaves_nothing(port, service, expected, monkeypatch, where) -> None:
    """Out of memory in the middle of it: the name keeps what it had, no slot and no byte stays taken, and the next load works."""
    load(port, "x", "a0")
    lora = service.engine.runner.lora
    owner = lora.store if where == "store" else lora._native
    if owner is None:
        pytest.skip("no C++ compiler")

    def fail(*args) -> None:
        raise MemoryError("/secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, fail)
        for name, inplace in (("new", False), ("x", True)):
            code, text = load(port, name, "a1", load_inplace=inplace)
            assert code == 500 and json.loads(text)["error"]["type"] == "InternalServerError" and "secret" not in text
    assert list(states(port)) == ["x"] and lora.store.used_slots == 1 and lora._memory.reserved == 0
    assert ask(port, "x") == expected["a0"]
    assert load(port, "new", "a1")[0] == 200 and ask(port, "new") == expected["a1"]


def test_a_directory_that_vanishes_while_it_is_read(port, root, expected, monkeypatch) -> None:
    from swiftlite.adapters import directory

    shutil.copytree(root / "a3", root / "fleeting")
    real = directory.read_config

    def read_config(path: Path):
        found = real(path)
        shutil.rmtree(path)
        return found

    monkeypatch.setattr(directory, "read_config", read_config)
    code, text = load(port, "x", "fleeting")
    assert code == 400 and "cannot read fleeting/adapter_model.safetensors" in text and str(root) not in text
    assert states(port) == {}


def test_a_directory_that_vanishes_before_its_first_request(port, service, root, expected) -> None:
    """As --adapter_dir does it: the name is known, the weights are read when they are wanted."""
    shutil.copytree(root / "a2", root / "later")
    service.add_adapter("x", root / "later", read=False)
    service.add_adapter("y", root / "a2", read=False)
    os.rename(root / "later", root / "elsewhere")
    for body in ({"prompt": PROMPT}, {"prompt": PROMPT, "stream": True}):
        code, text = call(port, "/v1/completions", {"model": "x", **body})
        error = json.loads(text.removeprefix("data: ").split("\n")[0])["error"] if body.get("stream") else json.loads(text)["error"]
        assert (code == 200) == bool(body.get("stream")) and error["code"] == 500 and str(root) not in text, text
    assert ask(port, "y") == expected["a2"]
    os.rename(root / "elsewhere", root / "later")
    assert ask(port, "x") == expected["a2"]
    shutil.rmtree(root / "later")


def test_two_unloads_of_one_name_at_once(port) -> None:
    load(port, "x", "a0")
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(unload(port, "x")[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [200, 404, 404, 404]


def test_two_loads_of_one_name_at_once(port, expected) -> None:
    results: list[tuple[int, str]] = []
    threads = [threading.Thread(target=lambda i=i: results.append(load(port, "x", f"a{i}"))) for i in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(code for code, _ in results) == [200, 400, 400, 400]
    assert ask(port, "x") in [expected[f"a{i}"] for i in range(COUNT)]


def test_vanished_after_loading_still_serves(port, root, expected) -> None:
    shutil.copytree(root / "a3", root / "vanishing")
    load(port, "x", "vanishing")
    shutil.rmtree(root / "vanishing")
    assert ask(port, "x") == expected["a3"]


def test_a_root_that_is_a_link_and_files_that_are_links_inside(root, tmp_path) -> None:
    (tmp_path / "link").symlink_to(root)
    runtime = RuntimeAdapters(Path(os.path.realpath(tmp_path / "link")))
    assert runtime.resolve("a0") == Path(os.path.realpath(root / "a0")) == runtime.resolve(str(tmp_path / "link" / "a0"))
    (root / "inner").symlink_to(root / "a1")
    assert runtime.resolve("inner") == Path(os.path.realpath(root / "a1"))
    with pytest.raises(APIError):
        runtime.resolve("link")


def test_loads_and_unloads_under_streams_never_mix_adapters(port, service, expected) -> None:
    """20 adapters come and go in a row while 16 clients ask for base and adapters: every token is PEFT's."""
    load(port, "s0", "a0")
    load(port, "s1", "a1")
    stop, wrong, count = threading.Event(), [], [0]

    def client(model: str, right: list[int]) -> None:
        while not stop.is_set():
            got = ask(port, model)
            count[0] += 1
            if got != right:
                wrong.append((model, got))

    who = [("tiny-llama", None), ("s0", "a0"), ("s1", "a1"), ("s0", "a0")] * 4
    threads = [threading.Thread(target=client, args=(model, expected[name])) for model, name in who]
    for thread in threads:
        thread.start()
    for index in range(20):
        name = f"a{index % COUNT}"
        assert load(port, "swap", name, load_inplace=True)[0] == 200
        assert ask(port, "swap") == expected[name]
        if index % 3 == 0:
            unload(port, "swap")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and count[0] > 20


def test_unload_lets_running_answers_end(port, service, expected) -> None:
    from swiftlite.engine.request import SamplingParams

    load(port, "x", "a0")
    stream = service.engine.submit(PROMPT, SamplingParams(max_tokens=200, temperature=0, ignore_eos=True), adapter="x")
    next(iter(stream))
    unload(port, "x")
    assert states(port)["x"]["state"] == "draining" and states(port)["x"]["requests"] == 1
    assert load(port, "x", "a1")[0] == 200  # the name is free at once
    assert ask(port, "x") == expected["a1"]
    assert stream.result().outputs[0].token_ids[:12] == expected["a0"]
    wait_until(lambda: [row["state"] for row in states(port).values()] == ["ready"])
