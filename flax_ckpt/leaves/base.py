"""The vocabulary of leaves: what one kind of leaf says when saved, and when loaded.

A leaf handler knows one kind of leaf. It turns a value into a :class:`LeafWrite`, and what a
checkpoint says of a leaf, together with what the caller wants, into a target, regions to read,
and the value built from them.
"""

import dataclasses
from collections.abc import Sequence
from types import EllipsisType
from typing import Any, Final, Protocol, Self, runtime_checkable

import msgspec
import numpy as np
from jax.sharding import Sharding
from numpy.typing import NDArray

from flax_ckpt.format import tree
from flax_ckpt.storage.store import Region, Shard

# A leaf of an abstract tree that is not to be loaded: it stays as it is.
PLACEHOLDER: Final[EllipsisType] = ...


class _Value(msgspec.Struct, frozen=True, gc=False):
    """There is one for each leaf: cheap to make, and out of the garbage collector's sight."""

    def replace(self, **changes: Any) -> Self:
        """The same with other values for some attributes."""
        return msgspec.structs.replace(self, **changes)


class LeafWrite(_Value, frozen=True, gc=False):
    """A leaf, ready to be written: plain memory and strings, no device, no reference to change.

    Attributes:
        value_type: how `_METADATA` calls its kind.
        shape: shape of the whole array; None for a string.
        dtype: dtype as stored.
        shard_shape: shape of one shard; the last ones may be smaller only if there is one.
        shards: the shards that this process writes.
        sharding: where the array is, or the JSON text for `_sharding`.
        key_impl: for a typed PRNG key, its implementation.
        string: the value of a string leaf.
        spread: whether several processes hold parts of it; else the primary writes all of it.
    """

    value_type: str
    shape: tuple[int, ...] | None = None
    dtype: np.dtype[Any] | None = None
    shard_shape: tuple[int, ...] = ()
    shards: Sequence[Shard] = ()
    sharding: Sharding | str | None = None
    key_impl: str | None = None
    string: str | None = None
    spread: bool = False


class SavedLeaf(_Value, frozen=True, gc=False):
    """What a checkpoint says of a leaf before its data is read.

    Attributes:
        path: key path.
        name: of its data on disk.
        value_type: as in `_METADATA`; for an empty node its kind.
        shape: shape of the stored array; None for strings and empty nodes.
        dtype: dtype of the stored array.
        sharding: JSON text of the saved sharding, if recorded.
        key_impl: set for a typed PRNG key; shape and dtype are then those of its key data.
        string: the value of a string leaf.
    """

    path: tree.KeyPath
    name: str
    value_type: str
    shape: tuple[int, ...] | None = None
    dtype: np.dtype[Any] | None = None
    sharding: str | None = None
    key_impl: str | None = None
    string: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it is an empty container or None."""
        return self.value_type in tree.EMPTY

    def __str__(self) -> str:
        if self.key_impl is not None and self.shape is not None:
            return f"key<{self.key_impl}>{_shape(self.shape[:-1])}"
        if self.shape is None or self.dtype is None:
            return self.value_type
        kinds = {tree.ARRAY: "", tree.NUMPY: " (numpy)", tree.SCALAR: " (Python scalar)"}
        kind = kinds.get(self.value_type, f" ({self.value_type})")
        return f"{self.dtype.name}{_shape(self.shape)}{kind}"


def _shape(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def show_array(shape: Sequence[int], dtype: Any) -> str:
    """Shape and dtype as error messages print them: `float32[3,4]`."""
    return f"{getattr(dtype, 'name', dtype)}{_shape(shape)}"


def show(abstract: Any) -> str:
    """A wanted leaf as error messages print it."""
    if isinstance(abstract, type):
        return abstract.__name__
    if hasattr(abstract, "shape") and hasattr(abstract, "dtype"):
        return show_array(abstract.shape, abstract.dtype)
    return f"a {type(abstract).__name__}"


class Target(_Value, frozen=True, gc=False):
    """What a leaf shall become, resolved from the saved leaf and the caller's wish.

    Attributes:
        saved: what is there.
        regions: what to read of it.
        abstract: the handler's own resolved wish, e.g. a `jax.ShapeDtypeStruct`.
        strict: whether a rank-0 number must fit; else it is cast.
    """

    saved: SavedLeaf
    regions: tuple[Region, ...]
    abstract: Any
    strict: bool = False


@dataclasses.dataclass(frozen=True)
class LoadRules:
    """How far a wanted leaf may differ from the saved one.

    Attributes:
        strict: another dtype is a mismatch, except between rank-0 numbers whose value fits.
            False, as in `load`: the wanted dtype is a cast.
        fallbacks: collects names of leaves that came to one device as theirs do not exist.
        resize: another shape of the same rank is met by cutting and by filling with zeros.
    """

    strict: bool = False
    fallbacks: list[str] = dataclasses.field(default_factory=list[str])
    resize: bool = False

    def fits(self, saved: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        """Whether an array of one shape may come back in the other."""
        return saved == wanted or (self.resize and len(saved) == len(wanted))


@runtime_checkable
class LeafHandler(Protocol):
    """One kind of leaf; stateless."""

    @property
    def value_types(self) -> tuple[str, ...]:
        """The kinds in `_METADATA` that this handler loads when no wish decides."""
        ...

    def handles(self, value: Any) -> bool:
        """Whether this is the handler to save `value` with."""
        ...

    def handles_abstract(self, abstract: Any) -> bool:
        """Whether this is the handler to load a leaf as `abstract` with."""
        ...

    def write(self, value: Any, *, copy: bool) -> LeafWrite:
        """The snapshot of a value; with `copy` also of memory that the caller may overwrite."""
        ...

    def describe(self, saved: SavedLeaf) -> Any:
        """The abstract leaf that loads `saved` as it was saved."""

    def target(self, saved: SavedLeaf, abstract: Any, rules: LoadRules) -> Target | str:
        """What to read for `abstract`, or how the wish reads where it cannot be met."""
        ...

    def build(self, targets: Sequence[Target], data: Sequence[Sequence[NDArray[Any]]]) -> list[Any]:
        """The leaves, in order, from the regions read."""
        ...
