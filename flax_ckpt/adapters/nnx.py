"""NNX modules, optimizers and states as plain trees, and back; loads nothing of NNX by itself.

    fields = collections(module)      # {"params": {"linear": {"kernel": …}}, "rngs": …}
    module = merge(like, fields)      # a new one, with the graph and static attributes of `like`

A node is a module, an optimizer, any other NNX object, or a variable. A training state is a node,
or a tree with nodes among its leaves, such as `(module, optimizer)`. Keys on disk are attribute
names, and numbers for elements of lists; there are no boxes, `kernel` and not `kernel/value`. A
variable that is shared has the name under which NNX comes to it first.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar, cast

import jax
from jax.core import Tracer

from flax_ckpt.errors import StateError

PARAMS: Final = "params"
OPT_STATE: Final = "opt_state"
ARRAYS: Final = "arrays"  # attributes of modules that are no variables
OTHER: Final = "other"  # leaves of a state beside its modules

S = TypeVar("S")
Path = tuple[Any, ...]
_tree_util: Any = jax.tree_util  # jaxlib says nothing about the types of its trees


class _Opened(NamedTuple):
    """The leaves of a state by path: the number of the root that has it, and NNX's keys in that."""

    roots: list[tuple[Path, Any]]
    leaves: list[tuple[Path, Any]]
    build: Callable[[Sequence[Any]], Any]


def _nnx() -> Any:
    """The library; None if nobody has imported it, and so nobody has a value of it."""
    return sys.modules.get("flax.nnx")


def is_node(value: Any) -> bool:
    """Whether this is an NNX object, a variable, or a state."""
    nnx = _nnx()
    return nnx is not None and isinstance(value, nnx.Pytree | nnx.Variable | nnx.State)


def holds_nodes(tree: Any, *, typed: bool = False) -> bool:
    """Whether there are nodes in a tree; with `typed`, others than states of bare arrays."""
    nnx = _nnx()
    leaves: list[Any] = jax.tree.leaves(tree, is_leaf=is_node) if nnx else []
    return any(
        any(_is_variable(inner) for _, inner in nnx.to_flat_state(leaf))
        if typed and isinstance(leaf, nnx.State)
        else is_node(leaf)
        for leaf in leaves
    )


def pure(tree: Any) -> Any:
    """The tree with nested dicts for nodes, and values for variables."""
    return jax.tree.map(_pure, tree, is_leaf=is_node) if holds_nodes(tree) else tree


def _pure(leaf: Any) -> Any:
    if not is_node(leaf) or _is_variable(leaf):
        return _value(leaf)
    nnx = _nnx()
    return nnx.to_pure_dict(leaf if isinstance(leaf, nnx.State) else nnx.state(leaf), _value)


def fill(like: S, tree: Any) -> S:
    """The inverse of :func:`pure`; the nodes are new ones."""
    if not holds_nodes(like):
        return tree
    found = _open(like)
    values = _tree_util.tree_structure(like, is_leaf=is_node).flatten_up_to(tree)
    return found.build([_at(values, path) for path, _ in found.leaves])


def collections(state: Any) -> dict[str, Any]:
    """The fields of a training state: `params`, `opt_state`, `step`, and variables by type.

    Args:
        state: has nodes. Its only module, and its only optimizer, is saved as if it were alone;
            the names of several begin with their place in the state.

    Raises:
        StateError: two values would have one name.
    """
    found = _open(state)
    optimizers = [number for number, _ in enumerate(found.roots) if _is_optimizer(found, number)]
    fields: dict[str, Any] = {}
    values = [_value(leaf) for _, leaf in found.leaves]
    if any(isinstance(value, jax.ShapeDtypeStruct) for value in values):
        _refuse_hidden(state, found)
    for (path, leaf), value in zip(found.leaves, values, strict=True):
        if not (path[0] in optimizers and path[1] == OPT_STATE):
            _insert(fields, _name(found, path, leaf), value)
    for number in optimizers:
        optimizer = found.roots[number][1]
        _insert(fields, (OPT_STATE, *_prefix(found, number)), pure(optimizer.opt_state))
    if len(optimizers) < len(found.roots):
        fields.setdefault(PARAMS, {})
    return fields


def merge(like: S, fields: Mapping[str, Any]) -> S:
    """The inverse of :func:`collections`: a new state of the type of `like`."""
    found = _open(like)
    return found.build([_at(fields, _name(found, path, leaf)) for path, leaf in found.leaves])


def step_of(state: Any) -> Any:
    """What the only optimizer in a state counts; None if there is not one."""
    roots: list[Any] = jax.tree.leaves(state, is_leaf=is_node)
    counts = [_value(root.step) for root in roots if isinstance(root, _nnx().Optimizer)]
    return counts[0] if len(counts) == 1 else None


