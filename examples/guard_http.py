#!/usr/bin/env python3
"""An HTTP server that refuses changes by holders of the past, and its client.

guard_http.py serve 8080 /var/lib/store/tokens     # the server: a value that PUT replaces
guard_http.py put jobs/store http://host:8080/ hello   # under the lock
"""

import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any
from wsgiref.simple_server import make_server

from dlmfs.client import DlmfsError, Lock
from dlmfs.client.guard import Register, WsgiGuard, check, headers

value = b""


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """What is to be guarded: it knows nothing of locks."""
    global value
    if environ["REQUEST_METHOD"] == "PUT":
        value = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    start_response("200 OK", [("Content-Length", str(len(value)))])
    return [value]


def serve(port: int, tokens: str) -> None:
    with make_server("127.0.0.1", port, WsgiGuard(application, Register(tokens))) as server:
        print("serving on port", server.server_port, flush=True)
        server.serve_forever()


def put(name: str, url: str, data: str) -> int:
    try:
        with Lock(name) as lock:
            request = urllib.request.Request(url, data.encode(), headers(lock), method="PUT")
            try:
                urllib.request.urlopen(request).close()
            except urllib.error.HTTPError as error:
                with error:
                    check(error.code, dict(error.headers))
                    raise
    except DlmfsError as error:  # LockLost too, and the guard's word for it, StaleToken
        print(error, file=sys.stderr)
        return error.exit
    return 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", port, tokens]:
            serve(int(port), tokens)
        case ["put", name, url, data]:
            sys.exit(put(name, url, data))
        case _:
            sys.exit("usage: guard_http.py serve PORT TOKENS | put DOMAIN/LOCK URL DATA")
