"""Reads ``.npz`` files that hold Python objects, without running what a pickle can run.

The label files of MERBench and the predictions of AffectGPT (``name2reason``, ``*-openset.npz``)
are NumPy archives whose arrays hold dictionaries and strings, and NumPy stores those as a pickle. A
pickle is a program, and Python's own reader executes it. The reader here interprets only the
instructions that build plain values: numbers, text, bytes, lists, tuples, sets, dictionaries, and
NumPy arrays and scalars of such values. No function is ever looked up by name.

What a file may unpack to is bounded before anything is allocated: its bytes, its number of values
with shared ones counted each time (a few bytes can otherwise describe a billion), and its depth,
which a value that contains itself exceeds.
"""

from __future__ import annotations

import io
import math
import pickletools  # reads instructions; it runs none
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.lib import format as npy

from mmemo.errors import DataError

LARGEST = 256 << 20  # bytes, packed and unpacked
_MOST_MEMBERS = 1_000
_MOST_VALUES = 5_000_000  # of one array, and pickle instructions
_TEXT_OF_A_VALUE = 64  # characters of text that count as one value
_DEEPEST = 32
_PLAIN_CODE = re.compile(r"[<>|=]?(?:[?biufcSUO]\d{0,9}|bool|object|u?int\d\d?|float\d\d)")
_OLD, _NEW = "numpy.core.", "numpy._core."
_BUILTIN = {"set": set, "frozenset": frozenset, "list": list, "dict": dict}
_LITERALS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SIMPLE = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
    # Python 2 wrote bytes and text alike. Labels are text, and raw data go back to bytes.
    | {"STRING", "BINSTRING", "SHORT_BINSTRING"}
)


class _RefusedError(Exception):
    """The file holds more than plain values, or too many."""


@dataclass(frozen=True, slots=True)
class _Name:
    """One of the few names that a pickle of plain values needs. It is no function."""

    name: str


@dataclass(slots=True)
class _Dtype:
    """A data type, whose byte order follows after it is made."""

    value: np.dtype[Any]


class _Mark:
    """Where the items of a container begin on the stack."""


_MARK = _Mark()


@dataclass(slots=True)
class _Array:
    """An array, which is made before its values are known."""

    value: Any = _MARK  # which is refused as a value


def read_npz_objects(path: Path) -> dict[str, Any]:
    """Everything in an ``.npz`` file, object arrays included, without running code.

    Returns:
        The name of each array -> its value. An array without dimensions, which is how NumPy stores
        a dictionary, becomes the value itself; others stay arrays. NumPy scalars inside objects
        become Python numbers or text.

    Raises:
        DataError: the file cannot be read, is too large, or holds anything but plain values.
    """
    name = str(path)
    try:
        if path.stat().st_size > LARGEST:
            raise _RefusedError(f"is larger than {LARGEST >> 20} MiB")
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if len(parts) > _MOST_MEMBERS or sum(one.file_size for one in parts) > LARGEST:
                raise _RefusedError(f"unpacks to more than {LARGEST >> 20} MiB")
            arrays = [one for one in parts if one.filename.endswith(".npy")]
            found = {
                one.filename.removesuffix(".npy"): _array_of(archive.read(one)) for one in arrays
            }
    except _RefusedError as error:
        raise DataError(f"{error}, so it is not read; give the released file", file=name) from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", file=name) from error
    # zipfile, numpy and pickletools raise whatever a damaged file makes them stumble over.
    except Exception as error:
        raise DataError(f"is damaged or no .npz file ({error!r})", file=name) from error
    if not found:
        raise DataError("holds no arrays; give the released .npz file", file=name)
    return found


def _array_of(data: bytes) -> Any:
    """The value of one ``.npy`` member."""
    stream = io.BytesIO(data)
    version = npy.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(stream)
    else:
        shape, fortran, dtype = npy.read_array_header_2_0(stream)
    rest = data[stream.tell() :]
    _check_dtype(dtype)
    value = _interpret(rest) if dtype.hasobject else _filled(shape, dtype, rest, fortran=fortran)
    _Measure({}).of(value)
    return _plain(_Array(value))


