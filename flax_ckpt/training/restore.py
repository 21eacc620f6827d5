"""`restore`: a training state from a run or a step, in the type it is wanted in.

state = fc.restore_train_state("/runs/7/checkpoints", jax.eval_shape(init_fn))
out = fc.restore("/runs/7/checkpoints", abstract_state, step=1500)
out.state, out.step, out.config
"""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from typing import Any, Generic, Literal, SupportsIndex, TypeAlias, TypeVar

import jax
from etils import epath
from google.protobuf.message import Message

from flax_ckpt import errors
from flax_ckpt._load import Layout, load_layout, steadily
from flax_ckpt._metadata import CheckpointMetadata
from flax_ckpt.adapters import config as configs
from flax_ckpt.adapters import state as states
from flax_ckpt.context import Context, resolve
from flax_ckpt.format import names, protos
from flax_ckpt.handlers.pytree import log_fallbacks
from flax_ckpt.leaves.base import LoadRules
from flax_ckpt.storage import files, hosts, kinds
from flax_ckpt.storage.record import OnDamage, Record, notes, noting, warn
from flax_ckpt.training import best, contents, data, filling, progress, steps
from flax_ckpt.training.report import Damaged, Report
from flax_ckpt.training.selection import Missing, Rename, Selection, Selector, Unexpected

S = TypeVar("S")
_GONE = "gone"

