"""`restore`: a training state from a run or a step, in the type it is wanted in.

state = fc.restore_train_state("/runs/7/checkpoints", jax.eval_shape(init_fn))
out = fc.restore("/runs/7/checkpoints", abstract_state, step=1500)
out.state, out.step, out.config
"""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeVar

from etils import epath
from google.protobuf.message import Message

from flax_ckpt import errors
from flax_ckpt._load import Layout, load_layout, open_tree, steadily
from flax_ckpt._metadata import CheckpointMetadata
from flax_ckpt.adapters import config as configs
from flax_ckpt.adapters import state as states
from flax_ckpt.context import Context, resolve
from flax_ckpt.format import names, protos, tree
from flax_ckpt.handlers.pytree import log_fallbacks
from flax_ckpt.handlers.saved_tree import mismatch
from flax_ckpt.leaves.base import LoadRules
from flax_ckpt.storage import kinds
from flax_ckpt.storage.files import local_path
from flax_ckpt.storage.record import Record
from flax_ckpt.training import boxes, progress, steps

S = TypeVar("S")
PathLike = str | os.PathLike[str]
logger = logging.getLogger("flax_ckpt")

CONFIG = "config"
_BY_NAME = "Load them by name with flax_ckpt.load_checkpointables, and put the state together"
Damaged = tuple[tuple[int, str], ...]  # steps that were passed over, each with the reason


@dataclasses.dataclass(frozen=True)
class Report:
    """What a restore did.

    Attributes:
        loaded: names of the leaves that were read, such as `params/dense/kernel`.
        nbytes: size of what was loaded, in bytes.
        seconds: how long it took.
        damaged: steps that were passed over, each with the reason.
    """

    loaded: tuple[str, ...]
    nbytes: int
    seconds: float
    damaged: Damaged = ()


@dataclasses.dataclass(frozen=True)
class Restored(Generic[S]):
    """What :func:`restore` returns.

    Attributes:
        state: of the type of `like`; without one, a dict of what was saved.
        step: the number of completed updates; None for a checkpoint that is no step of a run.
        metrics: what was given to `on_step_end`, or None.
        config: the run's config: an `ml_collections.ConfigDict`, or the user's own message if its
            class was given or is registered in this process; else None.
        config_text: the config as it is in the file.
        report: what was done.
    """

    state: S
    step: int | None
    metrics: dict[str, Any] | None
    config: Any
    config_text: str | None
    report: Report


def restore_train_state(
    path: PathLike,
    like: S,
    *,
    step: int | Literal["latest"] | CheckpointMetadata[Any] | None = None,
    cast: bool = False,
    unexpected: Literal["error", "ignore"] = "error",
    context: Context | None = None,
) -> S:
    """The state of :func:`restore`, which has the arguments and errors.

    >>> import tempfile, flax_ckpt as fc, jax.numpy as jnp
    >>> root = tempfile.mkdtemp()
    >>> with fc.CheckpointCallback(root, every_n_steps=1) as ckpt:
    ...     ckpt.on_step_end(1, {"params": {"w": jnp.ones(2)}, "step": 1})
    True
    >>> fc.restore_train_state(root, {"params": {"w": jnp.zeros(2)}, "step": 0})
    {'params': {'w': Array([1., 1.], dtype=float32)}, 'step': 1}
    """
    return restore(path, like, step=step, cast=cast, unexpected=unexpected, context=context).state


