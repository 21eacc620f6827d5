"""The directory beside a checkpoint-to-be in which partial saves gather.

    <target>.flax_ckpt.partial_save/
        part_000000/ part_000001/ …    each a checkpoint of its own, with some of the leaves
        part.orbax-checkpoint-tmp/     the one that is being saved
        whole.orbax-checkpoint-tmp/    all in one, whose rename to <target> is the commit
        finalized                      there from just before that rename on

Not Orbax's `<target>.partial_save`: each library would take the other's parts for its own.
"""

from __future__ import annotations

import dataclasses
import logging
import os

from flax_ckpt.errors import CheckpointExistsError, InvalidLayoutError
from flax_ckpt.format import names
from flax_ckpt.storage import commit, files
from flax_ckpt.storage.commit import Staging

logger = logging.getLogger("flax_ckpt")

_PART = "part_"
_FINALIZED = "finalized"


@dataclasses.dataclass(frozen=True)
class Session:
    """The partial saves of one checkpoint.

    Attributes:
        target: absolute path that the checkpoint will have.
        mode: permission bits of directories; None: the umask's.
    """

    target: str
    mode: int | None = None

    @property
    def path(self) -> str:
        """The session's directory."""
        return self.target + names.SESSION_SUFFIX

    def staging(self) -> Staging:
        """Where the next part is put together."""
        return Staging(os.path.join(self.path, "part"), mode=self.mode)

    def whole(self) -> Staging:
        """Where the checkpoint is put together."""
        return Staging(self.target, mode=self.mode, path=self._whole)

    @property
    def _whole(self) -> str:
        return os.path.join(self.path, "whole" + names.TMP_SUFFIX)

    def parts(self) -> list[str]:
        """The finished parts, in the order in which they were saved."""
        found = os.listdir(self.path) if os.path.isdir(self.path) else []
        return [
            os.path.join(self.path, name)
            for name in sorted(found)
            if name.startswith(_PART) and names.TMP_SUFFIX not in name
        ]

    def next_part(self) -> str:
        """The path of the part that is finished next."""
        return os.path.join(self.path, f"{_PART}{len(self.parts()):06d}")

    def check(self) -> None:
        """Checks that parts may be added, or put together.

        Raises:
            CheckpointExistsError: the checkpoint is there.
            InvalidLayoutError: Orbax has begun it.
        """
        if os.path.lexists(self.target):
            raise CheckpointExistsError(
                f"{self.target} already exists, and finished checkpoints are not added to; save to"
                " another path, or delete it first"
            )
        if os.path.lexists(other := self.target + names.PARTIAL_SUFFIX):
            raise InvalidLayoutError(
                f"{other} is a partial save that Orbax has begun: finish it there, with"
                " orbax.checkpoint.v1.partial.finalize; what it makes loads here"
            )

    @property
    def _marker(self) -> str:
        return os.path.join(self.path, _FINALIZED)

    def recover(self) -> None:
        """Removes the session if its checkpoint was committed and only a crash left it there."""
        if os.path.lexists(self._marker) and not os.path.lexists(self._whole):
            commit.remove(self.path)
        self._unmark()

    def finish(self, whole: Staging) -> None:
        """Gives the synced `whole` the name of the target, durably; the session is gone then."""
        files.write(self._marker, b"")
        files.sync_path(self._marker)
        files.sync_path(self.path)
        whole.commit()
        try:
            commit.remove(self.path)
        except OSError as error:  # the marker stays: the next call tries again
            logger.warning("%s could not be removed: %s", self.path, error)

    def abandon(self, whole: Staging) -> None:
        """Removes `whole`, which was not committed, but not before the marker is gone."""
        if os.path.lexists(self._whole):
            self._unmark()
            whole.discard()

    def _unmark(self) -> None:
        if os.path.lexists(self._marker):
            os.unlink(self._marker)
            files.sync_path(self.path)
