"""Every optimizer of Optax: saved after two updates, restored, and trained on bit for bit.

The constructors are found by looking: a new one that needs arguments fails a test until it stands
in `ARGUMENTS`. A name there may go on after a colon, for another use of the same constructor.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax.training import train_state
from optax import GradientTransformation

import flax_ckpt as fc
from flax_ckpt.errors import TreeMismatchError

Build = Callable[..., GradientTransformation]

# Some of them are deprecated, and are optimizers still.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:optax")

PARAMS = {
    "dense": {"kernel": jnp.linspace(0.1, 1.2, 12).reshape(4, 3)},
    "bias": jnp.array([1.0, 2.0, 3.0]),
}
MIXED = {**PARAMS, "bias": PARAMS["bias"].astype(jnp.bfloat16)}
COMPLEX = jax.tree.map(lambda x: x + 0.5j * x[::-1], PARAMS)
KERNEL_ONLY = {"dense": {"kernel": True}, "bias": False}
LABELS = {"dense": {"kernel": "fast"}, "bias": "slow"}
SLOW_AND_FAST = {"fast": optax.adam(0.1), "slow": optax.sgd(0.1, momentum=0.9)}
COSINE = optax.cosine_decay_schedule(0.1, decay_steps=6)


def odd(step: jax.Array) -> jax.Array:
    return step % 2 == 1


def norm(updates: Any) -> jax.Array:
    return optax.tree.norm(updates)


def matrices(updates: Any) -> Any:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), updates)


def nan_at_odd_steps(inner: GradientTransformation) -> GradientTransformation:
    nan = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * jnp.nan, updates))
    return optax.chain(optax.conditionally_transform(nan, odd), inner)


ARGUMENTS: dict[str, Callable[[Any], GradientTransformation]] = {
    "MultiSteps": lambda f: f(optax.adam(0.1), every_k_schedule=3).gradient_transformation(),
    "MultiSteps:skips": lambda f: f(
        nan_at_odd_steps(optax.adam(0.1)), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "adam:schedule": lambda f: f(COSINE),
    "adam:bfloat16 momentum": lambda f: f(0.1, mu_dtype=jnp.bfloat16),
    "adam:array learning rate": lambda f: f(jnp.float32(0.1)),
    "adafactor:factored": lambda f: f(0.1, min_dim_size_to_factor=2, momentum=0.9),
    "adamw:mixed precision": lambda f: f(0.1),
    "adaptive_grad_clip": lambda f: f(0.01),
    "add_noise": lambda f: f(eta=0.1, gamma=0.5, key=3),
    "apply_if_finite": lambda f: f(nan_at_odd_steps(optax.adam(0.1)), 2),
    "chain": lambda f: f(optax.clip_by_global_norm(1.0), optax.adamw(COSINE)),
    "chain:nested and empty": lambda f: f(f(optax.identity()), f(f(optax.trace(0.9)))),
    "clip": lambda f: f(0.5),
    "clip_by_block_rms": lambda f: f(0.5),
    "clip_by_global_norm": lambda f: f(0.5),
    "conditionally_mask": lambda f: f(optax.adam(0.1), odd),
    "conditionally_transform": lambda f: f(optax.adam(0.1), odd),
    "differentially_private_aggregate": lambda f: f(1.0, 0.1, key=3),
    "dpsgd": lambda f: f(0.1, l2_norm_clip=1.0, noise_multiplier=0.1, seed=3, momentum=0.9),
    "dog:mixed precision": lambda f: f(1.0),
    "ema": lambda f: f(0.9),
    "flatten": lambda f: f(optax.adam(0.1)),
    "freeze": lambda f: f(KERNEL_ONLY),
    "galore:low rank": lambda f: f(0.1, rank=2, update_proj_gap=3),
    "hutchinson_estimator_diag_hessian:typed key": lambda f: f(jax.random.key(3, impl="rbg")),
    "inject_hyperparams": lambda f: f(optax.adamw)(COSINE, b1=jnp.float32(0.8)),
    "inject_hyperparams:weakly typed": lambda f: f(optax.apply_every)(
        lambda n: jnp.where(n > 2, 2, 1)
    ),
    "inject_hyperparams:Python number": lambda f: f(optax.apply_every)(lambda count: 2),
    "inject_stateful_hyperparams": lambda f: f(optax.sgd)(COSINE, momentum=0.9),
    "lookahead": lambda f: f(optax.adam(0.1), sync_period=3, slow_step_size=0.5),
    "masked": lambda f: f(optax.adam(0.1), KERNEL_ONLY),
    "masked:all": lambda f: f(
        optax.adam(0.1), lambda params: jax.tree.map(lambda _: False, params)
    ),
    "measure_with_ema": lambda f: optax.monitor({"norm": f(norm, 0.9)}),
    "mechanize": lambda f: f(optax.adam(0.1)),
    "monitor": lambda f: f({"norm": norm, "ema": optax.measure_with_ema(norm, 0.9)}),
    "momo:mixed precision": lambda f: f(1.0),
    "multi_transform": lambda f: f(SLOW_AND_FAST, LABELS),
    "named_chain": lambda f: f(("z", optax.scale_by_adam()), ("a", optax.scale(-0.1))),
    "noisy_sgd": lambda f: f(0.1, key=jax.random.key(3)),
    "partition": lambda f: f(SLOW_AND_FAST, LABELS),
    "partition:by number": lambda f: f(
        {1: optax.adam(0.1), 10: optax.set_to_zero()}, {"dense": 1, "bias": 10}
    ),
    "prodigy:mixed precision": lambda f: f(0.1),
    "sam": lambda f: f(optax.adam(0.1), optax.sgd(0.05), sync_period=2),
    "sam:opaque": lambda f: f(optax.adam(0.1), optax.sgd(0.05), opaque_mode=True),
    "scale": lambda f: f(-0.1),
    "scale_by_backtracking_linesearch": lambda f: optax.chain(
        optax.sgd(1.0), f(5, store_grad=True)
    ),
    "scale_by_muon": lambda f: optax.masked(f(weight_dimension_numbers=matrices), KERNEL_ONLY),
    "scale_by_schedule": lambda f: f(COSINE),
    "scale_by_zoom_linesearch": lambda f: optax.chain(optax.sgd(1.0), f(5)),
    "schedule_free": lambda f: f(optax.sgd(0.1), learning_rate=0.1),
    "selective_transform": lambda f: f(optax.adam(0.1), freeze_mask=KERNEL_ONLY),
    "sgd:momentum": lambda f: f(0.1, momentum=0.9, nesterov=True),
    "snapshot": lambda f: f("norm", norm),
    "split_real_and_imaginary": lambda f: f(optax.adam(0.1)),
    "stateless": lambda f: f(lambda updates, params: updates),
    "stateless_with_tree_map": lambda f: f(lambda update, param: -0.1 * update),
    "trace": lambda f: f(0.9),
    "with_extra_args_support": lambda f: f(optax.adam(0.1)),
    "zero_nans": lambda f: nan_at_odd_steps(f()),
}

# What else `update` is given; of the others it is value, grad and value_fn.
EXTRA = {
    "hutchinson_estimator_diag_hessian": ["obj_fn"],
    "sam": ["grad_fn"],
    "sophia": ["obj_fn"],
}
PARAMS_OF: dict[str, Any] = {
    "lookahead": optax.LookaheadParams.init_synced(PARAMS),
    "split_real_and_imaginary": COMPLEX,
}
# Their gradients are per example.
PRIVATE = ["differentially_private_aggregate", "dpsgd"]
# Updates change the form of their state, so that what `init` makes is no target for a later one.
CHANGE = {
    "dog:mixed precision": "opt_state/1/max_dist: saved float32[], wanted bfloat16[]",
    "measure_with_ema": "opt_state/measurements/norm: saved float32[], wanted nothing",
    "momo:mixed precision": "opt_state/gamma: saved float32[], wanted bfloat16[]",
    "monitor": "opt_state/measurements/norm: saved float32[], wanted nothing",
    "prodigy:mixed precision": "opt_state/exp_avg/bias: saved float32[3], wanted bfloat16[3]",
}
# They say nothing of what they return, do not run without arguments, and make no optimizers.
OTHERS = [
    "bias_correction",
    "matrix_inverse_pth_root",
    "schedule_free_eval_params",
    "sigmoid_binary_cross_entropy",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
]


def makes_optimizers(value: Any) -> bool | None:
    """Whether a function, or a method of a class, is annotated so; None: it is not annotated."""
    if isinstance(value, type):
        methods = [method for name, method in vars(value).items() if not name.startswith("_")]
        return any(makes_optimizers(method) for method in methods if inspect.isfunction(method))
    made = inspect.signature(value, eval_str=True).return_annotation
    if made is inspect.Signature.empty:
        return None
    while typing.get_origin(made) is not None:  # `inject_hyperparams`: Callable[…, it]
        made = typing.get_args(made)[-1]
    return isinstance(made, type) and issubclass(made, GradientTransformation)


@functools.cache
def default(constructor: Build) -> GradientTransformation | None:
    """What it makes without arguments, or with a learning rate; None: it needs others."""
    parameters = inspect.signature(constructor).parameters.values()
    empty, learning_rate = inspect.Parameter.empty, {"learning_rate": 0.1}
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    needed = {p.name for p in parameters if p.default is empty and p.kind not in variadic}
    if needed - learning_rate.keys():
        return None
    return constructor(**{name: learning_rate[name] for name in needed})


def found() -> tuple[dict[str, Any], list[str]]:
    """The public constructors by name, and the functions that may be some."""
    public = {
        name: value
        for module in (optax, optax.contrib)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isroutine(value) or isinstance(value, type | functools.partial))
    }
    verdicts = {name: makes_optimizers(value) for name, value in public.items()}
    yes = {name: public[name] for name, verdict in verdicts.items() if verdict}
    silent = {name: public[name] for name, verdict in verdicts.items() if verdict is None}
    made = {name: default(value) for name, value in silent.items() if name not in OTHERS}
    yes |= {n: silent[n] for n in made if isinstance(made[n], GradientTransformation)}
    yes |= {n: silent[n] for n in made if n in ARGUMENTS}
    return yes, [name for name in made if made[name] is None and name not in ARGUMENTS]


CONSTRUCTORS, UNKNOWN = found()
USES = [*(name for name in CONSTRUCTORS if name not in ARGUMENTS), *ARGUMENTS]


def build(use: str) -> GradientTransformation:
    constructor = CONSTRUCTORS[use.partition(":")[0]]
    made = ARGUMENTS[use](constructor) if use in ARGUMENTS else default(constructor)
    assert made is not None
    return made


def test_every_constructor_of_optax_is_known():
    needy = {n for n in CONSTRUCTORS if n not in ARGUMENTS and default(CONSTRUCTORS[n]) is None}
    assert not needy | set(UNKNOWN), "give arguments for these in ARGUMENTS, or list them in OTHERS"


def test_every_name_in_the_tables_is_one_of_optax():
    names = {use.partition(":")[0] for use in [*ARGUMENTS, *EXTRA, *PARAMS_OF, *PRIVATE]}
    assert sorted(names - CONSTRUCTORS.keys()) == []
    assert [n for n in OTHERS if not hasattr(optax, n) and not hasattr(optax.contrib, n)] == []
    assert not set(OTHERS) & CONSTRUCTORS.keys()


def loss(params: Any, step: Any, obj_fn: Any = None) -> jax.Array:
    """A bowl whose middle moves at each step."""
    return sum(jnp.sum(jnp.abs(leaf - 0.3 * step) ** 2) for leaf in jax.tree.leaves(params))


value_and_grad = jax.jit(jax.value_and_grad(loss))


class Run:
    """One optimizer: its first state, and how it goes on."""

    def __init__(self, use: str) -> None:
        self.name, _, variant = use.partition(":")
        self.params = MIXED if variant == "mixed precision" else PARAMS_OF.get(self.name, PARAMS)
        self.tx = optax.with_extra_args_support(build(use))

    def init(self) -> train_state.TrainState:
        return train_state.TrainState.create(apply_fn=loss, params=self.params, tx=self.tx)

    def update(self, state: train_state.TrainState) -> train_state.TrainState:
        params = getattr(state.params, "fast", state.params)  # of `lookahead`
        value, grads = value_and_grad(params, state.step)
        grads = jax.tree.map(jnp.conj, grads)
        here = functools.partial(loss, step=state.step)
        extra = {
            "value": value,
            "grad": grads,
            "value_fn": here,
            "obj_fn": here,
            "grad_fn": lambda params, i: value_and_grad(params, state.step + i)[1],
        }
        extra = {key: extra[key] for key in EXTRA.get(self.name, ["value", "grad", "value_fn"])}
        if self.name in PRIVATE:
            grads = jax.tree.map(lambda grad: jnp.stack([grad, -2 * grad]), grads)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def after(updates: int, state: Any, update: Callable[[Any], Any]) -> Any:
    for _ in range(updates):
        state = update(state)
    return state


def quick(run: Run) -> Callable[[Any], Any]:
    """`run.update`, compiled if it branches or loops: JAX else compiles that at each call."""
    jaxpr = str(jax.make_jaxpr(run.update)(run.init()))
    return jax.jit(run.update) if {"cond[", "while[", "scan["} & set(jaxpr.split()) else run.update


def save(root: Path, step: int, state: Any) -> None:
    with fc.CheckpointCallback(root, every_n_steps=1) as ckpt:
        ckpt.on_step_end(step, state)


def bits(leaf: Any) -> bytes:
    dtype = jax.typeof(leaf).dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return bits(jax.random.key_data(leaf))
    return np.asarray(leaf, dtype).tobytes()


def assert_same(a: Any, b: Any, *, weak_types: bool = True) -> None:
    """The same containers, types of leaves, and bits; a Python number is a weakly typed array."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(*map(jax.tree.leaves_with_path, (a, b)), strict=True):
        one, other = jax.typeof(x), jax.typeof(y)
        where = jax.tree_util.keystr(path)
        assert (one.shape, one.dtype) == (other.shape, other.dtype), where
        assert one.weak_type == other.weak_type or not weak_types, where
        assert bits(x) == bits(y), where