def restore(
    path: PathLike,
    like: S | None = None,
    *,
    step: int | Literal["latest"] | CheckpointMetadata[Any] | None = None,
    cast: bool = False,
    unexpected: Literal["error", "ignore"] = "error",
    config: type[Message] | None = None,
    context: Context | None = None,
) -> Restored[S]:
    """Restores a training state.

    Args:
        path: the root of a run, or one step of it; of Orbax's too, if it has the state in one
            tree, whatever its name.
        like: a state of the wanted type, concrete or abstract (`jax.eval_shape`): a Flax
            `TrainState` or any other dataclass, dict or tuple with a part `params`; the params
            alone; an NNX module, `nnx.State`, optimizer, or `(module, optimizer)`, abstract by
            `nnx.eval_shape`; or any tree that was saved as it is. Parts of the checkpoint that it
            has no place for are not read, and of NNX's kinds of variables those that it has. It is
            not changed: a module comes back as a new one, and `nnx.update(model, nnx.state(new))`
            changes yours. None: everything, in dicts and lists.
        step: which step of a root; None or "latest": the newest, or if that is damaged the newest
            whole one, with a warning.
        cast: whether a dtype that differs is cast. Rank-0 numbers match anyway if they fit.
        unexpected: "ignore" to leave alone saved leaves that `like` lacks in parts that it has.
        config: class of the config's message; None: the one that the file names.
        context: options; None: the active ones.

    Raises:
        CheckpointNotFoundError: no such path, step or part; says what is there.
        StateError: the state is in one tree, and its fields are called otherwise; or an abstract
            module hides arrays.
        InvalidLayoutError: one checkpointable of a checkpoint, or something unfinished.
        TreeMismatchError: lists every leaf that differs; no data was read.
        DamagedCheckpointError: an explicit step is damaged, or every one is.
    """
    here = local_path(path)
    rules = _Rules(like is None or cast, unexpected == "ignore", config, resolve(context))
    if isinstance(step, CheckpointMetadata):
        here, step = local_path(step.path), None
    if kinds.owner(here):
        raise errors.InvalidLayoutError(f"{here} {kinds.describe(here)}")
    if steps.is_checkpoint(here):
        named = names.step_of(os.path.basename(here))
        number = named[1] if named else None
        if isinstance(step, int) and step != number:
            message = f"{here} is one checkpoint, not a root with step {step}"
            raise errors.CheckpointNotFoundError(message)
    elif isinstance(step, int):
        found = steps.require_steps(here)
        if step not in found:
            there = ", ".join(map(str, found))
            raise errors.CheckpointNotFoundError(f"{here} has no step {step}; it has: {there}")
        here, number = steps.path_of(here, step), step
    elif step not in (None, "latest"):
        raise ValueError(f"step must be a number or 'latest', got {step!r}")
    else:
        return _restore_newest(here, like, rules)
    return steadily(here, lambda: _restore_one(here, like, number, rules))


@dataclasses.dataclass(frozen=True)
class _Rules:
    cast: bool
    ignore_unexpected: bool
    config: type[Message] | None
    context: Context


def _restore_newest(root: str, like: S | None, rules: _Rules) -> Restored[S]:
    """The newest whole step, of a run that may go on saving and deleting meanwhile."""
    damaged: Damaged = ()
    while True:
        found = [step for step in steps.require_steps(root) if step not in dict(damaged)]
        number = found[-1]
        try:
            return _restore_one(steps.path_of(root, number), like, number, rules, damaged)
        except (errors.DamagedCheckpointError, FileNotFoundError) as error:
            if number not in steps.committed(root):
                continue  # deleted, or moved aside
            if not isinstance(error, errors.DamagedCheckpointError):
                raise
            if len(found) == 1:
                error.add_note(f"none of the steps {steps.committed(root)} of {root} is whole")
                raise
            logger.warning("step %d is damaged, trying the one before it: %s", number, error)
            damaged += ((number, str(error)),)


def _restore_one(
    path: str, like: S | None, number: int | None, rules: _Rules, damaged: Damaged = ()
) -> Restored[S]:
    started = time.perf_counter()
    layout, load_rules = Layout.of(path), LoadRules(strict=not rules.cast)
    state, read = _load_state(layout, like, rules, load_rules)
    log_fallbacks(epath.Path(path), load_rules)
    loaded, nbytes = progress.leaf_names(read), progress.nbytes(read)
    report = Report(loaded, nbytes, time.perf_counter() - started, damaged)
    logger.info("restored %s", progress.line(path, number, nbytes, report.seconds))
    config_text, config = _load_config(layout, rules.config)
    metrics = None
    if names.METRICS in layout.items:
        metrics = load_layout(layout, {names.METRICS: None}, rules.context)[names.METRICS]
    return Restored(state, number, metrics, config, config_text, report)


