"""Whole states of the real engine: copied exactly, and named so that equal ones have equal names.

Copying
-------
The engine's pending calls are bound methods, partials and closures. `copy.deepcopy` would share a
closure between original and copy; here functions and their cells are copied like any other object,
sharing among them included. What pickle does not know it refuses, so nothing is shared by accident.

Naming
------
`shape` walks the whole object graph: attributes by `__slots__` and `__dict__`, callables by their
code, bound object, arguments and cells, aliases by the order in which they are met. Revisions are told
from other numbers by their size (`BASE`) and kept apart: only their order matters to the engine
(it compares them and takes new ones from the store, which are larger than all), so states whose
revisions can be renamed into each other without changing the order behave alike.

Two steps from that rule: a compare "below r + 1" is built from a revision r. No revision lies between r
and r + 1, so it sorts the same way wherever r does, and every new revision is at least r + 1.
"""

from __future__ import annotations

import enum
import io
import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType
from typing import Any, Final, NamedTuple

from dlmfs.engine.view import NO_HEAD, NOTHING
from dlmfs.model import TOKEN_SHIFT

BASE: Final = 1 << 30
"""The store's first revision: any smaller number is none, and twice as many never come."""

_functions: dict[int, FunctionType] = {}
"""Those met in a copy, by identity, which holds them alive: code is not state."""


# -- copying ----------------------------------------------------------------------------------------


def _function(number: int) -> FunctionType:
    return _functions[number]


def _closure(number: int, cells: tuple[CellType, ...]) -> FunctionType:
    old = _functions[number]
    new = FunctionType(old.__code__, old.__globals__, old.__name__, old.__defaults__, cells)
    new.__kwdefaults__ = old.__kwdefaults__
    new.__qualname__ = old.__qualname__
    return new


def _cell() -> CellType:
    return CellType()


def _method(function: Callable[..., object], bound: object) -> MethodType:
    return MethodType(function, bound)


def _fill(cell: CellType, contents: tuple[object]) -> None:
    cell.cell_contents = contents[0]


_by_code: dict[CodeType, FunctionType] = {}


_HELPERS: Final = (_function, _closure, _cell, _method, _fill)
"""Pickled by their names: what the others are put together with."""


CONSTANTS: Final[dict[str, object]] = {"NO_HEAD": NO_HEAD, "NOTHING": NOTHING}
"""The engine's constants that hold a dictionary or a list, never changed: the same in every copy."""

_constants = {id(constant): name for name, constant in CONSTANTS.items()}


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> str | None:
        return _constants.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is FunctionType and obj not in _HELPERS:
            # A decorated method's cells hold the function itself: code, not state.
            if obj.__closure__ is None or hasattr(obj, "__wrapped__"):
                _functions[id(obj)] = obj
                return _function, (id(obj),)
            # One of the functions of this code stands for all: only the cells differ.
            first = _by_code.setdefault(obj.__code__, obj)
            assert first.__defaults__ == obj.__defaults__, obj
            _functions[id(first)] = first
            return _closure, (id(first), obj.__closure__)
        if kind is CellType:
            # Filled afterwards, since a function may refer to itself by a cell.
            return _cell, (), (obj.cell_contents,), None, None, _fill
        if kind is MethodType:
            return _method, (obj.__func__, obj.__self__)
        return NotImplemented


class _Unpickler(pickle.Unpickler):  # of what `freeze` made
    def persistent_load(self, name: str) -> object:
        return CONSTANTS[name]


def freeze(root: object) -> bytes:
    """A copy of the object graph, to be thawed as often as wanted. In this process only."""
    out = io.BytesIO()
    _Pickler(out, pickle.HIGHEST_PROTOCOL).dump(root)
    return out.getvalue()


def thaw(blob: bytes) -> Any:
    return _Unpickler(io.BytesIO(blob)).load()


# -- naming -----------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What something is but for its revisions, and these in the order in which they are met."""

    atoms: tuple[object, ...]
    revisions: tuple[int, ...]


Parts = Callable[[Any], Iterable[object]]
"""What counts of an object of some class, for those of which not everything does."""


@lru_cache(maxsize=100_000)
def _attributes(kind: type) -> tuple[tuple[str, ...], bool]:
    slots: list[str] = []
    for base in kind.__mro__:
        own = base.__dict__.get("__slots__", ())
        slots.extend((own,) if isinstance(own, str) else own)
    names = tuple(sorted(name for name in slots if name not in ("__dict__", "__weakref__")))
    return names, any("__dict__" in base.__dict__ for base in kind.__mro__)


