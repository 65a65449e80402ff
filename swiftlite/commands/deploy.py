"""`swift deploy`: a model and its adapters over the OpenAI API, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import json
import time

from swiftlite import __version__
from swiftlite.commands.serving import Plan, load_service, make_plan, runtime_adapters, watched
from swiftlite.options.parse import Options

PORT = 8000


def main(options: Options) -> int:
    """Take the port, load, say what is served, serve. Returns 0 after a shutdown by signal."""
    from swiftlite.server.listen import bind, not_ready, serve

    started = time.monotonic()
    listener = bind(options.host, PORT if options.port is None else options.port)
    with listener:
        with not_ready(listener):
            plan, runtime = make_plan(options), runtime_adapters(options)
            service = load_service(options, plan)
        try:
            from swiftlite.server.app import create_app
            from swiftlite.server.listen import url

            app = create_app(service, options.api_key, runtime)
            with watched(options, service):
                print(summary(service, plan, url(listener), time.monotonic() - started), flush=True)
                warn_open(options)
                serve(app, listener, access_log=options.verbose)
        finally:
            service.close()
    print("stopped")
    return 0


def warn_open(options: Options) -> None:
    if options.allow_runtime_lora and not options.admin_key:
        who = "everyone with the --api_key" if options.api_key else "every client"
        print(f"note: {who} can load and unload adapters; --admin_key KEY asks for a key of its own", flush=True)
    if options.host not in ("127.0.0.1", "localhost", "::1") and not options.api_key:
        print(f"note: everyone who reaches {options.host} can use this server; --api_key KEY asks for a key", flush=True)


def summary(service, plan: Plan, url: str, seconds: float) -> str:
    """What is served, where, and a request to try."""
    engine = service.engine
    names = [*service.adapters]
    adapters = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"
    lines = [
        f"swiftlite {__version__}: {service.name} is ready after {seconds:.1f} s",
        f"  model     {plan.model_dir} ({str(engine.dtype).removeprefix('torch.')}, {engine.device})",
        f"  adapters  {adapters}",
        f"  KV cache  {kv_cache(engine)}, at most {engine.max_model_len:,} a request",
        f"  API       {url}/v1   (Ctrl-C stops)",
        "",
        "try it:",
        example(service, url),
    ]
    return "\n".join(lines)


def kv_cache(engine) -> str:
    stats = engine.stats()
    tokens = int(stats["total_blocks"]) * engine.config.block_size
    return f"{tokens:,} tokens"


def example(service, url: str) -> str:
    """A curl command for the last name in /v1/models: an adapter if there is one."""
    name = service.names()[-1]
    if service.served(name).template.has_chat:
        route, body = "chat/completions", {"model": name, "messages": [{"role": "user", "content": "who are you?"}], "max_tokens": 64}
    else:
        route, body = "completions", {"model": name, "prompt": "浙江 -> 杭州\n安徽 -> 合肥\n四川 ->", "max_tokens": 32, "temperature": 0}
    return f"  curl {url}/v1/{route} -H 'Content-Type: application/json' \\\n    -d '{json.dumps(body, ensure_ascii=False)}'"
