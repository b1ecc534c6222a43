"""Published checkpoints read as data: `.pth` of any torch since 0.4, TorchScript, or safetensors. No name is looked up.

A pickle is a small program. We follow its instructions on plain data alone: what it names stays a name, what it would
call stays uncalled (but for tensors and ordered dicts, whose meaning we know), and the config keeps what is plain.
Each size is compared with what the file really holds before memory is taken.

Sources: Python's `pickletools` for the instructions; torch's `serialization.py` for the two layouts, zip and stream.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.types import Refusal

LARGEST = 16 << 30
"""Bytes of the largest file read; ViT-H with an optimizer's state has under 8 GiB."""
_PICKLE = 16 << 20  # bytes of a pickle, without the tensors; ViT-H has 60 KB
_INSTRUCTIONS = 1_000_000
_TENSORS = 20_000
_CONFIG = 1_000_000  # values and characters
_DEPTH = 32
_KEY = 100  # characters of a key that are told
_CHUNK = 1 << 20
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the stream layout
_DIRECTORY = 46 + 128  # bytes a zip's directory has for one entry, about

_OPEN_IT = "open it with the torch that wrote it, where you trust it, and save its state_dict as safetensors"
_BROKEN = (
    *(ValueError, LookupError, TypeError, AttributeError, OverflowError, ArithmeticError),
    *(AssertionError, RuntimeError, RecursionError, struct.error),
)
_DTYPES = {
    **{"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16},
    **{"DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}
_OTHERS = {
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"7z\xbc\xaf": "is a 7z archive; unpack it first",
    b"Rar!": "is a rar archive; unpack it first",
    b"version https://git-lfs": "is a git-lfs pointer, not the weights; fetch them with git lfs pull",
}


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What a checkpoint file holds."""

    tensors: dict[str, Tensor]  # contiguous, on the CPU, in the file's precision
    config: dict[str, Any] | None  # JSON-able; None stands where something was not
    left_out: tuple[str, ...]  # the places in the config where it stands


def read_checkpoint(path: Path, wanted: Callable[[str], bool] | None = None) -> Checkpoint:
    """Read a checkpoint without executing or importing anything that it names.

    Args:
        path: a `.pth` file as torch writes it, `{"state_dict": ..., "config": ...}` or a bare state dict; a TorchScript
            archive, of which the code is left alone; or a safetensors file (its metadata may hold the config as JSON).
        wanted: tells by its name whether a tensor is read into memory; None: all of them.

    Raises:
        Refusal: it is missing, a folder, damaged, no checkpoint, or claims more than it holds.
    """
    try:
        if path.is_dir():
            raise Refusal(f"{path} is a folder; name the checkpoint file in it")
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise Refusal(f"{path} is not a file; name the checkpoint file")
        with path.open("rb") as file:
            return _read(path, file, os.fstat(file.fileno()).st_size, wanted)
    except OSError as error:
        raise Refusal(f"{path} cannot be read ({error.strerror or error}); check its name and permissions") from error


def _read(path: Path, file: BinaryIO, size: int, wanted: _Wanted) -> Checkpoint:
    head = file.read(512)
    file.seek(0)
    if not head:
        raise Refusal(f"{path} is empty; download or copy it again")
    if size > LARGEST:
        raise Refusal(f"{path} has {size >> 30} GiB, and no checkpoint of this family has more than {LARGEST >> 30}")
    if head[8:9] == b"{":
        return _read_safetensors(path, head, size, wanted)
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path, file, size, wanted)
    if head.startswith(b"\x80"):
        return _read_stream(path, file, size, wanted)
    for start, sentence in _OTHERS.items():
        if head.startswith(start):
            raise Refusal(f"{path} {sentence}")
    if head.lstrip()[:1] in b"<{" or (head.isascii() and head.replace(b"\n", b" ").strip().decode().isprintable()):
        raise Refusal(f"{path} holds text, such as the page of a failed download; download the checkpoint again")
    if head[257:262] == b"ustar":
        raise Refusal(f"{path} is a tar archive; unpack it, or if torch older than 0.4 wrote it, {_OPEN_IT}")
    raise Refusal(f"{path} is neither a torch checkpoint (.pth) nor safetensors, or its beginning is damaged")


def _read_safetensors(path: Path, head: bytes, size: int, wanted: _Wanted) -> Checkpoint:
    (length,) = struct.unpack("<Q", head[:8])
    if length > size - 8 or length > _PICKLE:
        raise Refusal(f"{path} claims a header of {length} bytes, but has {size}; it is damaged: download it again")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > _TENSORS:
                raise Refusal(f"{path} holds {len(names)} tensors; no checkpoint of this family has so many")
            text = (file.metadata() or {}).get("config")
            tensors = {name: file.get_tensor(name) for name in names if wanted is None or wanted(name)}
    except (SafetensorError, *_BROKEN) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"{path} is a damaged safetensors file ({error}); download or copy it again") from error
    try:
        config = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        config = None
    return _checkpoint(path, tensors, *_plain(path, config))


@dataclass(frozen=True, slots=True, eq=False)
class _Name:
    """Something a pickle names: a class or a function that we do not look up."""

    module: str
    name: str


class _Inert:
    """Stands where a pickle would have made an object."""

    __slots__ = ()


class _Module:
    """Stands where TorchScript would have made a module: its parameters, buffers and submodules by name."""

    __slots__ = ("parts",)

    def __init__(self) -> None:
        self.parts: dict[Any, Any] = {}


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """A run of numbers beside the pickle."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class _Stored:
    """A tensor as a pickle describes it: a view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_Reader = Callable[[_Storage], Tensor]  # gives a storage's bytes as uint8, of the length it claims
_Wanted = Callable[[str], bool] | None


def _read_zip(path: Path, file: BinaryIO, size: int, wanted: _Wanted) -> Checkpoint:
    damaged = f"{path} is a damaged checkpoint"
    _check_directory(path, file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = _entries(path, archive, size)
            (index,) = [name for name in entries if name.endswith("/data.pkl")] or [""]
            if not index:
                raise Refusal(f"{path} is a zip archive without a checkpoint; unpack it, and name the file in it")
            prefix = index.removesuffix("data.pkl")
            if entries[index].file_size > _PICKLE:
                raise Refusal(
                    f"{path} describes its tensors in {entries[index].file_size} bytes; that is no checkpoint"
                )
            order = entries.get(f"{prefix}byteorder")
            if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
                raise Refusal(f"{path} was written on a big-endian machine; {_OPEN_IT}")
            found = _follow(io.BytesIO(archive.read(entries[index])))

            def read(storage: _Storage) -> Tensor:
                entry = entries.get(f"{prefix}data/{storage.key}")
                if entry is None or entry.file_size != storage.nbytes:
                    has = "none" if entry is None else entry.file_size
                    raise Refusal(f"{damaged}: a tensor claims {storage.nbytes} bytes and has {has}")
                with archive.open(entry) as data:
                    return _fill(storage.nbytes, data)

            return _take(path, found, read, size, wanted)
    except (zipfile.BadZipFile, EOFError, *_BROKEN) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"{damaged} ({_short(error)}); download or copy it again") from error


def _check_directory(path: Path, file: BinaryIO, size: int) -> None:
    """Refuse a zip whose directory, which is read whole, is larger than that of any checkpoint."""
    file.seek(max(0, size - (1 << 16) - 128))
    tail = file.read()
    file.seek(0)
    ends = [(b"PK\x05\x06", 12, "<I"), (b"PK\x06\x06", 40, "<Q")]
    for mark, at, form in ends:
        start = tail.rfind(mark)
        field = tail[start + at : start + at + struct.calcsize(form)] if start >= 0 else b""
        if len(field) == struct.calcsize(form):
            (length,) = struct.unpack(form, field)
            if length != 0xFFFFFFFF and length > 2 * _TENSORS * _DIRECTORY:
                raise Refusal(f"{path} is a zip archive with a directory of {length} bytes; that is no checkpoint")


def _entries(path: Path, archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by name; torch stores them as they are, one after another."""
    entries: dict[str, zipfile.ZipInfo] = {}
    end = 0
    for entry in sorted(archive.infolist(), key=lambda one: one.header_offset):
        if "/code/" in entry.filename:  # TorchScript's, compressed; never read
            end = max(end, entry.header_offset + 30 + len(entry.filename) + entry.compress_size)
            continue
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise Refusal(f"{path} is a compressed archive, and torch compresses nothing; unpack it, and name the file")
        if entry.filename in entries or entry.header_offset < end:
            raise Refusal(f"{path} holds entries twice or one over another; it was made by no torch: do not use it")
        entries[entry.filename] = entry
        end = entry.header_offset + 30 + len(entry.filename) + entry.file_size
    if end > size or len(entries) > 2 * _TENSORS:
        raise Refusal(f"{path} claims {end} bytes in {len(entries)} entries, but has {size}; download or copy it again")
    return entries


def _read_stream(path: Path, file: BinaryIO, size: int, wanted: _Wanted) -> Checkpoint:
    """Read the layout of torch before 1.6: five pickles, then the storages in the order of their keys."""
    damaged = f"{path} is a damaged checkpoint"
    try:
        pickles = io.BytesIO(file.read(_PICKLE))
        if _follow(pickles) != _MAGIC:
            raise Refusal(f"{path} is a pickle, but no torch checkpoint; {_OPEN_IT}")
        if _follow(pickles) != _PROTOCOL or not _follow(pickles)["little_endian"]:
            raise Refusal(f"{path} has a layout that is not read here; {_OPEN_IT}")
        storages: dict[str, _Storage] = {}
        found = _follow(pickles, storages)
        places, at = {}, 0
        keys = _follow(pickles)
        at = pickles.tell()
        for key in keys:
            if not isinstance(key, str):
                raise TypeError("a storage's key is no text")
            file.seek(at)
            (count,) = struct.unpack("<q", file.read(8))
            if count != storages[key].count:
                raise Refusal(f"{damaged}: a tensor claims {storages[key].count} numbers and has {count}")
            places[key] = at + 8
            at += 8 + storages[key].nbytes
            if at > size:
                raise Refusal(f"{path} ends before its tensors do; it was cut off: download or copy it again")

        def read(storage: _Storage) -> Tensor:
            file.seek(places[storage.key])
            return _fill(storage.nbytes, file)

        return _take(path, found, read, size, wanted)
    except (EOFError, *_BROKEN) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"{damaged} ({_short(error)}); download or copy it again") from error


def _take(path: Path, found: Any, read: _Reader, size: int, wanted: _Wanted) -> Checkpoint:
    """Return the checkpoint that a pickle describes, its tensors read."""
    if isinstance(found, list):
        raise Refusal(f"{path} holds several checkpoints in a list; save the one to import by itself")
    if isinstance(found, _Module):
        found = _flat(path, found)
    if not isinstance(found, dict):
        raise Refusal(f"{path} holds no state dict; {_OPEN_IT}")
    nested = next((found[key] for key in ("state_dict", "model") if isinstance(found.get(key), dict)), None)
    state = found if nested is None else nested
    config, left_out = _plain(path, found.get("config") if nested is not None else None)
    if len(state) > _TENSORS:
        raise Refusal(f"{path} holds {len(state)} tensors; no checkpoint of this family has so many")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Stored):
            raise Refusal(f"{path} holds {_short(name)} where a state dict has named tensors; {_OPEN_IT}")
    if wanted is not None:
        state = {name: one for name, one in state.items() if wanted(name)}
    claimed = sum(math.prod(one.shape) * one.storage.dtype.itemsize for one in state.values())
    if claimed > 2 * size:  # tensors may share numbers
        raise Refusal(f"{path} claims tensors of {claimed} bytes, but has {size}; it was made by no training: leave it")
    kept: dict[str, Tensor] = {}
    tensors = {}
    for name, one in state.items():
        storage = one.storage
        last = one.offset + sum((n - 1) * step for n, step in zip(one.shape, one.stride, strict=True))
        if 0 not in one.shape and last >= storage.count:
            raise Refusal(f"{path} is damaged: {_short(name)} reaches beyond its storage; download or copy it again")
        if storage.key not in kept:
            kept[storage.key] = read(storage)
        values = kept[storage.key].view(storage.dtype)
        view = torch.as_strided(values, one.shape, one.stride, one.offset)
        whole = view.is_contiguous() and view.numel() == values.numel()
        tensors[name] = view if whole else view.clone(memory_format=torch.contiguous_format)
    return _checkpoint(path, tensors, config, left_out)


def _checkpoint(path: Path, tensors: dict[str, Tensor], config: Any, left_out: tuple[str, ...]) -> Checkpoint:
    if not tensors:
        raise Refusal(f"{path} holds no tensors, or none of those looked for; name another file")
    if all(name.startswith("module.") for name in tensors):  # as DataParallel names them
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return Checkpoint(tensors, config if isinstance(config, dict) else None, left_out)


def _fill(nbytes: int, data: Any) -> Tensor:
    """Return that many bytes of an open file."""
    filled = torch.empty(nbytes, dtype=torch.uint8)
    rest = memoryview(filled.numpy().data)
    while rest:
        got = data.readinto(rest[:_CHUNK])
        if not got:
            raise EOFError("it ends too early")
        rest = rest[got:]
    if isinstance(data, zipfile.ZipExtFile):
        data.read(1)  # at the end zipfile compares the checksum
    return filled


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _follow(file: io.BytesIO, storages: dict[str, _Storage] | None = None) -> Any:
    """Return what the next pickle of `file` describes, in dicts, lists, tuples, numbers and texts, and stand-ins.

    Args:
        file: read up to the end of that pickle.
        storages: gets the storages that the pickle names.

    Raises:
        Refusal: it is longer than that of any checkpoint, or uses what torch never writes.
        ValueError, LookupError, TypeError: it is damaged; so are others of `_BROKEN`.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    storages = {} if storages is None else storages

    def since_mark() -> list[Any]:
        nonlocal stack
        above, stack = stack, marks.pop()
        return above

    for number, (instruction, given, _) in enumerate(pickletools.genops(file)):
        if number > _INSTRUCTIONS:
            raise Refusal(f"the file's pickle has more than {_INSTRUCTIONS} instructions; that is no checkpoint")
        name, argument = instruction.name, cast(Any, given)
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "STOP":
            return stack.pop()
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name in ("LIST", "TUPLE"):
            items = since_mark()
            stack.append(items if name == "LIST" else tuple(items))
        elif name == "DICT":
            stack.append(_put({}, since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            length = int(name[-1])
            items = [stack.pop() for _ in range(length)][::-1]
            stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
            elif not isinstance(stack[-1], _Inert):
                raise TypeError("something is appended to what is no list")
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else since_mark()
            if isinstance(stack[-1], dict):
                _put(stack[-1], items)
            elif not isinstance(stack[-1], _Inert):
                raise TypeError("an item is set in what is no dict")
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(_Name(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not isinstance(module, str) or not isinstance(attribute, str):
                raise TypeError("a name is no text")
            stack.append(_Name(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, made_by = stack.pop(), stack.pop()
            stack.append(_made(made_by, arguments))
        elif name == "BUILD":
            parts = stack.pop()
            if isinstance(stack[-1], _Module) and isinstance(parts, dict):
                stack[-1].parts = parts  # of any other object: its state is dropped, as we did not make it
        elif name == "NEWOBJ_EX":
            del stack[-3:]
            stack.append(_Inert())
        elif name == "EMPTY_SET":
            stack.append(_Inert())
        elif name in ("INST", "OBJ", "FROZENSET"):
            since_mark()
            stack.append(_Inert())
        elif name == "ADDITEMS":
            since_mark()
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), storages))
        else:
            raise Refusal(f"the file's pickle uses {name}, which torch never writes; {_OPEN_IT}")
    raise EOFError("the pickle has no end")


def _flat(path: Path, module: _Module) -> dict[str, _Stored]:
    """Return the tensors of a module and of those in it, named as in a state dict."""
    found: dict[str, _Stored] = {}
    visits = 0

    def walk(module: _Module, place: tuple[str, ...]) -> None:
        nonlocal visits
        visits += 1
        if visits > _TENSORS or len(place) > _DEPTH:
            raise Refusal(f"{path} has modules of impossible number or depth; it was made by no training: leave it")
        for name, part in module.parts.items():
            if isinstance(part, _Module):
                walk(part, (*place, str(name)))
            elif isinstance(part, _Stored):
                found[".".join((*place, str(name)))] = part

    walk(module, ())
    return found


def _put(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """Set keys and values that follow one another; keys are texts and numbers."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | None):
            raise TypeError("a key is neither text nor number")
        target[key] = value
    return target


def _made(made_by: Any, arguments: Any) -> Any:
    """Return what a call in a pickle stands for: a tensor, an ordered dict, or nothing we know."""
    if not isinstance(made_by, _Name):
        return _Inert()
    if made_by.module.partition(".")[0] == "__torch__":
        return _Module()
    called = f"{made_by.module}.{made_by.name}"
    if called == "torch._utils._rebuild_tensor_v2":
        storage, offset, shape, stride = arguments[:4]
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
            raise TypeError("a tensor is not described as one")
        if not len(shape) == len(stride) <= 8 or any(n > LARGEST for n in numbers):
            raise ValueError("a tensor has an impossible shape")
        return _Stored(storage, offset, tuple(shape), tuple(stride))
    if called == "torch._utils._rebuild_parameter":
        return arguments[0]
    if called == "collections.OrderedDict":
        ordered: dict[Any, Any] = {}
        for key, value in arguments[0] if arguments else ():
            _put(ordered, [key, value])
        return ordered
    return _Inert()


def _storage(named: Any, storages: dict[str, _Storage]) -> Any:
    """Return the storage that a persistent id names: ("storage", its class, key, device, count of numbers, view)."""
    if not isinstance(named, tuple) or named[0] != "storage":
        return _Inert()  # the stream layout also kept the sources of modules
    kind, key, _, count = named[1:5]
    if named[5:] not in ((), (None,)):
        raise Refusal(f"the file was written by torch older than 0.4; {_OPEN_IT}")
    if not isinstance(kind, _Name) or kind.name not in _DTYPES or kind.module not in ("torch", "torch.cuda"):
        raise Refusal(f"the file holds numbers of a kind that is not read here; {_OPEN_IT}")
    if not isinstance(key, str) or type(count) is not int or not 0 <= count <= LARGEST:
        raise TypeError("a storage is not described as one")
    storage = _Storage(key, _DTYPES[kind.name], count)
    known = storages.setdefault(key, storage)
    if (known.dtype, known.count) != (storage.dtype, storage.count):
        raise ValueError("a storage is described in two ways")
    return known


def _plain(path: Path, value: Any) -> tuple[Any, tuple[str, ...]]:
    """Return `value` as JSON can hold it, and the places where it could not."""
    left_out: list[str] = []
    budget = _CONFIG

    def walk(value: Any, place: tuple[str, ...]) -> Any:
        nonlocal budget
        budget -= 1 + (len(value) if isinstance(value, str) else 0)
        if budget < 0 or len(place) > _DEPTH:
            raise Refusal(f"{path} has a config of impossible size or depth; it was made by no training: leave it")
        if isinstance(value, str | bool | None) or (type(value) is int and abs(value) < 1 << 63):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        if isinstance(value, list | tuple):
            return [walk(item, (*place, str(index))) for index, item in enumerate(value)]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            budget -= sum(map(len, value))
            return {key: walk(item, (*place, key[:_KEY])) for key, item in value.items()}
        left_out.append(".".join(place))
        budget -= len(left_out[-1])
        return None

    return walk(value, ()), tuple(left_out)


def _short(value: object) -> str:
    """Return at most a line of what a file says, for a sentence."""
    return repr(value)[:120] if isinstance(value, str | int | float) else str(value)[:120] or type(value).__name__