Step: TypeAlias = SupportsIndex | Literal["latest", "best"] | CheckpointMetadata[Any] | None


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
        provenance: commit, versions, devices and command line of the run; empty if not saved.
        report: what was done.
    """

    state: S
    step: int | None
    metrics: dict[str, Any] | None
    config: Any
    config_text: str | None
    provenance: dict[str, Any]
    report: Report


def restore_train_state(
    path: files.PathLike,
    like: S,
    *,
    step: Step = None,
    only: Selector | None = None,
    exclude: Selector | None = None,
    rename: Rename | None = None,
    missing: Missing = "error",
    unexpected: Unexpected = "error",
    init: Callable[[], S] | None = None,
    on_damage: OnDamage = "raise",
    cast: bool = False,
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
    chosen = Selection(only, exclude, rename, missing, unexpected, init, on_damage)
    return _restore(path, like, step, _Rules(chosen, resolve(context), cast)).state


def restore(
    path: files.PathLike,
    like: S | None = None,
    *,
    step: Step = None,
    only: Selector | None = None,
    exclude: Selector | None = None,
    rename: Rename | None = None,
    missing: Missing = "error",
    unexpected: Unexpected = "error",
    init: Callable[[], S] | None = None,
    on_damage: OnDamage = "raise",
    cast: bool = False,
    config: type[Message] | None = None,
    data_iterator: Any = None,
    context: Context | None = None,
) -> Restored[S]:
    """Restores a training state.

    Args:
        path: the root of a run, or one step of it; of Orbax's too, if it has the state in one
            tree, whatever its name.
        like: a state of the wanted type, concrete or abstract (`jax.eval_shape`): a Flax
            `TrainState` or any other dataclass, dict or tuple with a part `params`; the params
            alone; or any tree that was saved as it is. Parts of the checkpoint that it has no
            place for are not read. It is not changed. None: everything, in dicts and lists.
        step: which step of a root; None or "latest": the newest, or if that is damaged the newest
            whole one, with a warning, the same in all processes if `like` is on devices of several;
            "best": by the metric that the run's callback kept the best
            of, as each step says.
        only: which leaves to read: a name such as "params" or "params/encoder", a glob such as
            "params/*/bias" (`*` within one part of a path, `**` for any number of parts), a
            predicate of the path, or a sequence of these. What a name or glob fits is taken with
            all that is beneath it. The others stay as they are in `like`, and must be concrete
            there.
        exclude: which of them not to read, likewise.
        rename: where saved leaves go: a dict of prefixes of paths, saved to wanted, of which the
            longest that fits counts; or pairs of a regular expression and a replacement, for
            `re.sub` in turn. `only`, `exclude` and all errors are about the paths after it.
        missing: wanted leaves that are not saved: "error", "keep": they stay as they are in
            `like`, or "init": they are taken from `init()`.
        unexpected: saved leaves that `like` lacks, in parts that it has: "error", or "ignore".
        init: makes a whole state. Called at most once, only if it is needed: for what is missing,
            and for what is not selected and abstract in `like`.
        on_damage: "skip": a leaf that is damaged stays as it is in `like`, or is taken from `init`
            where that is abstract; without `like` it is `PLACEHOLDER`. A damaged config or damaged
            metrics are None. The report and a WARNING name each. Damage to what describes a tree,
            its index or the step itself raises, or has the step passed over, as ever.
        cast: whether a dtype that differs is cast. Rank-0 numbers of Python, NumPy and JAX match
            anyway if the value fits; a float32 does not match a bfloat16.
        config: class of the config's message; None: the one that the file names.
        data_iterator: is put where it was when the step was saved, in place, after all else was
            loaded; None: the position is not read.
        context: options; None: the active ones.

    Raises:
        CheckpointNotFoundError: no such path, step or part, or no best step; says what is there.
        StateError: a selection or renaming that fits nothing; a leaf that would stay abstract; or
            the state is in one tree, and its fields are called otherwise; or the iterator does not
            take its position.
        InvalidLayoutError: one checkpointable of a checkpoint, or something unfinished.
        TreeMismatchError: lists every leaf that differs; no data was read.
        DamagedCheckpointError: an explicit or the best step is damaged, or every one is: says why
            each.

    >>> import tempfile, flax_ckpt as fc, numpy as np
    >>> root = tempfile.mkdtemp()
    >>> with fc.CheckpointCallback(root, every_n_steps=1) as ckpt:
    ...     ckpt.on_step_end(1, {"params": {"encoder": np.ones(2), "head": np.ones(3)}})
    True
    >>> new = {"params": {"encoder": np.zeros(2), "head": np.zeros(5)}}
    >>> fc.restore(root, new, only="params/encoder").state
    {'params': {'encoder': array([1., 1.]), 'head': array([0., 0., 0., 0., 0.])}}
    """
    chosen = Selection(only, exclude, rename, missing, unexpected, init, on_damage)
    rules = _Rules(chosen, resolve(context), like is None or cast, data_iterator, config)
    return _restore(path, like, step, rules)


def resume(path: str, like: S, step: Step, data_iterator: Any, context: Context) -> Restored[S]:
    """As :func:`restore`, called by all processes of a run, which go on from the same step."""
    rules = _Rules(Selection(), context, False, data_iterator, of_run=True)
    return _restore(path, like, step, rules)


@dataclasses.dataclass(frozen=True)
class _Rules:
    chosen: Selection
    context: Context
    cast: bool
    data_iterator: Any = None
    config: type[Message] | None = None
    of_run: bool = False  # all processes of a run call this


def _together(path: str, like: Any, rules: _Rules) -> hosts.Hosts:
    """The processes that call this together are those that will have parts of one array."""
    leaves = jax.tree.leaves(states.split(like)) if hosts.process_count() > 1 else []
    if not (rules.of_run or any(map(_spans_processes, leaves))):
        return hosts.ALONE
    options = rules.context
    return hosts.current(options.multiprocessing, options.asynchronous, f"restore of {path}")


def _spans_processes(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    is_abstract = isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh)
    return is_abstract or not (sharding is None or sharding.is_fully_addressable)


def _restore(path: files.PathLike, like: S | None, step: Step, rules: _Rules) -> Restored[S]:
    here = files.local_path(path)
    if isinstance(step, CheckpointMetadata):
        here, step = files.local_path(step.path), None
    if kinds.owner(here):
        raise errors.InvalidLayoutError(f"{here} {kinds.describe(here)}")
    if steps.is_checkpoint(here):
        _, number, _ = names.step_of(os.path.basename(here)) or ("", None, 0)
        if step not in (None, "latest", number):
            message = f"{here} is one checkpoint, not a root with step {step}"
            raise errors.CheckpointNotFoundError(message)
    elif isinstance(step, SupportsIndex):
        step = int(step)
        found = steps.require_steps(here)
        if reason := steps.incomplete(here).get(step):
            raise errors.DamagedCheckpointError(reason)
        if step not in found:
            there = ", ".join(map(str, found))
            raise errors.CheckpointNotFoundError(f"{here} has no step {step}; it has: {there}")
        here, number = steps.path_of(here, step), step
    elif step not in (None, "latest", "best"):
        raise ValueError(f"step must be a number, 'latest' or 'best', got {step!r}")
    else:
        return _restore_first(here, like, rules, is_best=step == "best")
    return _restore_step(here, like, number, rules)


def _restore_first(root: str, like: S | None, rules: _Rules, *, is_best: bool) -> Restored[S]:
    """The newest whole or the best step, of a run that may go on saving and deleting meanwhile.

    Processes that restore together take the same: each sees only its own part of the damage.
    """
    together, damaged = _together(root, like, rules), {} if is_best else steps.incomplete(root)
    for reason in damaged.values():
        progress.logger.warning("%s; trying the step before it", reason)
    for attempt in itertools.count():
        order = best.ranked(root) if is_best else steps.require_steps(root)[::-1]
        left = [step for step in order if step not in damaged]
        number = together.broadcast(f"step {attempt}", left[0] if left else None)
        if number is None:
            reasons = [f"step {step}: {reason}" for step, reason in damaged.items()]
            text = "\n".join([f"none of the steps of {root} is whole:", *reasons])
            raise errors.DamagedCheckpointError(text)
        found, failure = _try(root, number, like, rules, tuple(damaged.items()))
        problems = set(together.gather(f"tried {attempt}", str(failure or ""))) - {""}
        if found and not problems:
            return found
        if _GONE in problems:
            continue
        damaged[number] = min(problems)
        if is_best:
            others = f"the next best is step {left[1]}" if left[1:] else "it is the only one"
            failure = failure or errors.DamagedCheckpointError(damaged[number])
            failure.add_note(f"step {number} is the best of {root}; {others}")
            raise failure
        text = "step %d is damaged, trying the one before it: %s"
        progress.logger.warning(text, number, damaged[number])
    raise AssertionError("there are no more numbers")


def _try(
    root: str, number: int, like: S | None, rules: _Rules, damaged: Damaged
) -> tuple[Restored[S] | None, errors.FlaxCkptError | None]:
    """One step, or what is damaged there: `_GONE` if it was deleted, or moved aside."""
    try:
        return _restore_step(steps.path_of(root, number), like, number, rules, damaged), None
    except (errors.FormatError, errors.InvalidLayoutError, FileNotFoundError) as error:
        if number not in steps.committed(root):
            return None, errors.DamagedCheckpointError(_GONE)
        if not isinstance(error, errors.DamagedCheckpointError):  # of ours it was checked first
            other = isinstance(error, FileNotFoundError | errors.NoLeafHandlerError)
            if other or os.path.isfile(os.path.join(steps.path_of(root, number), names.INTEGRITY)):
                raise
        return None, error


def _restore_step(
    path: str, like: S | None, number: int | None, rules: _Rules, damaged: Damaged = ()
) -> Restored[S]:
    """As `_restore_one`; what is missing of what the checkpoint lists is damage."""
    try:
        return steadily(path, lambda: _restore_one(path, like, number, rules, damaged))
    except FileNotFoundError as error:
        if lost := _lost(Layout.of(path)):
            raise errors.DamagedCheckpointError(f"{path} lacks {lost}: it is incomplete") from error
        raise


def _lost(layout: Layout) -> str:
    """What a checkpoint should have and has not, as error messages print it."""
    if layout.is_flat:
        return ""
    listed = () if isinstance(layout.root.item_handlers, str) else layout.root.item_handlers
    lost = sorted(set(listed) - {*layout.items, layout.deleting})
    for name, path in layout.items.items():
        if os.path.isfile(os.path.join(path, names.MANIFEST)) and not kinds.holds_tree(path):
            lost.append(f"{name}/{names.TREE_METADATA}")
    return ", ".join(lost) or ("" if layout.items else "all checkpointables")


def _restore_one(
    path: str, like: S | None, number: int | None, rules: _Rules, damaged: Damaged = ()
) -> Restored[S]:
    started = time.perf_counter()
    layout, load_rules = Layout.of(path), LoadRules(strict=not rules.cast)
    data.require(layout, rules.data_iterator)
    state, done = filling.fill(layout, like, rules.chosen, load_rules, rules.context)
    log_fallbacks(epath.Path(path), load_rules)
    seconds = time.perf_counter() - started
    progress.logger.info("restored %s", progress.line(path, number, done.nbytes, seconds))
    progress.record("restore", duration_secs=seconds, bytes=done.nbytes)
    lost = notes(rules.chosen.on_damage)
    text, config, metrics, provenance = None, None, None, dict[str, Any]()
    with noting(lost, contents.CONFIG):
        text, config, provenance = _load_config(layout, rules.config)
    with noting(lost, names.METRICS):
        if names.METRICS in layout.items:
            metrics = load_layout(layout, {names.METRICS: None}, rules.context)[names.METRICS]
    warn(path, lost)
    damaged += (*done.damaged, *(lost or {}).items())
    data.restore(layout, rules.data_iterator, rules.context)
    report = dataclasses.replace(done, seconds=seconds, damaged=damaged)
    return Restored(state, number, metrics, config, text, provenance, report)


def _load_config(layout: Layout, kind: type[Message] | None) -> tuple[str | None, Any, Any]:
    """The config as text and as what it stands for, and where it comes from."""
    record = Record(layout.items[contents.CONFIG]) if contents.CONFIG in layout.items else None
    if record is None or not record.lists(names.PROTO_FILE):
        return None, None, {}
    text = record.read(names.PROTO_FILE).decode(errors="replace")
    try:
        message = protos.text_to_message(text, kind)
        return text, configs.from_message(message), configs.provenance_of(message)
    except (errors.FormatError, errors.ConfigError) as error:
        if kind is not None:
            raise
        progress.logger.debug("%s: the config stays text: %s", layout.path, error)
        return text, None, {}
