"""The data iterator of a run: its position goes into each step, and is set when that is restored.

data.require_iterator(iterator, context)            # when the run begins
data.require(layout, iterator)                      # before the state is read
data.restore(layout, iterator, context)             # after
"""

from typing import Any

from flax_ckpt._load import Layout, load_layout
from flax_ckpt.context import Context
from flax_ckpt.errors import CheckpointNotFoundError, FlaxCkptError, StateError
from flax_ckpt.format import names
from flax_ckpt.handlers import registry as handler_registry
from flax_ckpt.handlers.stateful import Stateful, file_name
from flax_ckpt.storage import files
from flax_ckpt.storage.record import Record


def require_iterator(iterator: Any, context: Context) -> None:
    """Checks that there is a handler for the position of an iterator, unless that is None.

    Raises:
        StateError: there is none; a list or a generator has no position that could be set.
    """
    registry = context.checkpointables.registry or handler_registry.global_registry()
    of_user = [h for h, _ in registry.get_all_entries() if not hasattr(h, "TYPESTR")]
    if not (iterator is None or of_user or isinstance(iterator, Stateful)):
        what = f"data_iterator is a {type(iterator).__name__}, whose position cannot be saved"
        how = "Pass an iterator that has them, as Grain's have: iter(loader), iter(dataset)"
        raise StateError(f"{what}: it has neither get_state and set_state nor save and load. {how}")


def require(layout: Layout, iterator: Any) -> None:
    """Checks that a checkpoint has the position of an iterator, unless that is None.

    Raises:
        CheckpointNotFoundError: says what there is.
    """
    if iterator is not None and names.DATA not in layout.items:
        what = f"{layout.path} has no position of a data iterator, {names.DATA!r}; it has:"
        what += f" {', '.join(layout.items)}. Without it the run would begin its data anew: if"
        how = "that is wanted, pass restart_data=True to restore_or_init, or no data_iterator to"
        how += " restore; one of another name is loaded with flax_ckpt.load_checkpointables"
        raise CheckpointNotFoundError(f"{what} {how}")


def restore(layout: Layout, iterator: Any, context: Context) -> None:
    """Puts the iterator, unless it is None, where it was when the step was saved.

    Raises:
        StateError: it refuses the position, or another number of processes saved it.
        DamagedCheckpointError: its file is damaged; the iterator was not touched.
    """
    if iterator is None:
        return
    try:
        found = load_layout(layout, {names.DATA: iterator}, context)[names.DATA]
    except (FlaxCkptError, OSError):
        raise
    except Exception as error:
        what = f"{layout.path}: a {type(iterator).__name__} did not take the position saved there"
        why = f"{type(error).__name__}: {error}. Saved is {_shown(layout.items[names.DATA])}"
        raise StateError(f"{what}: {why}") from error
    if found is not iterator:
        what = f"{layout.path}: loading {names.DATA!r} made a new {type(found).__name__}, but the"
        what += " iterator is to be changed in place"
        raise StateError(f"{what}: its handler must return what it was given")


def _shown(directory: str) -> str:
    """What is saved, for people: how the file begins, or which files there are."""
    record, name = Record(directory), file_name()
    if record.lists(name):
        text = record.read(name).decode(errors="replace")
        return f"{name}: {' '.join(text.split()):.300}"
    return ", ".join(sorted(files.walk(directory)))