def _interpret(data: bytes) -> Any:
    """The value that a pickle describes, with :class:`_Array` for its arrays."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for number, (opcode, arg, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if number > _MOST_VALUES:
            raise _RefusedError(f"has more than {_MOST_VALUES} pickle instructions")
        if name == "STOP":
            return stack.pop()
        if name in _SIMPLE:
            stack.append(bytes(arg) if isinstance(arg, bytearray) else arg)
        elif name in _LITERALS:
            stack.append(_LITERALS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(cast("Any", arg))] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(cast("Any", arg))])
        elif name == "GLOBAL":
            stack.append(_named(*str(arg).split(" ", 1)))
        elif name not in ("PROTO", "FRAME"):
            _step(name, stack)
    raise ValueError("the pickle has no end")


def _named(module: str, name: str) -> _Name:
    """A name that plain data need, whatever version of NumPy wrote it."""
    where = module.replace(_OLD, _NEW, 1) if module.startswith(_OLD) else module
    known = {
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("collections", "OrderedDict"),
    }
    plain = {*_BUILTIN, "bytes", "bytearray"}
    if where in ("builtins", "__builtin__") and name in plain:
        return _Name(name)
    if (where, name) not in known:
        raise _RefusedError(f"names '{module}.{name}', which plain data do not need")
    return _Name(name)


def _step(name: str, stack: list[Any]) -> None:
    """One instruction that needs nothing but the stack."""
    match name:
        case "MARK":
            stack.append(_MARK)
        case "EMPTY_LIST":
            stack.append([])
        case "EMPTY_TUPLE":
            stack.append(())
        case "EMPTY_DICT":
            stack.append({})
        case "EMPTY_SET":
            stack.append(set())
        case "LIST":
            stack.append(_to_mark(stack))
        case "TUPLE":
            stack.append(tuple(_to_mark(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            stack.append(tuple(_last(stack, int(name[-1]))))
        case "DICT":
            stack.append(_entries(_to_mark(stack)))
        case "FROZENSET":
            stack.append(frozenset(map(_key, _to_mark(stack))))
        case "APPEND":
            _add(_last(stack, 1), stack[-1])
        case "SETITEM":
            _add(_last(stack, 2), stack[-1])
        case "APPENDS" | "SETITEMS" | "ADDITEMS":
            _add(_to_mark(stack), stack[-1])
        case "POP":
            stack.pop()
        case "POP_MARK":
            _to_mark(stack)
        case "DUP":
            stack.append(stack[-1])
        case "STACK_GLOBAL":
            module, function = _last(stack, 2)
            stack.append(_named(str(module), str(function)))
        case "REDUCE":
            stack.append(_called(*_last(stack, 2)))
        case "BUILD":
            (state,) = _last(stack, 1)
            _build(stack[-1], state)
        case _:
            raise _RefusedError(f"holds the pickle instruction {name}, which no data need")


def _last(stack: list[Any], number: int) -> list[Any]:
    """Take the last items from the stack."""
    items = stack[-number:]
    if len(items) < number or _MARK in items:
        raise ValueError("the pickle has too few items")
    del stack[-number:]
    return items


def _to_mark(stack: list[Any]) -> list[Any]:
    """Take the items behind the last mark from the stack, and the mark."""
    for place in range(len(stack) - 1, -1, -1):
        if stack[place] is _MARK:
            items = stack[place + 1 :]
            del stack[place:]
            return items
    raise ValueError("the pickle has no mark")


def _add(items: list[Any], container: Any) -> None:
    """Add items to a list or a set, or keys and values in turn to a dictionary."""
    if isinstance(container, list):
        cast("list[Any]", container).extend(items)
    elif isinstance(container, set):
        cast("set[Any]", container).update(map(_key, items))
    elif isinstance(container, dict):
        cast("dict[Any, Any]", container).update(_entries(items))
    else:
        raise TypeError("the pickle adds to what is no container")


def _entries(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(_key, items[::2]), items[1::2], strict=True))


def _key(value: Any) -> Any:
    """A key or member. Containers are refused: hashing a deep tuple overflows the C stack."""
    if value is not None and not isinstance(value, str | int | float | bytes):
        raise _RefusedError(f"has a {type(value).__name__} as a key")
    return value


def _called(name: Any, args: Any) -> Any:
    """What a pickle calls: makes an array, a data type, a scalar or a container."""
    if not isinstance(name, _Name) or not isinstance(args, tuple):
        raise _RefusedError("calls what is no name")
    return _made(name.name, cast("tuple[Any, ...]", args))


def _made(name: str, args: tuple[Any, ...]) -> Any:
    if name == "_reconstruct":
        if args[0] != _Name("ndarray"):
            raise _RefusedError("makes an array of another kind")
        return _Array()  # its size is in what follows, and is checked there
    if name == "dtype":
        if not isinstance(args[0], str) or not _PLAIN_CODE.fullmatch(args[0]):
            raise _RefusedError(f"has values of type '{str(args[0])[:40]}'")
        return _Dtype(np.dtype(args[0]))
    if name == "scalar" and isinstance(args[0], _Dtype):
        return _Array(_filled((), args[0].value, args[1]))
    if name == "_frombuffer" and isinstance(args[1], _Dtype):
        return _Array(_filled(args[2], args[1].value, args[0], fortran=args[3] == "F"))
    if name in ("encode", "bytes", "bytearray"):
        if not args or isinstance(args[0], bytes):
            return args[0] if args else b""
        if isinstance(args[0], str) and args[1] in ("latin1", "latin-1"):
            return args[0].encode("latin1")
    if name == "OrderedDict":
        pairs = [item for pair in (args[0] if args else ()) for item in pair]
        return _entries(pairs)
    if name in ("set", "frozenset"):
        return _BUILTIN[name](map(_key, args[0] if args else ()))
    if name in _BUILTIN and not args:
        return _BUILTIN[name]()
    raise _RefusedError(f"calls '{name}' in an unusual way")


def _build(made: Any, state: Any) -> None:
    """Give an array its values, or a data type its byte order."""
    if not isinstance(state, tuple):
        raise _RefusedError("gives an object a state")
    values = cast("tuple[Any, ...]", state)
    if isinstance(made, _Dtype):
        if any(one is not None for one in values[2:5]):
            raise _RefusedError("has records")
        if values[1] in ("<", ">"):
            made.value = made.value.newbyteorder(values[1])
    elif isinstance(made, _Array) and isinstance(values[2], _Dtype):
        _, shape, dtype, fortran, data = values
        made.value = _filled(shape, dtype.value, data, fortran=bool(fortran))
    else:
        raise _RefusedError("gives an object a state")


def _filled(shape: Any, dtype: np.dtype[Any], data: Any, *, fortran: bool = False) -> Any:
    """An array of ``shape`` with its values, which must be just as many."""
    _check_dtype(dtype)
    if not isinstance(shape, tuple) or any(
        not isinstance(one, int) or one < 0 for one in cast("tuple[Any, ...]", shape)
    ):
        raise ValueError("an array has no shape")
    count = math.prod(cast("tuple[int, ...]", shape))
    order = "F" if fortran else "C"
    if dtype.hasobject:
        if not isinstance(data, list) or len(cast("list[Any]", data)) != count:
            raise ValueError("an array of objects has more or fewer of them")
        return _objects(shape, cast("list[Any]", data), order)
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    # Without bytes of their own, any number of empty texts would fit into a few.
    if len(raw) != count * dtype.itemsize or (dtype.itemsize == 0 and count > 1):
        raise ValueError("an array has more or fewer bytes than its shape")
    flat = np.frombuffer(raw, dtype) if raw else np.zeros(count, dtype)
    return flat.reshape(shape, order=order)


def _check_dtype(dtype: np.dtype[Any]) -> None:
    if dtype.names or dtype.subdtype or dtype.kind not in "biufcSUO":
        raise _RefusedError(f"has values of type '{dtype}'")


@dataclass(slots=True)
class _Measure:
    """Bounds what a value unpacks to, with shared parts counted each time, in the time of one walk
    over its parts."""

    sizes: dict[int, int]  # of each container by its id; 0 while its parts are measured

    def of(self, value: Any, depth: int = 0) -> int:
        """The number of values in a value."""
        if isinstance(value, str):
            value.encode()  # half a character could not be written again
        if isinstance(value, str | bytes):
            return 1 + len(value) // _TEXT_OF_A_VALUE
        if value is None or isinstance(value, bool | int | float | complex):
            return 1
        if depth > _DEEPEST or self.sizes.get(id(value)) == 0:
            raise _RefusedError(f"is nested deeper than {_DEEPEST} levels")
        if id(value) not in self.sizes:
            self.sizes[id(value)] = 0
            size = 1 + sum(self.of(one, depth + 1) for one in _parts(value))
            self.sizes[id(value)] = size
        if self.sizes[id(value)] > _MOST_VALUES:
            raise _RefusedError(f"holds more than {_MOST_VALUES} values")
        return self.sizes[id(value)]


def _parts(value: Any) -> list[Any]:
    """What a container holds.

    Raises:
        _RefusedError: it is none.
    """
    if isinstance(value, _Array):
        return [value.value]
    if isinstance(value, np.ndarray):
        array = cast("Any", value)
        return array.ravel().tolist() if array.dtype.kind in "USO" else []
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value)
        return [*entries, *entries.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(cast("list[Any]", value))
    raise _RefusedError(f"holds a {type(value).__name__.strip('_').lower()} without a value")


def _plain(value: Any) -> Any:
    """The plain value of a measured one."""
    if isinstance(value, _Array):
        inner = _plain(value.value)
        is_scalar = isinstance(inner, np.ndarray) and inner.ndim == 0
        return cast("Any", inner).item() if is_scalar else inner
    if isinstance(value, np.ndarray):
        array = cast("Any", value)
        return (
            _objects(array.shape, [*map(_plain, _parts(array))]) if array.dtype.hasobject else array
        )
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, cast("list[Any]", value)))  # pyright: ignore[reportUnknownVariableType]
    return value


def _objects(shape: tuple[int, ...], values: Sequence[Any], order: Literal["C", "F"] = "C") -> Any:
    """An array of objects."""
    flat = np.empty(len(values), dtype=object)
    # One by one: NumPy would take lists of lists for more dimensions.
    for place, one in enumerate(values):
        flat[place] = one
    return flat.reshape(shape, order=order)