def _open(tree: Any) -> _Opened:
    nnx = _nnx()
    pairs, treedef = _tree_util.tree_flatten_with_path(tree, is_leaf=is_node)
    roots = [(tuple([jax.tree_util.keystr((k,), simple=True) for k in p]), x) for p, x in pairs]
    numbered = {i: root for i, (_, root) in enumerate(roots)}
    states = {i: root for i, root in numbered.items() if isinstance(root, nnx.State)}
    objects = {i: x for i, x in numbered.items() if is_node(x) and i not in states}
    plain = {i: root for i, root in numbered.items() if not is_node(root)}
    graph, inside = nnx.split(objects)
    leaves = list(nnx.to_flat_state(nnx.State({**plain, **states, **inside})))

    def build(values: Sequence[Any]) -> Any:
        new = [(path, _filled(leaf, v)) for (path, leaf), v in zip(leaves, values, strict=True)]
        found = nnx.from_flat_state(new)
        others = {i: found.pop(i, nnx.State({})) for i in (*plain, *states)}
        nodes = nnx.merge(graph, found) | others
        return treedef.unflatten([nodes[i] for i in numbered])

    return _Opened(roots, leaves, build)


def _refuse_hidden(state: Any, found: _Opened) -> None:
    """In an abstract module, what NNX takes for static is not only what was so in the module."""
    known = {id(leaf) for _, leaf in found.leaves}
    path: Path
    for path, leaf in _nnx().iter_graph(state):
        if id(leaf) not in known and isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
            raise StateError(
                f"{'/'.join(map(str, path))} of the abstract state is an array that NNX does not"
                " tell from a static attribute any more: in the module, make it a variable, or"
                " nnx.data(array); or pass a concrete module"
            )


def _value(leaf: Any) -> Any:
    """What is in a variable, as it is: no hook sees it."""
    return leaf if not _is_variable(leaf) else jax.tree.leaves(leaf, is_leaf=_other_than(leaf))[0]


def _filled(leaf: Any, value: Any) -> Any:
    """A new variable like `leaf`, its metadata included; the value, if `leaf` is none."""
    if not _is_variable(leaf):
        return value
    return _tree_util.tree_structure(leaf, is_leaf=_other_than(leaf)).unflatten([value])


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, _nnx().Variable)


def _other_than(node: Any) -> Callable[[Any], bool]:
    return lambda other: other is not node


def _is_optimizer(found: _Opened, number: int) -> bool:
    return isinstance(found.roots[number][1], _nnx().Optimizer)


def _prefix(found: _Opened, number: int) -> Path:
    """What the names of a root's leaves begin with."""
    nnx = _nnx()
    where, root = found.roots[number]
    for kinds in (nnx.Optimizer,), (nnx.Module, nnx.State):
        if isinstance(root, kinds):
            alone = sum(isinstance(other, kinds) for _, other in found.roots) == 1
            return () if alone else where
    return where


def _name(found: _Opened, path: Path, leaf: Any) -> Path:
    """Where a leaf is among the fields of its state."""
    prefix, inside = _prefix(found, path[0]), path[1:]
    if not is_node(found.roots[path[0]][1]):
        return (OTHER, *prefix)
    if _is_optimizer(found, path[0]):
        if inside[0] == OPT_STATE:
            return (OPT_STATE, *prefix, *inside[1:])
        if inside == ("step",):
            return ("step", *prefix)
        if inside[0] == "model":  # of a ModelAndOptimizer
            inside = inside[1:]
    return (_collection(leaf), *prefix, *map(str, inside))


def _collection(leaf: Any) -> str:
    """The name of a variable's type, where Linen has one, Linen's."""
    nnx = _nnx()
    if not _is_variable(leaf):
        return ARRAYS
    names = {nnx.Param: PARAMS, nnx.RngState: "rngs", nnx.OptState: OPT_STATE}
    for kind, name in names.items():
        if isinstance(leaf, kind):
            return name
    try:
        return nnx.variable_name_from_type(type(leaf))
    except ValueError:  # nobody registered a name for it
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(leaf).__name__).lower()


def _insert(fields: dict[str, Any], name: Path, value: Any) -> None:
    node: Any = fields
    for key in name[:-1]:
        if not isinstance(node, dict):
            break
        node = cast("dict[str, Any]", node).setdefault(key, {})
    if not isinstance(node, dict) or name[-1] in node:
        raise StateError(
            f"two values of this state would both be saved as {'/'.join(map(str, name))}: give the"
            " type of variable, or the place in the state, another name"
        )
    node[name[-1]] = value


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        by_name = isinstance(key, str) and not isinstance(tree, Mapping)
        tree = cast("Any", getattr(tree, key) if by_name else tree[key])
    return tree