@pytest.mark.parametrize("use", USES)
def test_an_optimizer_goes_on_as_if_never_interrupted(use: str, tmp_path: Path):
    run = Run(use)
    update = quick(run)
    saved = after(2, run.init(), update)
    save(tmp_path, 2, saved)
    expected = after(5, saved, update)

    def make() -> train_state.TrainState:
        return after(2 if use in CHANGE else 0, run.init(), run.update)

    for like in (make(), jax.eval_shape(make)):
        restored = fc.restore_train_state(tmp_path, like)
        assert_same(restored, saved, weak_types=False)  # they are those of `like`
        assert_same(after(5, restored, update), expected)


@pytest.mark.parametrize("use", CHANGE)
def test_a_state_that_updates_give_another_form_is_restored_into_that(use: str, tmp_path: Path):
    run = Run(use)
    saved = after(2, run.init(), run.update)
    save(tmp_path, 2, saved)
    for like in (run.init(), jax.eval_shape(run.init)):
        with pytest.raises(TreeMismatchError) as raised:
            fc.restore_train_state(tmp_path, like)
        assert CHANGE[use] in map(str, raised.value.differences)

    like = jax.eval_shape(lambda: after(2, run.init(), run.update))
    with fc.CheckpointCallback(tmp_path) as ckpt:
        restored, step = ckpt.restore_or_init(like, init=run.init)
    assert step == 2
    assert_same(restored, saved)


