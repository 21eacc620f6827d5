"""When to save: each policy against Orbax's own of the same name, and what ours say more."""

import datetime
import inspect
from types import SimpleNamespace
from typing import Any

import orbax.checkpoint.experimental.v1 as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flax_ckpt as fc

ours = fc.training.save_decision_policies
theirs = ocp.training.save_decision_policies
NAMES = [
    "AnySavePolicy",
    "ContinuousCheckpointingPolicy",
    "DecisionContext",
    "FixedIntervalPolicy",
    "InitialSavePolicy",
    "PreemptionCheckpointingPolicy",
    "SaveDecisionPolicy",
    "SpecificStepsPolicy",
]
BEGAN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def checkpoint(step: int, seconds: int, metrics: Any = None) -> Any:
    time = BEGAN + datetime.timedelta(seconds=seconds)
    return SimpleNamespace(step=step, time=time, metrics=metrics)


def context(module: Any, saving: bool = False, preempted: bool = False) -> Any:
    options = ocp.options if module is theirs else fc.options
    return module.DecisionContext(
        is_saving_in_progress=saving,
        reached_preemption=preempted,
        multiprocessing_options=options.MultiprocessingOptions(),
    )


def policies(module: Any) -> list[Any]:
    """The same policies from either library."""
    some = [
        module.FixedIntervalPolicy(3),
        module.SpecificStepsPolicy({2, 5}),
        module.ContinuousCheckpointingPolicy(),
        module.ContinuousCheckpointingPolicy(minimum_interval_secs=10),
        module.PreemptionCheckpointingPolicy(),
        module.InitialSavePolicy(),
    ]
    return [*some, module.AnySavePolicy([some[0], some[4]]), module.AnySavePolicy([])]


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), max_size=4),
    step=st.tuples(st.integers(1, 4), st.integers(0, 24)),
    saving=st.booleans(),
    preempted=st.booleans(),
)
def test_they_decide_as_those_of_orbax(
    gaps: list[tuple[int, int]], step: tuple[int, int], saving: bool, preempted: bool
):
    history, at = [], (0, 0)
    for gap in [*gaps, step]:
        at = at[0] + gap[0], at[1] + gap[1]
        history.append(checkpoint(*at))
    *previous, now = history
    for a, b in zip(policies(ours), policies(theirs), strict=True):
        found = a.should_save(now, previous, context=context(ours, saving, preempted))
        assert found == b.should_save(now, previous, context=context(theirs, saving, preempted)), a


@pytest.mark.parametrize("name", NAMES)
def test_names_and_parameters_are_those_of_orbax(name: str):
    a, b = (getattr(module, name) for module in (ours, theirs))
    fields = [
        [(p.name, p.kind, p.default) for p in inspect.signature(c).parameters.values()]
        for c in (a, b)
    ]
    if fields[1] and fields[1][0][0] == "args":  # a protocol, or without any
        fields = [[], []]
    assert fields[0] == fields[1]


def test_an_interval_that_is_not_positive_is_refused_at_once():
    with pytest.raises(ValueError, match="interval must be at least 1, got -2"):
        ours.FixedIntervalPolicy(-2)


def test_which_need_no_agreement_between_processes():
    fixed, clock = ours.FixedIntervalPolicy(2), ours.ContinuousCheckpointingPolicy()
    assert ours.is_same_everywhere(ours.AnySavePolicy([fixed, ours.SpecificStepsPolicy([1])]))
    assert not ours.is_same_everywhere(ours.AnySavePolicy([fixed, clock]))
    assert not ours.is_same_everywhere(SimpleNamespace(should_save=None))
    derived = type("Derived", (ours.FixedIntervalPolicy,), {})
    assert not ours.is_same_everywhere(derived(1))  # may ask for more


@pytest.mark.parametrize("policy", policies(ours), ids=repr)
def test_they_follow_the_protocol(policy: Any):
    assert isinstance(policy, ours.SaveDecisionPolicy)
    assert isinstance(policy, theirs.SaveDecisionPolicy)
