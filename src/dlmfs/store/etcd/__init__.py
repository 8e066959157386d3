"""The store on an etcd cluster (extra `dlmfs[etcd]`)."""

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
"""gRPC sets handlers of fork(2) when it is imported, which may end a child that is none of its affair."""

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
"""Else it writes of each handshake that is refused, ten a second, beside what we log."""
