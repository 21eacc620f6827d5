"""One run at a time in a directory: a file there says which process saves into it.

Locks of the operating system do not hold over network file systems, nor between containers. So the
holder touches its file every few seconds. Whether a process of this machine runs is known; the
file of any other is watched, and if nobody touches it for a while, its holder is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import glob
import os
import threading
import time
import uuid
from typing import Final

from flax_ckpt._async import forget_in_child, logger
from flax_ckpt.errors import RunInUseError
from flax_ckpt.format import names
from flax_ckpt.storage import commit, files

BEAT_SECS: Final = 3.0
STALE_SECS: Final = 15.0
_ABSENT: Final = ("", 0)

_held: dict[str, RunLock] = {}
_lock = threading.Lock()
forget_in_child(_lock, _held.clear)


def acquire(directory: str) -> RunLock:
    """Takes the lock of a run's root, which is made if it is not there.

    All who save there from this process share one; each releases it.

    Raises:
        RunInUseError: another process has it; says which, and since when.
    """
    place = os.path.realpath(directory)
    with _lock:
        lock = _held.get(place) or RunLock(place)
        _held[place] = lock
        lock.users += 1
        return lock


class RunLock:
    """The lock of a directory; see :func:`acquire`.

    Attributes:
        users: how many hold it.
    """

    def __init__(self, directory: str) -> None:
        self.users = 0
        self._directory, self._pid = directory, os.getpid()
        self._path = os.path.join(directory, names.LOCK)
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._text = f"{commit.identity(os.getpid())}\n{since}\n"
        self._released = threading.Event()
        files.make_directory(directory)
        while not self._create():
            self._clear_stale()
        for left in glob.glob(f"{glob.escape(self._path)}-*"):  # of a process that was killed
            with contextlib.suppress(FileNotFoundError):
                files.unlink(left)
        threading.Thread(target=self._beat, name="flax_ckpt lock", daemon=True).start()

    def check(self) -> None:
        """Checks that it is held still; takes it again if somebody has removed the file.

        Raises:
            RunInUseError: another process has taken it, while this one was stopped; or this one
                was forked, and the lock is its parent's.
        """
        own = self._pid == os.getpid()
        while (found := self._look()) == _ABSENT and own:
            files.make_directory(self._directory)
            self._create()
        if found != _ABSENT and (found[0] != self._text or not own):
            raise self._in_use(found[0])

    def release(self) -> None:
        """Gives it up, when the last of its users does."""
        with _lock:
            self.users -= 1
            if self.users == 0:
                _held.pop(self._directory, None)
                self._end()

    def _end(self) -> None:
        self._released.set()
        # A forked process does not hold it.
        if self._pid == os.getpid() and self._look()[0] == self._text:
            with contextlib.suppress(FileNotFoundError):
                files.unlink(self._path)

    def _create(self) -> bool:
        with contextlib.suppress(FileExistsError):
            files.write(self._path, self._text.encode())
            return True
        return False

    def _look(self, path: str | None = None) -> tuple[str, int]:
        """Content and time of the file; empty and 0 if there is none."""
        try:
            # Opening it asks a file server, unlike `stat`.
            with open(path or self._path, errors="replace") as file:
                return file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return _ABSENT

    def _clear_stale(self) -> None:
        """Removes the file of a process that has ended; raises if it lives."""
        text = (found := self._look())[0]
        host, pid = commit.running(text.partition("\n")[0]) or ("", 0)
        here = host == commit.machine()
        if here and pid != os.getpid():  # its own: before it was replaced by `exec`
            raise self._in_use(text)
        if found != _ABSENT and (not text or (host and not here)):  # being written, or elsewhere
            self._watch(text)
        aside = f"{self._path}-{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            files.rename(self._path, aside)
            if self._look(aside)[0] != text:  # it has taken the lock since: give it back
                with contextlib.suppress(FileExistsError):
                    files.link(aside, self._path)
            files.unlink(aside)

    def _watch(self, text: str) -> None:
        """Returns if nobody touches the file of another host's process for a while."""
        logger.info("waiting up to %g s for the holder of %s", STALE_SECS, self._path)
        first, deadline = self._look(), time.monotonic() + STALE_SECS
        while time.monotonic() < deadline and (found := self._look()) != _ABSENT:
            if found != first:
                raise self._in_use(found[0] or text)
            self._released.wait(BEAT_SECS / 10)

    def _in_use(self, text: str) -> RunInUseError:
        owner, _, since = text.strip().partition("\n")
        host, pid, *_ = [*owner.split(), "?", "?"]
        return RunInUseError(
            f"{self._directory} is in use: process {pid} on {host.partition(':')[0]} saves there"
            f" since {since or '?'}. Give this run another directory, or end that process. If"
            f" it is gone, remove {self._path}"
        )

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECS):
            try:
                if (found := self._look()) == _ABSENT:
                    continue
                if found[0] != self._text:
                    return  # `check` tells
                files.touch(self._path)
            except OSError as error:
                logger.warning("%s could not be touched: %s", self._path, error)


def _release_all() -> None:
    with _lock:
        for lock in _held.values():
            lock._end()  # pyright: ignore[reportPrivateUsage]
        _held.clear()


atexit.register(_release_all)
