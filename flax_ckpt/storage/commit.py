"""How a directory appears as a whole or not at all.

    staging = Staging("/ckpt/100", overwrite=False)
    staging.create(["params"])       # /ckpt/100.orbax-checkpoint-tmp/params
    ...                              # files are written
    staging.commit()                 # sync files, directories; rename; sync the parent

Until the rename the target is what it was. Order matters: a name must not become durable before
the bytes that it promises.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import errno
import glob
import os
import socket
import sys
import uuid
from collections.abc import Iterable

from etils import epath

from flax_ckpt._async import logger
from flax_ckpt.errors import CheckpointExistsError, CheckpointNotFoundError
from flax_ckpt.format import names
from flax_ckpt.storage import files
from flax_ckpt.storage.kinds import contents


class Staging:
    """The directory beside `target` in which a checkpoint is put together.

    Args:
        target: absolute path that the checkpoint will have.
        overwrite: whether a checkpoint at `target` is replaced, in one step, at commit.
        mode: permission bits of the directories made, the owner's always; None: the umask's.
        path: where to put it together; empty: beside the target.

    Raises:
        CheckpointExistsError: there is something at `target` and `overwrite` is false.
    """

    def __init__(
        self, target: str, *, overwrite: bool = False, mode: int | None = None, path: str = ""
    ) -> None:
        self.target = target
        self.path = path or target + names.TMP_SUFFIX
        self.mode = mode if mode is None else mode | 0o700
        self._overwrite = overwrite
        self._owner = identity(os.getpid())
        self._made = False
        self._check_free()

    def _check_free(self) -> None:
        there = os.listdir(self.target) if os.path.isdir(self.target) else []
        if os.path.isfile(self.target):
            why = "is a file, which is not overwritten; save to another path"
        elif there and not names.MARKS.intersection(there):
            found = contents(self.target)
            why = f"is a directory but no checkpoint, so it is not overwritten; it has: {found}"
        elif os.path.lexists(self.target) and not self._overwrite:
            why = "already exists; pass overwrite=True to replace it, or save to another path"
        else:
            return
        raise CheckpointExistsError(f"{self.target} {why}")

    def create(self, directories: Iterable[str]) -> None:
        """Makes the staging directory and those in it, after removing what a crash left there.

        Raises:
            CheckpointExistsError: another process is saving to the target.
        """
        files.make_directory(os.path.dirname(self.target))
        # It gets its name with the owner's in it, so that of two processes one finds the other's.
        made = f"{self.path}-{uuid.uuid4().hex}"
        try:
            files.mkdir(made)
            files.write(os.path.join(made, names.OWNER), self._owner.encode())
            while not _take(made, self.path):
                self._clear_left_over()
        except BaseException:
            remove_left_over(made)
            raise
        self._made = True
        for left in glob.glob(f"{glob.escape(self.path)}-old-*"):  # of a crash
            if owner(left) in (None, (machine(), os.getpid())):
                remove_left_over(left)
        for name in directories:
            files.mkdir(os.path.join(self.path, name))
        if self.mode is not None:
            files.chmod(self.path, self.mode)

    def sync(self) -> None:
        """Makes all that is in the staging directory durable, whoever wrote it."""
        if self.mode is not None:
            for directory in files.directories(self.path):
                files.chmod(directory, self.mode)
        files.sync_tree(self.path)

    def _clear_left_over(self) -> None:
        """Removes what has the name of the staging directory, unless a process here makes it."""
        self._refuse_running(self.path)
        left = self._aside()
        with contextlib.suppress(FileNotFoundError):  # that process has just committed it
            files.rename(self.path, left)
            try:
                self._refuse_running(left)  # it was made in between: give it back
            except CheckpointExistsError:
                files.rename(left, self.path)
                raise
            remove_left_over(left)

    def _refuse_running(self, path: str) -> None:
        host, pid = owner(path) or ("", 0)
        if host == machine() and pid != os.getpid():
            raise CheckpointExistsError(
                f"{self.target} is being saved by process {pid} of this machine, which still runs:"
                " save to another path, or end that process"
            )

    def commit(self) -> None:
        """Gives the synced directory its name, durably; what was there before is removed.

        The owner stays in it until then: who finds it without would take it for a left-over.

        Raises:
            CheckpointExistsError: a process of another machine has begun to save to the target.
        """
        self._check_free()
        staging, replaces = self.path, os.path.lexists(self.target)
        if replaces:  # under a name that nobody else looks for
            files.rename(staging, aside := self._aside())
            self.path = aside
        try:
            self._check_own()
        except CheckpointExistsError:
            if replaces:
                files.rename(self.path, staging)
            raise
        move = files.exchange if replaces else files.rename
        move(self.path, self.target)
        self._made = False  # until it is durable, what was there before is to be left alone
        try:
            for parent in {os.path.dirname(path) for path in (self.path, self.target)}:
                files.sync_path(parent)
        except OSError:  # not durable, so it did not happen
            move(self.target, self.path)
            self._made = True
            raise
        remove_left_over(os.path.join(self.target, names.OWNER))
        if replaces:
            remove_left_over(self.path)  # what was at the target

    def _check_own(self) -> None:
        """Checks that what has the staging directory's name is what this object has made."""
        try:
            found = files.read(os.path.join(self.path, names.OWNER)).decode(errors="replace")
        except FileNotFoundError:
            found = ""
        if found != self._owner:
            self._made = False
            host, pid, *_ = [*found.split(), "?", "?"]
            who = f"process {pid} on {host.partition(':')[0]} has begun to save to {self.target}"
            who = who if found else f"{self.path} is gone: somebody has removed or renamed it"
            raise CheckpointExistsError(f"{who}. This save was not committed")

    def discard(self) -> None:
        """Removes what this object made; leaves the target as it is.

        Raises:
            CheckpointExistsError: what has its name is that of a process of another machine.
        """
        if self._made:
            self._check_own()
            remove_left_over(self.path)

    def _aside(self) -> str:
        return f"{self.path}-old-{uuid.uuid4().hex}"


