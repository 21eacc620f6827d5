"""Every call that this process makes to the file system, before it is made.

    with intercepted(root, lambda call, perform: perform()):
        fc.save(...)

The functions of `os` are replaced, `open` and `renameat2` with them. The package writes with these
alone; what it reads with `preadv` is not seen.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import dataclasses
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

_ONE_PATH = ("mkdir", "unlink", "remove", "rmdir", "chmod", "utime", "listdir", "scandir")
_TWO_PATHS = ("rename", "replace", "link")
_DESCRIPTOR = ("fsync", "write", "writev", "close")
READS = frozenset({"listdir", "scandir", "read"})


@dataclasses.dataclass(frozen=True)
class Call:
    """One of them.

    Attributes:
        name: as in `os`; `create` for an `open` that makes a file, `exchange`, `read`.
        path: what it is about.
        target: the new name, of a link, too.
        data: what is to be written.
        descriptor: of an open file.
    """

    name: str
    path: str
    target: str = ""
    data: bytes = b""
    descriptor: int = -1


Around = Callable[[Call, Callable[..., Any]], Any]


@contextlib.contextmanager
def intercepted(root: str, around: Around) -> Iterator[None]:
    """Hands each call below `root` to `around`, with what makes it.

    That of a `writev` takes the number of bytes to write as an argument, all by default.
    """
    opened: dict[int, str] = {}
    root = os.path.join(root, "")

    def whole(path: Any, dir_fd: int | None = None) -> str:
        if isinstance(path, int):
            return opened.get(path, "")
        place = opened.get(dir_fd, "") if dir_fd is not None else os.getcwd()
        return os.path.join(place, os.fsdecode(path))

    def is_ours(path: str) -> bool:
        return (path + "/").startswith(root)

    def one_path(name: str, real: Any) -> Any:
        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            where = whole(path, kwargs.get("dir_fd"))
            if not is_ours(where):
                return real(path, *args, **kwargs)
            return around(Call(name, where), lambda: real(path, *args, **kwargs))

        return call

    def two_paths(name: str, real: Any) -> Any:
        def call(source: Any, target: Any, **kwargs: Any) -> Any:
            old, new = whole(source), whole(target)
            if not is_ours(old):
                return real(source, target, **kwargs)
            return around(Call(name, old, new), lambda: real(source, target, **kwargs))

        return call

    def descriptor(name: str, real: Any) -> Any:
        def call(fd: int, *args: Any) -> Any:
            if fd not in opened:
                return real(fd, *args)
            data = b"".join(bytes(view) for view in (args[0] if name == "writev" else args))

            def perform(count: int | None = None) -> Any:
                if name == "close":
                    opened.pop(fd)
                return real(fd, *args) if count is None else real(fd, [data[:count]])

            return around(Call(name, opened[fd], data=data, descriptor=fd), perform)

        return call

    real_open, real_builtin, real_library = os.open, builtins.open, ctypes.CDLL

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        where = whole(path, dir_fd)

        def perform() -> int:
            fd = real_open(path, flags, mode, dir_fd=dir_fd)
            opened[fd] = where
            return fd

        if not is_ours(where):
            return real_open(path, flags, mode, dir_fd=dir_fd)
        return around(Call("create" if flags & os.O_CREAT else "open", where), perform)

    def read(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, int) or not is_ours(where := whole(path)):
            return real_builtin(path, *args, **kwargs)
        return around(Call("read", where), lambda: real_builtin(path, *args, **kwargs))

    def library(*args: Any, **kwargs: Any) -> Any:
        libc = real_library(*args, **kwargs)

        def renameat2(at: int, source: bytes, to: int, target: bytes, flags: int) -> int:
            def perform() -> int:
                return libc.renameat2(at, source, to, target, flags)

            try:
                return around(Call("exchange", os.fsdecode(source), os.fsdecode(target)), perform)
            except OSError as error:
                ctypes.set_errno(error.errno or 0)
                return -1

        return SimpleNamespace(renameat2=renameat2) if hasattr(libc, "renameat2") else libc

    with pytest.MonkeyPatch.context() as patch:
        for names, wrap in (
            (_ONE_PATH, one_path),
            (_TWO_PATHS, two_paths),
            (_DESCRIPTOR, descriptor),
        ):
            for name in names:
                patch.setattr(os, name, wrap(name, getattr(os, name)))
        patch.setattr(os, "open", open_)
        patch.setattr(builtins, "open", read)
        patch.setattr(ctypes, "CDLL", library)
        yield
