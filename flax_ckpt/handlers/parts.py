"""A PyTree that is saved in parts, each with some of the leaves, and put together at the end.

The parts gather in a directory beside the checkpoint-to-be:

    <checkpoint>.flax_ckpt.partial_save/
        part_000000/ part_000001/ …    each a checkpoint of its own
        part.orbax-checkpoint-tmp/     the one that is being saved
        whole.orbax-checkpoint-tmp/    all in one, whose rename to <checkpoint> is the commit
        finalized                      there from just before that rename on

Not Orbax's `<checkpoint>.partial_save`: each library would take the other's parts for its own.
"""

import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from flax_ckpt import errors
from flax_ckpt._async import logger
from flax_ckpt.format import arrays, names, tree
from flax_ckpt.storage import commit, files, native_write
from flax_ckpt.storage.record import Record

_EMPTY_DICT: Final = "Dict"
_Files = Mapping[str, bytes]


class Session(commit.Staging):
    """The partial saves of one checkpoint; as a `Staging` it is that of the next part.

    Args:
        checkpoint: absolute path that the checkpoint will have.
        mode: permission bits of directories; None: the umask's.
    """

    def __init__(self, checkpoint: str, mode: int | None = None) -> None:
        self.checkpoint = checkpoint
        self.directory = checkpoint + names.SESSION_SUFFIX
        super().__init__(os.path.join(self.directory, "part"), mode=mode)
        self._whole = os.path.join(self.directory, "whole" + names.TMP_SUFFIX)
        self._marker = os.path.join(self.directory, "finalized")

    def parts(self) -> list[str]:
        """The finished parts, in the order in which they were saved."""
        found = sorted(glob.glob("part_*", root_dir=self.directory))
        return [os.path.join(self.directory, n) for n in found if names.TMP_SUFFIX not in n]

    def check(self) -> None:
        """Checks that parts may be added, or put together.

        Raises:
            CheckpointExistsError: the checkpoint is there.
            InvalidLayoutError: Orbax has begun it.
        """
        if os.path.lexists(self.checkpoint):
            what = f"{self.checkpoint} already exists, and finished checkpoints are not added to"
            raise errors.CheckpointExistsError(f"{what}; save to another path, or delete it first")
        if os.path.lexists(other := self.checkpoint + names.PARTIAL_SUFFIX):
            how = "with orbax.checkpoint.experimental.v1.partial.finalize; what it makes loads here"
            what = f"{other} is a partial save that Orbax has begun: finish it there"
            raise errors.InvalidLayoutError(f"{what}, {how}")

    def recover(self) -> None:
        """Removes the session if its checkpoint was committed and only a crash left it there."""
        if os.path.lexists(self._marker) and not os.path.lexists(self._whole):
            commit.remove(self.directory)
        if os.path.lexists(left := commit.removed_path(self.directory)):
            commit.remove_left_over(left)
        self._unmark()

    def create(self, directories: Iterable[str]) -> None:
        """Makes the staging directory of the next part."""
        self.recover()
        super().create(directories)

    def commit(self) -> None:
        """Gives the synced part its name."""
        self.target = os.path.join(self.directory, f"part_{len(self.parts()):06d}")
        super().commit()

    def finalize(self, fill: Callable[[str], None]) -> None:
        """Makes the checkpoint, in one step; the session is gone then.

        Args:
            fill: writes all that it consists of into a directory.
        """
        whole = commit.Staging(self.checkpoint, mode=self.mode, path=self._whole)
        try:
            whole.create([names.STATE])
            fill(whole.path)
            whole.sync()
            files.sync_path(self.directory)  # the whole must not be missing where the marker is
            files.write(self._marker, b"")
            files.sync_path(self._marker)
            files.sync_path(self.directory)
            whole.commit()
        except BaseException as error:
            error.add_note(f"while finalizing {self.checkpoint}; the parts are as they were")
            if os.path.lexists(self._whole):
                self._unmark()  # first: without the whole it would say that there was a commit
                whole.discard()
            raise
        try:
            commit.remove(self.directory)
        except OSError as error:  # the marker stays: the next call tries again
            logger.warning("%s could not be removed: %s", self.directory, error)

    def _unmark(self) -> None:
        if os.path.lexists(self._marker):
            files.unlink(self._marker)
            files.sync_path(self.directory)


def check_disjoint(directory: str, described: Mapping[str, bytes]) -> None:
    """Checks that a part has no leaf that an earlier one of its session has.

    Args:
        directory: of the part that is about to be written.
        described: the files that will describe it.

    Raises:
        DuplicateNameError: lists the leaves; nothing was written.
    """
    session, name = os.path.dirname(os.path.dirname(directory)), os.path.basename(directory)
    target = session.removesuffix(names.SESSION_SUFFIX)
    if target != session:
        earlier = [_read(os.path.join(part, name)) for part in Session(target).parts()]
        _unite([*earlier, described], f"the partial save of {target}")


