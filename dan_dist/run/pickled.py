"""Files of torch.save, read after a look at what reading them would take.

torch's reader runs no code of a file. But a few hundred bytes can have it make gigabytes, or hash
one key for days: values of any size, copies of copies, tuples that hold one tuple twice and so on.
So the opcodes of a pickle are followed first, without doing what they say.
"""

import argparse
import datetime
import io
import math
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from dan_dist.run.plain import LARGEST, MOST_VALUES
from shards.command import escape


def _history(*_: object) -> dict[Any, Any]:
    """A plain dict in place of a defaultdict, whose entries torch does not read."""
    return {}


# Beside tensors and plain values, what training scripts leave in their files: constructors of
# values that run no code of the file, by the names that files give them.
HARMLESS: list[Any] = [
    *[(value.__reduce__()[0], f"{module}.multiarray.{name}")
      for value, name in ((np.float64(0), "scalar"), (np.zeros(1), "_reconstruct"))
      for module in ("numpy.core", "numpy._core")],
    np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdgFDUSO"},
    argparse.Namespace, pathlib.PosixPath, datetime.datetime, datetime.timedelta,
    (_history, "collections.defaultdict"), list, dict, int, float,  # the last are its empty values
]  # fmt: skip

MOST_AXES = 64  # of an array
WORK = 4  # how often the file's bytes may be copied or hashed in all
ITEM_BYTES = {  # of a storage, by the name of its class
    "DoubleStorage": 8, "LongStorage": 8, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16,
    "FloatStorage": 4, "IntStorage": 4, "QInt32Storage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "ShortStorage": 2,
}  # fmt: skip
# What torch.save names but does not have called: by numbers alone they make room of any size
_UNCALLED = ("bytearray", "list", "dict", "ndarray", "_rebuild_wrapper_subclass")
_SHAPED = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor",
           "_reconstruct")  # fmt: skip

# The opcodes that torch reads
_VALUES = ("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
           "BINUNICODE", "SHORT_BINSTRING", "EMPTY_DICT", "EMPTY_SET")  # fmt: skip
_PUTS, _GETS = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load(path: Path) -> Any:
    """What torch.save has written into a file, its tensors onto the CPU.

    Raises:
        ValueError: it is damaged, or would take more than a file of its size can hold.
        pickle.UnpicklingError, RuntimeError, EOFError: it is no such file, or holds other values.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\3\4"  # as torch tells its two formats apart
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if is_zip:
            check_parts(path)
            # By torch's own reader: another one may find another part of this name
            content = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
            Follower(size).follow(io.BytesIO(content))
        else:
            follower = Follower(size)
            if follower.follow(file) != torch.serialization.MAGIC_NUMBER:
                raise pickle.UnpicklingError("it does not begin as a file of torch.save")
            for _ in ("version", "system", "content", "keys of the storages"):
                follower.follow(file)
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    finally:  # else torch looks at a failed file's sparse tensors again, after the next file's
        getattr(torch._utils, "_get_sparse_tensors_to_validate", list)().clear()


def check_parts(path: Path) -> None:
    """Looks at the checksums, which torch writes but does not look at, of parts of a bounded size.

    torch compresses nothing: a part that is compressed may be of any size.
    """
    with zipfile.ZipFile(path) as parts:
        names = [part.filename for part in parts.infolist()]
        if not any(name.endswith("/data.pkl") for name in names):
            shown = ", ".join(map(escape, names[:3]))
            raise ValueError(f"it is an archive of {len(names)} files, {shown}; unpack it")
        if any("/code/" in name for name in names):
            raise ValueError("it is a TorchScript; save the network's state_dict() alone")
        for part in parts.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{escape(part.filename)} in it is compressed")
        if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
            raise ValueError("its parts are larger than the file")
        if (damaged := parts.testzip()) is not None:
            raise ValueError(f"{escape(damaged)} does not have its checksum")


def unknown_names(path: Path) -> str:
    """What a file holds beside tensors and plain values, as far as it can be told."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a file that is garbage, or of before torch 1.6
        return ""
    if not names:
        return ""
    shown = ", ".join(escape(name) for name in sorted(names)[:3])
    return f": {shown}; save the network's state_dict() alone"


class RefusedError(ValueError):
    """A pickle that would take more than its file can hold."""


class _Name(str):
    """The last part of a global's name."""

    __slots__ = ()


class _Value:
    """A value that a pickle makes, as far as it matters here."""

    __slots__ = ("held", "size")

    def __init__(self, held: Any = None, size: int = 1) -> None:
        self.held = held  # a number, a text, a name; of tuples and lists, their values
        self.size = size  # how many values, signs or elements one who copies or hashes it meets


