"""An exception that nobody expected costs what it belongs to: one lock, or one domain's membership.

What is called from outside of a lock or a domain (by the file system, a watch, an answer, a timer) is
marked `contained`. Whatever such a call raises ends in the object's `wreck`, and there alone: the
state that was being changed may be anything, so it is never served again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class Wreckable(Protocol):
    """What can be lost without the rest."""

    def wreck(self, error: Exception) -> None:
        """Its state is broken by `error`. Must not raise."""


S = TypeVar("S", bound=Wreckable)
P = ParamSpec("P")


def contained(method: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """`method`, from which no exception comes out."""

    @wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.wreck(error)

    return call