def merge(directory: str, parts: Sequence[str], target: str) -> None:
    """Puts a PyTree directory together from those of its parts, without copying array data.

    Args:
        directory: the new one; exists.
        parts: directories of the parts; they stay as they are.
        target: the checkpoint, for error messages.

    Raises:
        DuplicateNameError: two parts have the same leaf.
        FormatError: together they are no tree: an element of a list is missing.
    """
    what = f"the partial save of {target}"
    metadata, described = _unite([_read(part) for part in parts], what)
    tree.build([(entry.path, None) for entry in metadata.entries], what)
    for name, data in described.items():
        path = os.path.join(directory, name)
        files.mkdirs(os.path.dirname(path))
        files.write(path, data)
    native_write.unite(directory, parts)


def _read(directory: str) -> dict[str, bytes]:
    """The files that describe a PyTree directory, checked: contents by name."""
    record = Record(directory)
    inside = [name for name in files.walk(directory) if name.startswith(names.ARRAY_METADATAS)]
    wanted = (names.TREE_METADATA, names.SHARDING, names.STRINGS, *inside)
    return {name: record.read(name) for name in wanted if record.lists(name)}


def _unite(parts: Sequence[_Files], what: str) -> tuple[tree.TreeMetadata, _Files]:
    """The metadata of the union of several trees, and all files that describe it, by name.

    Nested dicts merge, an empty dict into any dict; a leaf that two of them have is an error.
    """
    metadatas = [tree.TreeMetadata.from_bytes(part[names.TREE_METADATA], what) for part in parts]
    entries = _unite_entries([entry for m in metadatas for entry in m.entries], what)
    stored = {(m.use_ocdbt, m.use_zarr3) for m in metadatas}
    if len(stored) > 1 or not all(use_ocdbt for use_ocdbt, _ in stored):
        text = f"{what}: parts with (use_ocdbt, use_zarr3) = {sorted(map(str, stored))}; all parts"
        text += " of one tree must be saved with the same options, and with use_ocdbt"
        raise errors.FormatError(text)
    shardings: dict[str, str] = {}
    strings: dict[str, str] = {}
    arrays_of: dict[str, list[tree.ArrayMetadata]] = {}
    for part, metadata in zip(parts, metadatas, strict=True):
        texts = [tree.name_of(e.path) for e in metadata.entries if e.kind == tree.STRING]
        shardings |= tree.decode_shardings(part.get(names.SHARDING, b"{}"), what)
        strings |= tree.decode_strings(part.get(names.STRINGS, b"{}"), texts, what)
        for name in [name for name in part if name.startswith(names.ARRAY_METADATAS)]:
            arrays_of.setdefault(name, []).extend(tree.decode_array_metadatas(part[name], what))
    united = tree.TreeMetadata(entries, *stored.pop())
    found = {name: tree.encode_array_metadatas(metadata) for name, metadata in arrays_of.items()}
    found[names.TREE_METADATA] = united.to_bytes()
    if shardings:
        found[names.SHARDING] = tree.encode_shardings(shardings)
    if strings:
        found[names.STRINGS] = tree.encode_strings(strings)
    return united, found


def _unite_entries(entries: Iterable[tree.Entry], what: str) -> list[tree.Entry]:
    found: dict[tree.KeyPath, tree.Entry] = {}
    clashes: list[str] = []
    for entry in entries:
        other = found.setdefault(entry.path, entry)
        if other is not entry and {entry.kind, other.kind} != {_EMPTY_DICT}:
            clashes.append(f"  {tree.show(entry.path)} is saved already")
    inner: dict[tree.KeyPath, set[int]] = {}
    for path in found:
        for n, key in enumerate(path):
            inner.setdefault(path[:n], set()).add(key.kind)
    for path, kinds in inner.items():
        if len(kinds) > 1:
            clashes.append(f"  {tree.show(path)} is a dict in one part and a list in another")
        entry = found.get(path)
        if entry and entry.kind == _EMPTY_DICT and kinds == {tree.DICT}:
            del found[path]
        elif entry:
            clashes.append(f"  {tree.show(path)} is one leaf in one part, and has some in another")
    if clashes:
        first = f"{what}: what was saved stays as it is, nothing was added to it:"
        last = "Parts of one tree must be disjoint; a leaf cannot be replaced: leave it out"
        raise errors.DuplicateNameError("\n".join([first, *clashes, last]))
    leaves = [path for path, entry in found.items() if entry.kind not in tree.EMPTY]
    tree.unique_names(leaves, [arrays.prefix(tree.name_of(path)) for path in leaves])
    return [found[path] for path in sorted(found, key=_order)]


def _order(path: tree.KeyPath) -> list[tuple[int, str]]:
    """Sorts elements of lists by their number."""
    return [(int(key.key) if key.kind == tree.SEQUENCE else 0, key.key) for key in path]