def test_hyperparameters_of_a_restored_state_can_be_set(tmp_path: Path):
    run = Run("inject_hyperparams")
    like = run.init()
    save(tmp_path, 0, like)
    restored = fc.restore_train_state(tmp_path, like)
    restored.opt_state.hyperparams["weight_decay"] = jnp.float32(0.5)
    assert run.update(restored).opt_state.hyperparams["weight_decay"] == 0.5
    assert like.opt_state.hyperparams["weight_decay"] != 0.5


class AveragedState(train_state.TrainState):
    """With a moving average of the params, or None."""

    ema_params: Any = None


ADAM = optax.adamw(0.1)


def averaged(ema_params: Any) -> AveragedState:
    return AveragedState.create(apply_fn=loss, params=PARAMS, tx=ADAM, ema_params=ema_params)


def averaged_update(state: AveragedState) -> AveragedState:
    state = state.apply_gradients(grads=value_and_grad(state.params, state.step)[1])
    average = optax.tree_utils.tree_update_moment(state.params, state.ema_params, 0.9, 1)
    return state.replace(ema_params=average)


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AveragedState]:
    root, state = tmp_path_factory.mktemp("run"), after(2, averaged(PARAMS), averaged_update)
    save(root, 2, state)
    return root, state


def test_averaged_params_go_on_as_if_never_interrupted(averaged_run: tuple[Path, AveragedState]):
    root, saved = averaged_run
    for like in (averaged(PARAMS), jax.eval_shape(averaged, PARAMS)):
        restored = fc.restore_train_state(root, like)
        assert type(restored) is AveragedState
        assert_same(restored, saved)
        assert_same(after(5, restored, averaged_update), after(5, saved, averaged_update))


def test_averaged_params_are_restored_alone_for_an_evaluation(
    averaged_run: tuple[Path, AveragedState],
):
    root, saved = averaged_run
    wanted = {"params": None, "ema_params": jax.eval_shape(lambda: PARAMS)}
    out = fc.restore(root, wanted, unexpected="ignore")
    assert_same(out.state, {"params": None, "ema_params": saved.ema_params})
    assert set(out.report.loaded) == {
        "train_state/ema_params/bias",
        "train_state/ema_params/dense/kernel",
    }


def test_a_state_that_averages_nothing_is_restored_into_such_a_one(tmp_path: Path):
    save(tmp_path, 0, averaged(None))
    assert fc.restore_train_state(tmp_path, averaged(None)).ema_params is None
    with pytest.raises(TreeMismatchError) as raised:
        fc.restore_train_state(tmp_path, averaged(PARAMS))
    assert [str(difference) for difference in raised.value.differences] == [
        "train_state/ema_params/bias: saved nothing, wanted float32[3]",
        "train_state/ema_params/dense/kernel: saved nothing, wanted float32[4,3]",
    ]