def _take(made: str, path: str) -> bool:
    """Gives a directory its name; False: something has it."""
    try:
        files.rename(made, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True


def owner(path: str) -> tuple[str, int] | None:
    """Host and number of the process that makes a staging directory, if it may still run."""
    try:
        return running(files.read(os.path.join(path, names.OWNER)).decode())
    except (OSError, ValueError):  # it is not there, or no text, or no file
        return None


def identity(pid: int) -> str:
    """Host and number of a running process; on Linux its start too, as numbers are given again."""
    started = ""
    try:
        if sys.platform == "linux":
            stat = files.read(f"/proc/{pid}/stat").decode(errors="replace")
            started = stat.rpartition(")")[2].split()[19]  # field 22 of proc(5)
        else:
            os.kill(pid, 0)
    except PermissionError:
        pass  # another user's
    except OSError:
        return ""
    return f"{machine()} {pid} {started}"


def running(text: str) -> tuple[str, int] | None:
    """Host and number of the process of that identity; None if it has ended.

    One of another host counts as running: nothing is known of it.
    """
    try:
        host, pid = text.split()[:2]
        ended = host == machine() and text != identity(int(pid))
        return None if ended else (host, int(pid))
    except ValueError:
        return None


def machine() -> str:
    """Where a process number means one process: a container may have numbers of its own."""
    numbers = "/proc/self/ns/pid"
    space = os.stat(numbers).st_ino if os.path.exists(numbers) else ""
    return f"{socket.gethostname()}:{space}"


@dataclasses.dataclass(frozen=True)
class DeferredPath:
    """A path whose directory is made in the background; see `handlers.PathAwaitingCreation`.

    Attributes:
        path: the path; nothing need be there yet.
        created: done when the directory is there, or could not be made.
    """

    path: epath.Path
    created: concurrent.futures.Future[None] = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    def __truediv__(self, other: str | os.PathLike[str]) -> DeferredPath:
        return DeferredPath(self.path / other, self.created)

    async def await_creation(self) -> epath.Path:
        """Waits until the directory is there and returns its path."""
        await asyncio.wrap_future(self.created)
        return self.path


def remove(path: str) -> None:
    """Removes a checkpoint: it leaves its name before the first byte goes.

    Raises:
        CheckpointNotFoundError: there is nothing.
    """
    remove_left_over(withdraw(path))


def withdraw(path: str) -> str:
    """Takes a checkpoint's name away, durably, unless that was done but not all that follows.

    Returns:
        Where it is now: a left-over.

    Raises:
        CheckpointNotFoundError: there is nothing.
    """
    doomed = removed_path(path)
    if os.path.isdir(path):
        files.clear(doomed)
        files.rename(path, doomed)
    elif not os.path.lexists(doomed):
        raise CheckpointNotFoundError(f"{path} is not there, or is no directory: nothing removed")
    files.sync_path(os.path.dirname(path))  # an earlier call may have failed to
    return doomed


def removed_path(path: str) -> str:
    """Where a checkpoint is while it is being removed."""
    return f"{path}.deleted{names.TMP_SUFFIX}"


def remove_left_over(path: str) -> None:
    """Removes what is of no use any more; if it cannot be, the next start tries again."""
    try:
        while os.path.lexists(path):
            with contextlib.suppress(FileNotFoundError):  # another process removes it as well
                if os.path.isdir(path):  # it may still have another name on the disk
                    files.sync_path(os.path.dirname(path))
                files.clear(path)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)
