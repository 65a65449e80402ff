"""The listening socket, and uvicorn on it.

The socket is taken before a model loads, so that a used port costs no minute; until the server runs, every request on it is
answered 503. SIGTERM and Ctrl-C let running answers end, then `serve` returns (exit code 0).
"""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import socket
import threading
from collections.abc import Iterator

from fastapi import FastAPI

from swiftlite.errors import SwiftError
from swiftlite.server.errors import APIError

DRAIN = 25  # seconds that running answers get after SIGTERM; orchestrators kill after 30


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket. SwiftError when the port is used or the address is not this machine's."""
    if not 0 <= port <= 65535:
        raise SwiftError(f"cannot listen on port {port}", "ports are 1 to 65535 (0: any free one)", "choose another --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise SwiftError(f"cannot listen on {host}:{port}", str(error), "check --host and --port") from None
    # asyncio turns Nagle off only where the protocol is named; with it on, every answer waits 40 ms for the client's ACK.
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SwiftError(f"port {port} on {host} is already in use", fix="stop the other server, or choose another --port") from None
        raise SwiftError(f"cannot listen on {host}:{port}", str(error.strerror), "check --host and --port") from None
    return listener


@contextlib.contextmanager
def not_ready(listener: socket.socket) -> Iterator[None]:
    """Answer every request 503 while the block runs (the model loads)."""
    done = threading.Event()
    body = json.dumps(APIError("the model is still loading", 503).body()).encode()
    reply = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    reply += b"content-length: %d\r\n\r\n%s" % (len(body), body)

    def answer() -> None:
        while not done.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection, contextlib.suppress(OSError):
                connection.settimeout(1.0)
                connection.recv(65536)
                connection.sendall(reply)

    listener.settimeout(0.1)
    thread = threading.Thread(target=answer, name="not-ready", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        listener.settimeout(None)


def serve(app: FastAPI, listener: socket.socket, *, access_log: bool, drain: int = DRAIN) -> None:
    """Serve until SIGTERM or Ctrl-C, then let running answers end for at most `drain` seconds. Main thread only."""
    import uvicorn

    # h11, not httptools: it bounds the size of a request's head. Proxy headers could forge addresses in the log.
    config = uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_level="info" if access_log else "warning",
        access_log=access_log,
        timeout_graceful_shutdown=drain,
        proxy_headers=False,
        server_header=False,
    )
    server = uvicorn.Server(config)
    # uvicorn raises a caught signal again once it has stopped, which would end the process by it and not with 0.
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def url(listener: socket.socket) -> str:
    """Where a browser on this machine finds the server."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"
