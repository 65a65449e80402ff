"""`swift app-ui`: the chat page and the OpenAI API on one port."""

from __future__ import annotations

import time
from importlib.util import find_spec

from swiftlite.commands.deploy import kv_cache, warn_open
from swiftlite.commands.serving import load_service, make_plan, runtime_adapters, watched
from swiftlite.errors import SwiftError
from swiftlite.options.parse import Options

PORT = 7860
DRAIN = 3  # seconds: an open page keeps a connection, and nobody waits for it


def main(options: Options) -> int:
    """Take the port, load, serve page and API. Returns 0 after a shutdown by signal."""
    if find_spec("gradio") is None:
        raise SwiftError("the page needs gradio, which is not installed", fix="pip install 'swiftlite[ui]'")
    from swiftlite.server.listen import bind, not_ready, serve, url

    started = time.monotonic()
    listener = bind(options.host, PORT if options.port is None else options.port)
    with listener:
        with not_ready(listener):
            plan, runtime = make_plan(options), runtime_adapters(options)
            service = load_service(options, plan)
        try:
            from swiftlite.server.app import create_app
            from swiftlite.ui.chat import mount

            app = mount(create_app(service, options.api_key, runtime), service, options.api_key)
            print(f"{service.name} is ready after {time.monotonic() - started:.1f} s; KV cache {kv_cache(service.engine)}")
            print(f"  open  {url(listener)}   (Ctrl-C stops)\n  API   {url(listener)}/v1", flush=True)
            warn_open(options)
            with watched(options, service):
                serve(app, listener, access_log=options.verbose, drain=DRAIN)
        finally:
            service.close()
    print("stopped")
    return 0
