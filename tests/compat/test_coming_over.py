"""A run that Orbax began goes on here: states in one tree, as Orbax's users save them.

A process with Orbax trains and saves in each of the ways of its guides; the tests restore here, go
on, and a second process looks at what Orbax then makes of the same roots.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import optax
import pytest

import flax_ckpt as fc
from tests.compat import trees
from tests.training.states import assert_same, create, train

MODULE = "tests.compat.test_coming_over"
STEPS = (2, 4)
END = 6
FIELDS = ("step", "params", "opt_state", "batch_stats", "key")


def as_dict(state: Any) -> dict[str, Any]:
    return {name: getattr(state, name) for name in FIELDS}


# --- Orbax trains ---------------------------------------------------------------------------


def write(folder: Path) -> trees.Results:
    work = {name: functools.partial(save, folder / name) for name, save in WRITERS.items()}
    return {
        name: trees.attempt(lambda s=save: [s(step, trained()[step]) for step in STEPS] and [])
        for name, save in work.items()
    }


@functools.cache
def trained() -> dict[int, Any]:
    """The state after each of the steps."""
    found, done = {0: create()}, 0
    for step in (*STEPS, END):
        found[step], done = train(found[done], done, step), step
    return found


def _v0(args: Callable[[Any, Any], Any], **options: Any) -> Callable[[Path, int, Any], None]:
    def save(root: Path, step: int, state: Any) -> None:
        import orbax.checkpoint as v0

        with v0.CheckpointManager(root, options=v0.CheckpointManagerOptions(**options)) as manager:
            manager.save(step, args=args(v0.args, state), metrics={"loss": 0.5 * step})

    return save


def _v0_flat(root: Path, step: int, state: Any) -> None:
    import orbax.checkpoint as v0

    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(root / str(step), state)


def _v0_pytree_flat(root: Path, step: int, state: Any) -> None:
    """As `flax.training.checkpoints` calls it."""
    import orbax.checkpoint as v0

    with v0.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(root / f"checkpoint_{step}", state)


def _v1_save(root: Path, step: int, state: Any) -> None:
    import orbax.checkpoint.experimental.v1 as ocp

    ocp.save(root / str(step), state)


def _v1_files(root: Path, step: int, state: Any) -> None:
    import orbax.checkpoint.experimental.v1 as ocp

    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save(root / str(step), state)


def _v1_checkpointer(root: Path, step: int, state: Any) -> None:
    import orbax.checkpoint.experimental.v1 as ocp

    with ocp.training.Checkpointer(root) as checkpointer:
        checkpointer.save(step, state, metrics={"loss": 0.5 * step}, force=True)


def _v1_model(root: Path, step: int, state: Any) -> None:
    """As the Flax guide nested it."""
    _v1_save(root, step, {"model": state, "config": {"width": 5}})


def _v1_apart(root: Path, step: int, state: Any) -> None:
    import orbax.checkpoint.experimental.v1 as ocp

    parts = {"model": state.params, "optimizer": state.opt_state}
    ocp.save_checkpointables(root / str(step), parts)


METRICS = {"best_fn": lambda metrics: metrics["loss"], "best_mode": "min"}
WRITERS: dict[str, Callable[[Path, int, Any], None]] = {
    "v0_standard": _v0(lambda args, state: args.StandardSave(state), **METRICS),
    "v0_pytree": _v0(lambda args, state: args.PyTreeSave(state), **METRICS),
    "v0_dict": _v0(lambda args, state: args.StandardSave(as_dict(state)), **METRICS),
    "v0_named": _v0(
        lambda args, state: args.Composite(
            train_state=args.StandardSave(state), notes=args.JsonSave({"a": 1})
        ),
        **METRICS,
    ),
    "v0_prefix": _v0(
        lambda args, state: args.StandardSave(state),
        step_prefix="ckpt",
        step_format_fixed_length=6,
        **METRICS,
    ),
    "v0_padded": _v0(
        lambda args, state: args.PyTreeSave(state), step_format_fixed_length=4, **METRICS
    ),
    "v0_flat": _v0_flat,
    "v0_pytree_flat": _v0_pytree_flat,
    "v1_save": _v1_save,
    "v1_files": _v1_files,
    "v1_checkpointer": _v1_checkpointer,
    "v1_model": _v1_model,
    "v1_apart": _v1_apart,
}
WHOLE = [name for name in WRITERS if name not in ("v1_model", "v1_apart")]
MANAGED = [name for name in WHOLE if name.startswith("v0_") and not name.endswith("flat")]


# --- Orbax looks at what has become of it -----------------------------------------------------


def look(folder: Path) -> trees.Results:
    checks = {name: functools.partial(_manager, folder / name, name) for name in MANAGED}
    checks["v1_checkpointer"] = lambda: _checkpointer(folder / "v1_checkpointer")
    return {f"look {name}": trees.attempt(check) for name, check in checks.items()}


def _manager(root: Path, name: str) -> list[str]:
    import orbax.checkpoint as v0

    options = {}
    if name == "v0_prefix":
        options = {"step_prefix": "ckpt", "step_format_fixed_length": 6}
    if name == "v0_padded":
        options = {"step_format_fixed_length": 4}
    item = "train_state" if name == "v0_named" else "default"
    wrong: list[str] = []
    options = v0.CheckpointManagerOptions(**options)
    with v0.CheckpointManager(root, options=options) as manager:
        if list(manager.all_steps()) != [*STEPS, END] or manager.latest_step() != END:
            wrong.append(f"lists {manager.all_steps()}")
        for step in STEPS:
            expected = as_dict(trained()[step])
            args = v0.args.Composite(**{item: v0.args.StandardRestore(expected)})
            found = _composite(root, options, step, args)[item]
            wrong += trees.differences(found, expected)
    expected = trees.plain(trained()[END].params)
    args = v0.args.Composite(params=v0.args.PyTreeRestore())
    found = _composite(root, options, END, args)
    return wrong + trees.differences(found["params"], expected)


def _composite(root: Path, options: Any, step: int, args: Any) -> Any:
    """A manager decides by its first step whether items have names."""
    import orbax.checkpoint as v0

    names = tuple(args.keys())
    with v0.CheckpointManager(root, options=options, item_names=names) as manager:
        return manager.restore(step, args=args)


def _checkpointer(root: Path) -> list[str]:
    import orbax.checkpoint.experimental.v1 as ocp

    wrong: list[str] = []
    with ocp.training.Checkpointer(root) as checkpointer:
        listed = sorted(c.step for c in checkpointer.checkpoints)
        wrong += [] if listed == [*STEPS, END] else [f"lists {listed}"]
        for step in STEPS:
            expected = as_dict(trained()[step])
            wrong += trees.differences(checkpointer.load(step, expected), expected)
        found = checkpointer.load_checkpointables(END, {"params": None})
    return wrong + trees.differences(found, {"params": trees.plain(trained()[END].params)})


ROLES: dict[str, trees.Role] = {"write": write, "look": look}


# --- the tests ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coming")
    assert trees.run(MODULE, folder, ["write"]) == {name: [] for name in WRITERS}
    return folder


@functools.cache
def abstract() -> Any:
    return jax.eval_shape(create)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_state_comes_back_in_its_type(written: Path, name: str) -> None:
    for step in STEPS:
        out = fc.restore(written / name, abstract(), step=step)
        assert type(out.state) is type(trained()[step])
        assert_same(out.state, trained()[step])
        assert out.step == step
        saves_metrics = name in MANAGED or name == "v1_checkpointer"
        assert out.metrics == ({"loss": 0.5 * step} if saves_metrics else None)
    assert {"step", "params/Dense_0/kernel", "opt_state/1/0/mu/Dense_0/kernel"} <= set(
        out.report.loaded
    )


@pytest.mark.parametrize("name", WHOLE)
def test_the_latest_step_and_one_by_its_path(written: Path, name: str) -> None:
    out = fc.restore(written / name, create())
    assert out.step == STEPS[-1]
    assert_same(out.state.params, trained()[STEPS[-1]].params)
    (path,) = (p for p in (written / name).iterdir() if p.name.endswith(str(STEPS[0])))
    out = fc.restore(path, abstract())
    assert out.step == STEPS[0]
    assert_same(out.state, trained()[STEPS[0]])


@pytest.mark.parametrize("name", ["v0_standard", "v0_named", "v0_prefix", "v0_flat"])
def test_r1_steps_of_a_run_that_miss_their_metadata(
    written: Path, tmp_path: Path, name: str
) -> None:
    root = Path(shutil.copytree(written / name, tmp_path / "root"))
    for file in [*root.rglob("_CHECKPOINT_METADATA"), *root.rglob("commit_success.txt")]:
        file.unlink()
    out = fc.restore(root, abstract())
    assert out.step == STEPS[-1]
    assert_same(out.state, trained()[STEPS[-1]])
    (path,) = (p for p in root.iterdir() if p.name.endswith(str(STEPS[0])))
    assert_same(fc.restore_train_state(path, abstract()), trained()[STEPS[0]])


@flax.struct.dataclass
class EvalState:
    params: Any
    batch_stats: Any


LIKES: dict[str, Callable[[Any], Any]] = {
    "params": lambda state: state.params,
    "variables": lambda state: {"params": state.params, "batch_stats": state.batch_stats},
    "only params": lambda state: {"params": state.params},
    "eval state": lambda state: EvalState(state.params, state.batch_stats),
    "no optimizer": lambda state: state.replace(opt_state=None),
}


@pytest.mark.parametrize("like", LIKES)
@pytest.mark.parametrize("name", ["v0_standard", "v1_save", "v0_flat"])
def test_a_part_of_it_is_read_alone(written: Path, name: str, like: str) -> None:
    out = fc.restore(written / name, LIKES[like](abstract()))
    assert_same(out.state, LIKES[like](trained()[STEPS[-1]]))
    wanted = {"params"} if "params" in like else {"params", "batch_stats"}
    wanted |= {"batch_stats"} if like == "variables" else set()
    wanted |= {"step", "key"} if like == "no optimizer" else set()
    assert {leaf.partition("/")[0] for leaf in out.report.loaded} == wanted


def test_the_bytes_of_the_rest_are_not_read(written: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(written / "v1_files" / "4", tmp_path / "4"))
    for chunks in path.glob("state/*/c"):
        if not chunks.parent.name.startswith("params."):
            shutil.rmtree(chunks) if chunks.is_dir() else chunks.unlink()
    assert_same(fc.restore_train_state(path, abstract().params), trained()[4].params)
    with pytest.raises(fc.errors.DamagedCheckpointError):
        fc.restore_train_state(path, abstract())


@pytest.mark.parametrize("name", WHOLE)
def test_without_a_target_it_comes_in_dicts(written: Path, name: str) -> None:
    found = fc.restore(written / name).state
    found = found if "flat" in name else next(iter(found.values()))
    assert trees.differences(found, trees.plain(as_dict(trained()[STEPS[-1]]))) == []


def test_leaves_that_differ_are_named_as_in_the_state(written: Path) -> None:
    like = jax.eval_shape(lambda: create(width=6))
    with pytest.raises(fc.errors.TreeMismatchError) as caught:
        fc.restore_train_state(written / "v0_standard", like)
    lines = str(caught.value).splitlines()
    assert "  params/Dense_0/kernel: saved float32[3,5], wanted float32[3,6]" in lines
    assert "  opt_state/1/0/mu/Dense_1/kernel: saved float32[5,2], wanted float32[6,2]" in lines
    with pytest.raises(fc.errors.TreeMismatchError, match="params/Dense_0/kernel: saved"):
        fc.restore_train_state(written / "v0_standard", like.params)
    other = abstract().replace(opt_state=jax.eval_shape(optax.sgd(0.1).init, abstract().params))
    with pytest.raises(fc.errors.TreeMismatchError, match="opt_state/1/0/count: saved int32"):
        fc.restore_train_state(written / "v0_standard", other)


def test_states_under_other_names_are_explained(written: Path) -> None:
    with pytest.raises(fc.errors.StateError) as caught:
        fc.restore_train_state(written / "v1_model", abstract())
    assert str(caught.value) == (
        f"{written}/v1_model/4/state has no field 'params', which the wanted state has; it has:"
        " config, model. Say with rename= which leaves are the params, or load a tree of this form"
        " with flax_ckpt.load, and put the state together"
    )
    with pytest.raises(fc.errors.CheckpointNotFoundError) as missing:
        fc.restore_train_state(written / "v1_apart", abstract())
    assert str(missing.value) == (
        f"{written}/v1_apart/4 has neither a tree 'params' nor one that would hold a whole state;"
        " it has: model, optimizer. Load them by name with flax_ckpt.load_checkpointables, and put"
        " the state together"
    )


def test_what_these_errors_say_works(written: Path) -> None:
    like, wanted = abstract(), trained()[4]
    found = fc.load(written / "v1_model" / "4", {"model": like, "config": {"width": 0}})
    assert_same(found["model"], wanted.replace(step=found["model"].step))
    wishes = {"model": like.params, "optimizer": like.opt_state}
    parts = fc.load_checkpointables(written / "v1_apart" / "4", wishes)
    assert_same(parts["model"], wanted.params)
    assert_same(parts["optimizer"], wanted.opt_state)


@pytest.mark.parametrize("name", WHOLE)
def test_a_run_goes_on_and_ends_with_the_same_bits(written: Path, name: str) -> None:
    root = written / name
    copy = root.with_name(f"on_{name}")
    shutil.copytree(root, copy)
    with fc.CheckpointCallback(copy, every_n_steps=END, keep_last=None) as callback:
        state, step = callback.restore_or_init(abstract())
        assert step == STEPS[-1]
        state = train(state, step, END)
        assert callback.on_step_end(END, state, metrics={"loss": 0.25})
    assert_same(state, trained()[END])
    assert callback.latest_step == END
    assert_same(fc.restore_train_state(copy, abstract()), trained()[END])
    assert_same(fc.restore_train_state(copy, abstract(), step=STEPS[0]), trained()[STEPS[0]])


def test_steps_of_orbax_are_kept_and_deleted_like_ours(written: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(written / "v0_prefix", tmp_path / "root"))
    with fc.CheckpointCallback(root, every_n_steps=1, keep_last=2) as callback:
        callback.restore_or_init(abstract())
        callback.on_step_end(END, trained()[END])
    assert {path.name for path in root.iterdir()} == {"ckpt_000004", "ckpt_000006"}


def test_a_step_called_by_the_index_of_its_last_update_is_told(
    written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`for i in range(n): …; manager.save(i, …)`: what is called 3 has 4 updates behind it."""
    shutil.copytree(written / "v0_standard" / "4", tmp_path / "3")
    with fc.CheckpointCallback(tmp_path, every_n_steps=END, at_end=False) as callback:
        state, step = callback.restore_or_init(abstract())
    assert (step, int(state.step)) == (3, 4)
    assert "step 3 was restored, but the state counts 4 updates" in caplog.text
    assert "go on from `int(state.step)`" in caplog.text


def test_orbax_still_lists_and_reads_all_steps(written: Path, tmp_path: Path):
    for name in (*MANAGED, "v1_checkpointer"):
        shutil.copytree(written / name, tmp_path / name)
        with fc.CheckpointCallback(tmp_path / name, every_n_steps=1, keep_last=None) as callback:
            callback.restore_or_init(abstract())
            callback.on_step_end(END, trained()[END], metrics={"loss": 0.25})
    found = trees.run(MODULE, tmp_path, ["look"])
    assert found == {name: [] for name in found}
    assert len(found) == len(MANAGED) + 1


if __name__ == "__main__":
    trees.main(ROLES)
