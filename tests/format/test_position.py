"""States of data iterators as JSON, there and back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_ckpt.errors import FormatError, NotHandleableError
from flax_ckpt.format import position

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
STATES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text().filter(lambda key: not key.startswith("$")), inner)
    ),
)


@given(STATES)
def test_a_state_comes_back_as_it_was(state: Any) -> None:
    data = position.encode(state, "it")
    assert repr(position.decode(data, "it")) == repr(state)  # which tells -0.0, nan, () and []


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i8").reshape(2, 3),
        np.zeros((0, 2), np.float16),
        np.array([True, False]),
        np.asfortranarray(np.ones((2, 3), np.complex64)),
        np.int64(-5),
        np.float32(0.1),
        np.bool_(True),
    ],
    ids=repr,
)
def test_numpy_values_come_back_with_shape_and_dtype(array: Any) -> None:
    (back,) = position.decode(position.encode([array], "it"), "it")
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)
    assert isinstance(back, np.generic) or back.flags.writeable


def test_what_it_says_is_readable_json() -> None:
    data = position.encode({"next_index": 7, "rng": b"\0", "at": (1, 2)}, "it")
    assert json.loads(data) == {
        "next_index": 7,
        "rng": {"$bytes": "AA=="},
        "at": {"$tuple": [1, 2]},
    }


@pytest.mark.parametrize(
    "state", [{1: 2}, {"$tuple": []}, {1, 2}, object(), np.array(["a"]), np.datetime64(0, "s"), 1j]
)
def test_anything_else_is_refused_with_its_place(state: Any) -> None:
    with pytest.raises(NotHandleableError, match=r"the state of it\['a'\]\[1\] is .* it may be of"):
        position.encode({"a": [0, state]}, "it")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "\ud800",
        '{"$bytes": 1}',
        '{"$bytes": "é"}',
        '{"$tuple": 3}',
        '{"$array": ["<i8", [2], "AAAA"]}',
        '{"$array": ["<i8", "x", "AAAA"]}',
        '{"$array": ["|O", [1], "AAAAAAAAAAA="]}',
        '{"$array": ["no dtype", [1], "AA=="]}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_damage_is_a_format_error(text: str) -> None:
    with pytest.raises(FormatError, match="file.json: not the state of a data iterator"):
        position.decode(text.encode("utf-8", "surrogatepass"), "file.json")
