"""A relay that speaks gRPC between a client and an etcd, and answers otherwise than the server did.

It knows no messages: it passes bytes on, and `lie`, if it is set, makes others of an answer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from tests.etcd.server import CLIENT_PORT, loopback

Lie = Callable[[str, bytes, bytes], bytes]
"""The method, the request (empty for a stream's), the honest answer: what is answered."""

STREAMS = ("/etcdserverpb.Watch/Watch", "/etcdserverpb.Lease/LeaseKeepAlive")
UNBOUNDED = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)


def _same(data: bytes) -> bytes:
    return data


class Relay(grpc.GenericRpcHandler):
    """Runs from its making to `close`. `told`: the methods that it has lied about, or refused:
    `forbidden`, as a newer server refuses users what is its administrators'; `unavailable`, as a proxy
    what it does not know; `nameless`, as a server to whom no user was named."""

    def __init__(self, target: str) -> None:
        self.endpoint = f"{loopback()}:{CLIENT_PORT}"
        self.lie: Lie | None = None
        self.told: list[str] = []
        self.forbidden: set[str] = set()
        self.unavailable: set[str] = set()
        self.nameless: set[str] = set()
        self._channel = grpc.insecure_channel(target, UNBOUNDED)
        self._server = grpc.server(
            ThreadPoolExecutor(16), handlers=[self], options=(*UNBOUNDED, ("grpc.so_reuseport", 0))
        )
        self._server.add_insecure_port(self.endpoint)
        self._server.start()

    def close(self) -> None:
        self._server.stop(0).wait()
        self._channel.close()

    def service(self, details: Any) -> Any:
        method = details.method
        if method in STREAMS:
            call = self._channel.stream_stream(method, _same, _same)

            def stream(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
                answers = call(requests, metadata=context.invocation_metadata())
                context.add_callback(answers.cancel)
                try:
                    for answer in answers:
                        yield self._said(method, b"", answer)
                except grpc.RpcError as error:
                    context.abort(error.code(), error.details())

            return grpc.stream_stream_rpc_method_handler(stream, _same, _same)
        once = self._channel.unary_unary(method, _same, _same)

        def unary(request: bytes, context: Any) -> bytes:
            self._refuse(method, context)
            try:
                answer = once(request, metadata=context.invocation_metadata(), timeout=10)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
            return self._said(method, request, answer)

        return grpc.unary_unary_rpc_method_handler(unary, _same, _same)

    def _refuse(self, method: str, context: Any) -> None:
        for methods, code, details in (
            (self.forbidden, grpc.StatusCode.PERMISSION_DENIED, "etcdserver: permission denied"),
            (self.unavailable, grpc.StatusCode.UNAVAILABLE, "unknown here"),
            (self.nameless, grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: user name is empty"),
        ):
            if method in methods:
                self.told.append(method)
                context.abort(code, details)

    def _said(self, method: str, request: bytes, answer: bytes) -> bytes:
        if self.lie is None:
            return answer
        said = self.lie(method, request, answer)
        if said != answer:
            self.told.append(method)
        return said
