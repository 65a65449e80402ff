"""The chat page in a real Chromium: pick an adapter, see the answer grow, stop it, retry, clear; nothing is fetched from elsewhere."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")]


@pytest.fixture(scope="module")
def service(make_model, make_adapter):
    from swiftlite.chat.template import Template
    from swiftlite.engine.config import EngineConfig
    from swiftlite.engine.engine import Engine
    from swiftlite.server.service import Service

    model_dir = make_model("llama", max_position_embeddings=8192, eos_token_id=1)
    adapter = make_adapter(model_dir, 1)
    engine = Engine(model_dir, EngineConfig(num_blocks=1024), dtype="float32", device="cpu", adapters={"my_tuner": str(adapter)})
    template = Template.load(model_dir, engine.tokenizer)
    service = Service(engine, template, "tiny-llama", adapters={"my_tuner": template}, defaults={"temperature": 0.0, "max_tokens": 40})
    yield service
    service.close()


@pytest.fixture(scope="module")
def url(service) -> Iterator[str]:
    import uvicorn

    from swiftlite.server.app import create_app
    from swiftlite.server.listen import bind
    from swiftlite.server.listen import url as address
    from swiftlite.ui.chat import mount

    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(mount(create_app(service), service), http="h11", log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    yield address(listener)
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Page:
    """The page and what went wrong on it."""

    def __init__(self, browser, url: str, width: int = 1280, locale: str = "en-US") -> None:
        self.page = browser.new_context(viewport={"width": width, "height": 800}, locale=locale).new_page()
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else self.elsewhere.append(r.url))
        self.page.goto(url)
        self.page.wait_for_selector("#message textarea")

    def choose(self, name: str) -> None:
        self.page.click("#model input")
        self.page.click(f"[role=option]:has-text('{name}')")

    def ask(self, text: str) -> None:
        self.page.fill("#message textarea", text)
        self.page.press("#message textarea", "Enter")

    def answer(self) -> str:
        bots = self.page.locator("#chat .bot.message")
        return bots.last.inner_text() if bots.count() else ""

    def settled(self, unlike: str = "") -> str:
        """The finished answer, once there is one other than `unlike`."""
        until, seen, since = time.monotonic() + 20, "", time.monotonic()
        while time.monotonic() < until:
            answer = self.answer()
            if answer != seen or answer == unlike or not self.page.is_visible("#send"):
                seen, since = answer, time.monotonic()
            elif answer and time.monotonic() - since > 0.5:
                return answer
            time.sleep(0.05)
        raise AssertionError(f"no new answer; there is {seen!r}")


def idle(service, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stats = service.engine.stats()
        if stats["running"] == 0 and stats["waiting"] == 0:
            service.engine.check()
            return True
        time.sleep(0.02)
    return False


def expected(service, model: str, question: str, tokens: int) -> str:
    from swiftlite.server.ask import ask

    return ask(service, model, [{"role": "user", "content": question}], max_tokens=tokens).result().outputs[0].text


def visible(text: str) -> str:
    return "".join(c for c in text if c.isalnum())


def test_pick_send_retry_clear(browser, url, service, tmp_path: Path):
    page = Page(browser, url)
    assert page.page.input_value("#model input") == "my_tuner"  # the adapter is what one comes to see
    page.choose("tiny-llama")
    page.ask("who are you?")
    base = page.settled()
    assert visible(base) and visible(base) == visible(expected(service, "tiny-llama", "who are you?", 40))
    assert "tokens/s" in page.page.inner_text("#speed")
    page.page.click("#retry")
    time.sleep(0.5)
    assert page.settled() == base
    page.choose("my_tuner")
    page.page.click("#retry")
    assert visible(page.settled(base)) == visible(expected(service, "my_tuner", "who are you?", 40)) != visible(base)
    page.page.screenshot(path=tmp_path / "chat.png")
    assert (tmp_path / "chat.png").stat().st_size > 10_000
    page.page.click("#clear")
    page.page.wait_for_selector("#chat .message", state="detached", timeout=10000)
    page.page.click("#chat button:has-text('who are you?')")
    page.settled()
    assert page.errors == [] and page.elsewhere == []


def long_question(service) -> str:
    """A question that this random model does not stop answering soon."""
    for question in ("who are you?", "hi", "0 1 2 3", "你好", "def f(x):", "Paris", "hello there", "small"):
        if len(expected(service, "tiny-llama", question, 1500)) > 1200:
            return question
    pytest.fail("every question is answered shortly")


def test_the_answer_grows_and_stop_frees_the_slot(browser, url, service):
    question = long_question(service)
    page = Page(browser, url)
    page.choose("tiny-llama")
    page.page.fill("#max_tokens input[type=number]", "8000")
    page.ask(question)
    page.page.wait_for_selector("#stop", state="visible")
    lengths = set()
    until = time.monotonic() + 10
    while len(lengths) < 3 and time.monotonic() < until:
        lengths.add(len(page.answer()))
        time.sleep(0.1)
    assert len(lengths) >= 3  # it grew under our eyes
    assert service.engine.stats()["running"] == 1
    page.ask("and now?")  # too early: it waits in its box
    time.sleep(0.5)
    assert page.page.input_value("#message textarea") == "and now?" and service.engine.stats()["running"] == 1
    page.page.click("#stop")
    assert idle(service, 3)
    page.page.wait_for_selector("#send", state="visible", timeout=10000)
    time.sleep(0.3)
    stopped = page.answer()
    time.sleep(0.5)
    assert page.answer() == stopped and stopped
    page.page.fill("#max_tokens input[type=number]", "10")
    page.page.press("#message textarea", "Enter")  # the conversation goes on
    assert page.settled(stopped)
    assert page.errors == []


def test_leaving_the_page_frees_the_slot(browser, url, service):
    page = Page(browser, url)
    page.choose("tiny-llama")
    page.page.fill("#max_tokens input[type=number]", "8000")
    page.ask(long_question(service))
    page.page.wait_for_selector("#stop", state="visible")
    page.page.wait_for_selector("#chat .bot.message")
    page.page.close()
    assert idle(service, 10)


def test_a_refusal_is_shown_and_the_page_lives(browser, url):
    page = Page(browser, url)
    page.ask("who are you?")
    answer = page.settled()
    page.ask("x " * 20_000)
    page.page.wait_for_selector("text=/takes at most/", timeout=10000)
    page.page.wait_for_selector("#send", state="visible", timeout=10000)
    page.page.fill("#seed input, #seed textarea", "abc")
    page.ask("hi")
    page.page.wait_for_selector("text=/whole number/", timeout=10000)
    page.page.wait_for_selector("#send", state="visible", timeout=10000)
    assert page.page.input_value("#message textarea") == "hi"  # back where it can be sent again
    assert page.page.locator("#chat .user.message").count() == 1
    page.page.fill("#seed input, #seed textarea", "7")
    page.page.press("#message textarea", "Enter")
    assert page.settled(answer)  # the refused questions are not asked again along with it


def test_text_is_shown_as_it_was_written(browser, url):
    page, refused = Page(browser, url), []
    page.page.on("requestfailed", lambda r: refused.append((r.url, r.failure)))
    page.ask("a List<String> <think>b</think>\n```cpp\nint c;\n```\n![d](http://192.0.2.1/e.png)")
    page.settled()
    shown = page.page.locator("#chat .user.message").inner_text()
    assert "a List<String> <think>b</think>" in shown and "int c;" in shown
    assert ("http://192.0.2.1/e.png", "csp") in refused  # by the browser: an image in an answer is not asked for


def test_a_phone_and_chinese(browser, url, tmp_path: Path):
    page = Page(browser, url, width=390, locale="zh-CN")
    assert page.page.inner_text("#send") == "发送"
    page.ask("你好")
    page.settled()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
    page.page.screenshot(path=tmp_path / "phone.png")
    assert page.errors == [] and page.elsewhere == []


def test_with_an_api_key_the_page_asks_for_it(service):
    from fastapi.testclient import TestClient

    from swiftlite.server.app import create_app
    from swiftlite.ui.chat import mount

    with TestClient(mount(create_app(service, "secret"), service, "secret")) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "me", "password": "secret"}).status_code == 200


def test_the_command_serves_page_and_api_and_ends_with_a_page_open(browser, make_model):
    import os
    import signal
    import socket
    import subprocess
    import sys
    import urllib.request

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "swiftlite.cli", "app-ui", "--model", str(make_model("llama")), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--torch_dtype", "float32"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout
        seen = ""
        while "API" not in seen:
            line = process.stdout.readline()
            assert line, seen
            seen += line
        assert f"http://127.0.0.1:{port}" in seen
        page = Page(browser, f"http://127.0.0.1:{port}")
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").status == 200
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 0 and "Traceback" not in output, output
        page.page.close()
    finally:
        process.kill()