class Follower:
    """Follows the pickles of one file, which together may take what its size allows."""

    def __init__(self, file_bytes: int) -> None:
        self._file_bytes, self._made, self._work = file_bytes, 0, 0
        self._storages: dict[Any, int] = {}  # key → bytes

    def follow(self, stream: BinaryIO) -> Any:
        """Follows a pickle to its end; returns its value, where that is a number or a text.

        Raises:
            RefusedError: it would take too much. EOFError: it is cut off.
            pickle.UnpicklingError: it is none, or none that torch reads.
        """
        self._stack, self._marks = list[_Value](), list[list[_Value]]()
        self._memo: dict[int, _Value] = {}
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self._step(opcode.name, argument)
                if max(self._made, len(self._memo)) > MOST_VALUES:
                    raise RefusedError(f"it holds more than {MOST_VALUES:,} values")
                if self._work > WORK * self._file_bytes + MOST_VALUES:
                    raise RefusedError("it has the same values copied or hashed over and over")
            if (total := sum(self._storages.values())) > self._file_bytes:
                raise RefusedError(f"its tensors take {total:,} bytes, more than the file")
            return self._stack.pop().held
        except RefusedError:
            raise
        except Exception as error:  # of pickletools; a stack or a memo that lacks what is asked for
            if stream.read(1):
                raise pickle.UnpicklingError("it is no pickle that torch reads") from error
            raise EOFError from error

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _GETS:
            stack.append(self._memo[argument])
            return
        if name in _PUTS:
            self._memo[argument] = stack[-1]
            return
        self._made += 1
        if name in _VALUES:
            stack.append(_Value(argument, len(argument) if isinstance(argument, str) else 1))
        elif name == "GLOBAL":
            stack.append(_Value(_Name(argument.replace(" ", ".").rpartition(".")[2])))
        elif name == "EMPTY_LIST":
            stack.append(_Value([]))
        elif name == "MARK":
            self._marks.append(stack)
            self._stack = []
        elif name in _TUPLES:
            stack.append(_tuple([stack.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name == "TUPLE":
            self._until_mark().append(_tuple(stack))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else stack
            target = stack[-1] if name == "APPEND" else self._until_mark()[-1]
            target.held += items
            target.size += sum(item.size for item in items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else stack
            target = stack[-1] if name == "SETITEM" else self._until_mark()[-1]
            hashed = sum(key.size for key in items[::2])
            self._work += hashed
            target.size += hashed + len(items) // 2
        elif name not in ("PROTO", "STOP"):
            self._make(name)

    def _make(self, name: str) -> None:
        """Calls, states and storages."""
        given = self._stack.pop()
        size = given.size
        if name in ("REDUCE", "NEWOBJ"):
            result = _result(self._stack.pop(), given)
            self._stack.append(result)
            size = result.size
        elif name == "BUILD":
            size += _elements(given.held) if isinstance(given.held, tuple) else 0
            self._stack[-1].size += size
        elif name == "BINPERSID":  # ("storage", its class, key, device, how many numbers, …)
            kind, key, _, count = (item.held for item in given.held[1:5])
            if not isinstance(key, str | int):
                raise pickle.UnpicklingError("a storage without a name")
            size_bytes = abs(count) * ITEM_BYTES.get(kind, 1)
            self._storages[key] = max(self._storages.get(key, 0), size_bytes)
            self._stack.append(_Value())
        else:
            raise pickle.UnpicklingError(f"torch does not read {name}")
        self._work += size

    def _until_mark(self) -> list[_Value]:
        """Goes back to the stack of before the last mark."""
        self._stack = self._marks.pop()
        return self._stack


def _tuple(items: Sequence[_Value]) -> _Value:
    return _Value(tuple(items), 1 + sum(item.size for item in items))


def _result(function: _Value, given: _Value) -> _Value:
    """What a call gives, as large as what it is given; of tensors, as many values as elements.

    Raises:
        RefusedError: a call that torch.save does not write.
    """
    name, items = function.held, given.held if isinstance(given.held, tuple) else ()
    if not isinstance(name, _Name):
        raise pickle.UnpicklingError("it calls what is no name")
    if name == "_rebuild_from_type_v2":  # (function, type, arguments, state)
        if not isinstance(items[0].held, _Name) or not items[0].held.startswith("_rebuild_"):
            raise RefusedError("a tensor in it is made by something else than torch's functions")
        return _Value(None, given.size + _result(items[0], items[2]).size)
    is_odd = (name == "encode" and [item.held for item in items[1:]] != ["latin1"]) or (
        name == "scalar" and len(items) != 2
    )
    if is_odd or name in _UNCALLED or name.endswith(("Tensor", "Storage")):
        raise RefusedError(f"it calls {escape(name)} as torch.save does not")
    size = given.size + (_elements(items) if name in _SHAPED else 0)
    return _Value(items[0].held if name == "Size" and items else None, size)


def _elements(items: Sequence[_Value]) -> int:
    """How many elements a tensor or an array has whose shape is among its first three arguments.

    A stride comes later. What is no shape counts as the largest one.
    """
    most = 0
    for shape in (item.held for item in items[:3] if isinstance(item.held, tuple | list)):
        lengths = [n.held for n in shape[:MOST_AXES] if isinstance(n.held, int)]
        most = max(most, abs(math.prod(lengths)) if len(lengths) == len(shape) else LARGEST)
    return most