def _load_state(layout: Layout, like: Any, rules: _Rules, load_rules: LoadRules) -> tuple[Any, Any]:
    """The state, and what was read for it, by the names that a report gives it.

    The parts of a state are trees of their own, as we save them, or fields of one tree, as Orbax's
    users do. A wanted tree without a field `params` is itself the params, if there are such.
    """
    if like is None:
        found = _load_parts(layout, dict.fromkeys(layout.trees), rules, load_rules)
        return found.get("", found), found
    if not {states.PARAMS, states.OPT_STATE} & layout.items.keys():
        return _load_whole(layout, like, rules, load_rules)
    wanted = {name: tree for name, tree in states.split(like).items() if tree is not None}
    if states.WHOLE in wanted:
        found = _load_parts(layout, {states.PARAMS: like}, rules, load_rules)
        return found[states.PARAMS], found
    found = _load_parts(layout, wanted, rules, load_rules, by_type=states.is_nnx(like))
    return states.merge(like, found), found


def _load_parts(
    layout: Layout,
    wanted: Mapping[str, Any],
    rules: _Rules,
    load_rules: LoadRules,
    by_type: bool = False,
) -> dict[str, Any]:
    """Trees by name; with `by_type`, kinds of variables that are not wanted are left alone."""
    if missing := [name for name in wanted if name not in layout.items]:
        raise errors.CheckpointNotFoundError(
            f"{layout.path} has no {missing[0]!r}, which the wanted state has; it has:"
            f" {', '.join(layout.items)}. {_BY_NAME}"
        )
    differences: list[errors.Difference] = []
    reads: dict[str, Callable[[], Any]] = {}
    with contextlib.ExitStack() as opened:
        for name, part in wanted.items():
            saved = opened.enter_context(open_tree(layout, name, rules.context))
            if by_type and name == states.TRAIN_STATE:
                saved.narrow(part)
            boxes.match(saved, part)
            try:
                reads[name] = saved.prepare(part, load_rules, partial=rules.ignore_unexpected)
            except errors.TreeMismatchError as error:
                differences += [
                    dataclasses.replace(d, path=f"{name}/{d.path}") for d in error.differences
                ]
        if differences:
            raise mismatch(layout.path, differences)
        return {name: read() for name, read in reads.items()}


def _load_whole(layout: Layout, like: Any, rules: _Rules, load_rules: LoadRules) -> tuple[Any, Any]:
    """As :func:`_load_state`, from one tree; of a state's fields only the wanted ones are read."""
    try:
        name = layout.tree_name(names.AUTO)
    except errors.InvalidLayoutError as error:
        raise errors.CheckpointNotFoundError(
            f"{layout.path} has neither a tree 'params' nor one that would hold a whole state; it"
            f" has: {', '.join(layout.items)}. {_BY_NAME}"
        ) from error
    fields = {name: part for name, part in states.fields(like).items() if part is not None}
    is_nnx = states.is_nnx(like)
    with open_tree(layout, name, rules.context) as saved:
        there = {tree.name_of(path[:1]) for path in saved.leaves}
        if not is_nnx and states.PARAMS in fields.keys() - there:
            raise errors.StateError(
                f"{saved.directory} has no field 'params', which the wanted state has; it has:"
                f" {', '.join(sorted(there))}. Load a tree of this form with flax_ckpt.load, and"
                " put the state together"
            )
        by_type = is_nnx and states.PARAMS in there
        is_params = not is_nnx and states.PARAMS in there - fields.keys()
        wanted = fields if by_type else states.whole(like)
        if is_params:
            wanted = {states.PARAMS: wanted}
        if states.PARAMS in there:
            saved.narrow(wanted if is_params else fields)
        boxes.match(saved, wanted)
        found = saved.prepare(wanted, load_rules, partial=rules.ignore_unexpected)()
    if by_type:
        return states.merge(like, {states.TRAIN_STATE: found}), found
    return states.merge(like, {states.WHOLE: found[states.PARAMS] if is_params else found}), found


def _load_config(layout: Layout, message_type: type[Message] | None) -> tuple[str | None, Any]:
    record = Record(layout.items[CONFIG]) if CONFIG in layout.items else None
    if record is None or not record.lists(names.PROTO_FILE):
        return None, None
    text = record.read(names.PROTO_FILE).decode()
    try:
        return text, configs.from_message(protos.text_to_message(text, message_type))
    except (errors.FormatError, errors.ConfigError) as error:
        if message_type is not None:
            raise
        logger.debug("%s: the config stays text: %s", layout.path, error)
        return text, None
