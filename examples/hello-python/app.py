"""A function in Python: a component of the world `wasi:http/proxy`, which answers one request with one fresh instance of itself.

What is done when this module is imported is done while the component is built, and every instance begins with its outcome:
imports and tables belong there, and nothing that differs from one request to the next.
"""

import json
import os
import sys
from urllib.parse import parse_qs, urlsplit

from componentize_py_types import Err, Ok
from wit_world import exports
from wit_world.imports.streams import StreamError_Closed
from wit_world.imports.types import (
    Fields,
    IncomingRequest,
    OutgoingBody,
    OutgoingResponse,
    ResponseOutparam,
)

COUNTER = 0
PIECE = 64 << 10


class IncomingHandler(exports.IncomingHandler):
    """What the world exports: the class and its method have the names of the interface and its function."""

    def handle(self, request: IncomingRequest, response_out: ResponseOutparam) -> None:
        url = urlsplit(request.path_with_query() or "/")
        if url.path == "/":
            name = os.environ.get("NAME", "CloudNexus")
            answer(response_out, 200, f"Hello from {name}, in Python {sys.version.split()[0]}\n")
        elif url.path == "/counter":
            global COUNTER
            # Every request meets a fresh instance, so this is 1 for ever.
            COUNTER += 1
            answer(response_out, 200, f"{COUNTER}\n")
        elif url.path == "/sum":
            try:
                total = sum(float(text) for text in parse_qs(url.query).get("x", []))
            except ValueError as error:
                answer(response_out, 400, f"{error}\n")
                return
            answer(response_out, 200, json.dumps({"sum": total}) + "\n", "application/json")
        elif url.path == "/env":
            lines = [f"{key}={value}\n" for key, value in sorted(os.environ.items())]
            answer(response_out, 200, "".join(lines))
        elif url.path == "/echo":
            echo(request, response_out)
        elif url.path == "/log":
            print("a line for standard output")
            print("a line for standard error", file=sys.stderr)
            answer(response_out, 200, "logged\n")
        elif url.path == "/raise":
            raise RuntimeError("asked to")
        else:
            answer(response_out, 404, "no such page\n")


def begin(response_out: ResponseOutparam, status: int, content_type: str) -> OutgoingBody:
    """Sends the head of the answer; its body follows."""
    response = OutgoingResponse(Fields.from_list([("content-type", content_type.encode())]))
    response.set_status_code(status)
    body = response.body()
    ResponseOutparam.set(response_out, Ok(response))
    return body


def answer(
    response_out: ResponseOutparam, status: int, text: str, content_type: str = "text/plain; charset=utf-8"
) -> None:
    body = begin(response_out, status, content_type)
    data = text.encode()
    with body.write() as stream:
        # One write takes at most 4,096 bytes.
        for at in range(0, len(data), 4096):
            stream.blocking_write_and_flush(data[at : at + 4096])
    OutgoingBody.finish(body, None)


def echo(request: IncomingRequest, response_out: ResponseOutparam) -> None:
    """Sends the request's body back while it still arrives."""
    incoming = request.consume()
    body = begin(response_out, 200, "application/octet-stream")
    with incoming.stream() as source, body.write() as sink:
        while True:
            try:
                sink.blocking_splice(source, PIECE)
            except Err as error:
                if isinstance(error.value, StreamError_Closed):
                    break
                raise
    OutgoingBody.finish(body, None)
