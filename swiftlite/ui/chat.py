"""The chat page: a gradio page on the same server, asking the same service as the OpenAI routes.

The page keeps no conversation: gradio sends it along, so reloading the page starts anew and nothing is stored. Stopping, leaving
or reloading closes the answer's generator, which aborts the request and frees its engine slot. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from fastapi import FastAPI

from swiftlite.errors import RequestError, SwiftError
from swiftlite.server.ask import prepare
from swiftlite.server.errors import APIError
from swiftlite.server.service import Service
from swiftlite.ui.style import CSS, THEME, WORDS

PAINT = 0.04  # seconds between two updates of the page; a browser shows no more
# An answer may hold an image's address: asking for it would tell its server who talks here, and what the address says.
HEAD = """<meta http-equiv="Content-Security-Policy" content="default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:">"""
EXAMPLES = ("who are you?", "浙江的省会在哪？", "晚上睡不着觉怎么办？")

Turn = dict[str, Any]


def plain(history: list[Turn]) -> list[dict[str, str]]:
    """gradio's messages (content in parts) as the service takes them; an empty answer, left by a stop, is dropped."""
    turns = []
    for turn in history:
        content = turn["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        if text or turn["role"] == "user":
            turns.append({"role": turn["role"], "content": text})
    return turns


class Page:
    """The page's handlers over one service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def models(self) -> Any:
        """The names of /v1/models, read again whenever the page loads; what was chosen meanwhile stays."""
        return gr.Dropdown(choices=self.service.names())

    def take(self, text: str, history: list[Turn], answering: bool) -> tuple[str, list[Turn]]:
        """Move the typed text into the conversation; while an answer grows it stays where it is."""
        if answering or not text.strip():
            return text, history
        return "", [*history, {"role": "user", "content": text}]

    async def answer(
        self, history: list[Turn], model: str, system: str, temperature: float, top_p: float, max_tokens: float, seed: str
    ) -> AsyncIterator[tuple[list[Turn], str, Any]]:
        """The conversation with its growing answer, a line with the speed, and the input box: a refused question goes back there."""
        turns = plain(history)
        if not turns or turns[-1]["role"] != "user":
            yield history, "", gr.skip()
            return
        fields: dict[str, Any] = {"temperature": float(temperature), "top_p": float(top_p), "max_tokens": int(max_tokens)}
        try:
            if seed.strip():
                fields["seed"] = whole_number(seed)
            chat = self.service.served(model).template.has_chat
            instruction = [{"role": "system", "content": system.strip()}] if system.strip() else []
            question = [*instruction, *turns] if chat else turns[-1]["content"]
            served, ids, params = await self.service.off_loop(prepare, self.service, model, question, **fields)
            stream = self.service.submit(ids, params, served)
        except (SwiftError, APIError) as error:
            gr.Warning(str(error), title="")
            yield history[:-1], "", turns[-1]["content"]
            return
        started, first, painted = time.monotonic(), 0.0, 0.0
        yield [*history, {"role": "assistant", "content": ""}], "", gr.skip()
        try:
            async for output in stream:
                now = time.monotonic()
                if output.error:
                    gr.Warning(output.error, title="")
                if output.outputs[0].token_ids:
                    first = first or now
                if now - painted >= PAINT or output.finished:
                    painted = now
                    answer = output.outputs[0]
                    line = speed(len(answer.token_ids), started, first, now)
                    yield [*history, {"role": "assistant", "content": answer.text}], line, gr.skip()
        finally:
            stream.abort()

    def without_answer(self, history: list[Turn]) -> list[Turn]:
        """The conversation up to its last question."""
        while history and history[-1]["role"] != "user":
            history = history[:-1]
        return history


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RequestError(f"the seed must be a whole number, not {text[:20]!r}") from None


def speed(tokens: int, started: float, first: float, now: float) -> str:
    """Tokens, tokens a second after the first, and the wait for the first."""
    if tokens < 2 or now <= first:
        return ""
    return f"{tokens} tokens · {(tokens - 1) / (now - first):.1f} tokens/s · {first - started:.2f} s"


def build(service: Service) -> gr.Blocks:
    """The page. Elements carry ids (`model`, `chat`, `message`, `send`, `stop`, ...) that tests and styles hold on to."""
    page, word = Page(service), WORDS
    names, defaults = service.names(), service.defaults
    room = service.limits.max_model_len
    with gr.Blocks(title=f"{service.name} · swiftlite", fill_height=True, analytics_enabled=False) as blocks:
        with gr.Row(elem_id="top"):
            gr.HTML("<h1>swiftlite</h1>", elem_id="brand")
            model = gr.Dropdown(
                names, value=names[-1], show_label=False, label=word("model"), elem_id="model", container=False, interactive=True
            )
        with gr.Row(elem_id="body"):
            with gr.Column(scale=4, min_width=300, elem_id="talk"):
                chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    container=False,
                    height="calc(100dvh - 230px)",
                    min_height=260,
                    buttons=["copy"],
                    allow_tags=True,  # <think>, List<String>: shown, not taken for HTML
                    layout="bubble",
                    placeholder=word("placeholder"),  # type: ignore[arg-type]  # gradio translates it, its annotation lags
                    examples=[{"text": example} for example in EXAMPLES],
                )
                with gr.Row(elem_id="ask", equal_height=True):
                    message = gr.Textbox(
                        elem_id="message", show_label=False, placeholder=word("message"), lines=1, max_lines=6, scale=8, container=False,
                        autofocus=True,
                    )  # fmt: skip
                    send = gr.Button(word("send"), variant="primary", elem_id="send", scale=0, min_width=88)
                    stop = gr.Button(word("stop"), variant="stop", elem_id="stop", scale=0, min_width=88, visible=False)
                with gr.Row(elem_id="below"):
                    figures = gr.Markdown("", elem_id="speed")
                    retry = gr.Button(word("retry"), size="sm", elem_id="retry", scale=0, min_width=84)
                    clear = gr.Button(word("clear"), size="sm", elem_id="clear", scale=0, min_width=84)
            with gr.Column(scale=1, min_width=250, elem_id="settings"):
                system = gr.Textbox(label=word("system"), lines=3, elem_id="system", placeholder=word("system_hint"))
                temperature = gr.Slider(0, 2, defaults.get("temperature", 1.0), step=0.05, label=word("temperature"), elem_id="temperature")
                top_p = gr.Slider(0.05, 1, defaults.get("top_p", 1.0), step=0.05, label=word("top_p"), elem_id="top_p")
                limit = min(room, defaults.get("max_tokens", 1024))
                max_tokens = gr.Slider(1, room, limit, step=1, label=word("max_tokens"), elem_id="max_tokens")
                seed = gr.Textbox("", label=word("seed"), max_lines=1, elem_id="seed", placeholder=word("seed_hint"))

        # gradio 6.31 shows a message with C++ as empty, unless C, whose grammar C++'s builds on, was shown before.
        gr.Markdown("```c\n```", elem_id="grammar")

        running = gr.Checkbox(False, visible=False)  # gr.State would keep a connection open, which the server's end then waits for
        asked = [chat, model, system, temperature, top_p, max_tokens, seed]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

        def busy(value: bool) -> list[Any]:
            return [gr.Button(visible=not value), gr.Button(visible=value), value]

        shown = [send, stop, running]

        def answering(event: Any) -> Any:
            begun = event.then(lambda: busy(True), outputs=shown, queue=False, **hidden)
            answer = begun.then(page.answer, asked, [chat, figures, message], concurrency_limit=None, **hidden)
            answer.then(lambda: busy(False), outputs=shown, queue=False, **hidden)
            return answer

        def example(choice: gr.SelectData) -> list[Turn]:
            return [{"role": "user", "content": choice.value["text"]}]

        runs = [
            answering(gr.on([message.submit, send.click], page.take, [message, chat, running], [message, chat], queue=False, **hidden)),
            answering(chat.example_select(example, None, chat, queue=False, **hidden)),
            answering(retry.click(page.without_answer, chat, chat, queue=False, **hidden)),
        ]
        stop.click(lambda: busy(False), outputs=shown, cancels=runs, queue=False, **hidden)
        emptied = clear.click(lambda: ([], "", *busy(False)), None, [chat, figures, *shown], cancels=runs, queue=False, **hidden)
        emptied.then(None, js="() => document.querySelector('#message textarea').focus()")
        blocks.load(page.models, outputs=model, queue=False, **hidden)
    return blocks


def mount(app: FastAPI, service: Service, api_key: str | None = None) -> FastAPI:
    """`app` with the page at `/`. With an API key the page asks for it once (any user name; the key is the password)."""
    import hmac

    def known(_: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), (api_key or "").encode())

    return gr.mount_gradio_app(
        app,
        build(service).queue(default_concurrency_limit=None, api_open=False),
        path="/",
        auth=known if api_key else None,
        auth_message="any name; the password is the server's --api_key" if api_key else None,
        footer_links=[],
        run_history=False,
        theme=THEME,
        css=CSS,
        head=HEAD,
        i18n=WORDS,
        ssr_mode=False,
        show_error=True,
        enable_monitoring=False,
    )