@lru_cache(maxsize=500_000)
def _record(value: bytes) -> object:
    """The JSON in a value of the store; the bytes themselves if it is none."""
    try:
        return json.loads(value) if value[:1] == b"{" else value
    except ValueError:
        return value


def _code(function: FunctionType) -> str:
    """By its place and identity: two lambdas of one function have one name."""
    return f"{function.__qualname__} {id(function.__code__)}"


class _Walk:
    def __init__(self, special: Mapping[type, Parts]) -> None:
        self.special = special
        self.atoms: list[object] = []
        self.revisions: list[int] = []
        self.met: dict[int, int] = {}
        self.alive: list[object] = []  # or an identity could come twice

    def walk(self, obj: Any) -> None:
        kind = type(obj)
        if kind is int:
            self.number(obj)
        elif obj is None or kind is str:
            self.atoms.append(obj)
        elif kind is bool or kind is float:  # tagged, since True == 1 == 1.0
            self.atoms.append((kind.__name__, obj))
        elif isinstance(obj, enum.Enum):
            self.atoms.append((kind.__name__, obj.value))
        elif kind is bytes:
            record = _record(obj)
            if record is obj or kind is type(record):
                self.atoms.append(obj)
            else:
                self.walk_json(record)
        elif isinstance(obj, tuple):
            self.items(kind.__name__, obj)
        elif kind is MethodType:
            self.items(_code(obj.__func__), (obj.__self__,))
        elif kind is BuiltinMethodType:
            self.items("method", (obj.__name__, obj.__self__))
        elif isinstance(obj, type):
            self.atoms.append(obj)
        else:
            self.reference(obj, kind)

    def number(self, number: int) -> None:
        if number < BASE:
            self.atoms.append(number)
        elif number < 2 * BASE:
            self.atoms.append("r")
            self.revisions.append(number)
        else:
            assert BASE <= number >> TOKEN_SHIFT < 2 * BASE, number
            self.atoms.append(("t", number & ((1 << TOKEN_SHIFT) - 1)))
            self.revisions.append(number >> TOKEN_SHIFT)

    def walk_json(self, record: Any) -> None:
        if isinstance(record, dict):
            self.atoms.append(("json", len(record)))
            for key in sorted(record):
                self.atoms.append(key)
                self.walk_json(record[key])
        elif isinstance(record, list):
            self.atoms.append(("json", len(record)))
            for item in record:
                self.walk_json(item)
        else:
            self.walk(record)

    def reference(self, obj: Any, kind: type) -> None:
        """An object that others may refer to as well: walked the first time, named after that."""
        known = self.met.get(id(obj))
        if known is not None:
            self.atoms.append(("again", known))
            return
        self.met[id(obj)] = len(self.met)
        self.alive.append(obj)
        special = self.special.get(kind)
        if special is not None:
            self.items(kind.__name__, list(special(obj)))
        elif kind is dict:
            self.dictionary(obj)
        elif kind is list:
            self.items("list", obj)
        elif kind in (set, frozenset):
            self.items("set", sorted(obj))
        elif kind is partial:
            self.items("partial", [obj.func, obj.args, obj.keywords])
        elif kind is FunctionType:
            self.items(_code(obj), [obj.__defaults__, *(obj.__closure__ or ())])
        elif kind is CellType:
            self.items("cell", [obj.cell_contents])
        else:
            self.instance(obj, kind)

    def items(self, name: str, items: Sequence[Any]) -> None:
        self.atoms.append((name, len(items)))
        for item in items:
            self.walk(item)

    def dictionary(self, obj: dict[Any, Any]) -> None:
        self.atoms.append(("dict", len(obj)))
        # Those by node are only looked up, counted, or sorted when used (members, wishes). Any other
        # is in the order of its making, which may matter.
        keys = sorted(obj) if isinstance(next(iter(obj), None), str) else list(obj)
        for key in keys:
            self.walk(key)
            self.walk(obj[key])

    def instance(self, obj: Any, kind: type) -> None:
        slots, has_dict = _attributes(kind)
        self.atoms.append(kind.__name__)
        for name in slots:
            if hasattr(obj, name):
                self.atoms.append(name)
                self.walk(getattr(obj, name))
        if has_dict:
            for name in sorted(obj.__dict__):
                self.atoms.append(name)
                self.walk(obj.__dict__[name])


def shape(root: object, special: Mapping[type, Parts] | None = None) -> Shape:
    """The canonical form of an object graph; `special` says for a class what counts of its objects."""
    walk = _Walk(special or {})
    walk.walk(root)
    return Shape(tuple(walk.atoms), tuple(walk.revisions))
