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


class _Root(NamedTuple):
    """A node that is in no other, or a leaf beside nodes.

    Attributes:
        value: the node.
        kind: "optimizer", "module", "" for any other node, "leaf".
        prefix: what the names of its leaves begin with: its place in the state, unless it is the
            only module or the only optimizer.
    """

    value: Any
    kind: str
    prefix: Path


class _Opened(NamedTuple):
    """A state, taken apart.

    Attributes:
        roots: by number, in the order of JAX's leaves.
        leaves: by path: the number of the root, and NNX's keys in that.
        build: makes a state from values for the leaves, in their order.
    """

    roots: dict[int, _Root]
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
    for node in filter(is_node, leaves):
        is_bare = typed and isinstance(node, nnx.State)
        if not is_bare or any(_is_variable(inner) for _, inner in nnx.to_flat_state(node)):
            return True
    return False


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
        StateError: two values would have one name, or an abstract module hides an array.
    """
    if _is_split(state):
        try:
            return collections(_nnx().merge(*state))
        except ValueError as error:
            what = "this graphdef and this state are not all of what nnx.split returned"
            raise StateError(f"{what}: {error}") from error
    found = _open(state)
    fields: dict[str, Any] = {}
    values = [_value(leaf) for _, leaf in found.leaves]
    if any(isinstance(value, jax.ShapeDtypeStruct) for value in values):
        _refuse_hidden(state, found)
    for (path, leaf), value in zip(found.leaves, values, strict=True):
        root = found.roots[path[0]]
        if root.kind != "optimizer" or path[1] != OPT_STATE:
            _insert(fields, _name(root, path[1:], leaf), value)
    for root in found.roots.values():
        if root.kind == "optimizer":
            _insert(fields, (OPT_STATE, *root.prefix), pure(root.value.opt_state))
        else:
            fields.setdefault(PARAMS, {})
    return fields


def merge(like: S, fields: Mapping[str, Any]) -> S:
    """The inverse of :func:`collections`: a new state of the type of `like`."""
    if _is_split(like):
        graph, state = cast("Any", like)
        return cast("S", (graph, _nnx().state(merge(_nnx().merge(graph, state), fields))))
    found = _open(like)
    names = [_name(found.roots[path[0]], path[1:], leaf) for path, leaf in found.leaves]
    return found.build([_at(fields, name) for name in names])


def step_of(state: Any) -> Any:
    """What the only optimizer in a state counts; None if there is not one."""
    roots: list[Any] = jax.tree.leaves(state, is_leaf=is_node)
    counts = [_value(root.step) for root in roots if _kind(root) == "optimizer"]
    return counts[0] if len(counts) == 1 else None


def _open(tree: Any) -> _Opened:
    nnx = _nnx()
    pairs, treedef = _tree_util.tree_flatten_with_path(tree, is_leaf=is_node)
    kinds = [_kind(root) for _, root in pairs]
    roots: dict[int, _Root] = {}
    for i, (path, root) in enumerate(pairs):
        alone = kinds[i] in ("optimizer", "module") and kinds.count(kinds[i]) == 1
        where = tuple([jax.tree_util.keystr((key,), simple=True) for key in path])
        roots[i] = _Root(root, kinds[i], () if alone else where)
    numbered = {i: root.value for i, root in roots.items()}
    others = {i: x for i, x in numbered.items() if kinds[i] == "leaf" or isinstance(x, nnx.State)}
    graph, inside = nnx.split({i: root for i, root in numbered.items() if i not in others})
    leaves = list(nnx.to_flat_state(nnx.State({**others, **inside})))

    def build(values: Sequence[Any]) -> Any:
        new = [(path, _filled(leaf, v)) for (path, leaf), v in zip(leaves, values, strict=True)]
        found = nnx.from_flat_state(new)
        new_others = {i: found.pop(i, nnx.State({})) for i in others}
        nodes = nnx.merge(graph, found) | new_others
        return treedef.unflatten([nodes[i] for i in numbered])

    return _Opened(roots, leaves, build)


def _refuse_hidden(state: Any, found: _Opened) -> None:
    """In an abstract module, what NNX takes for static is not only what was so in the module."""
    known = {id(leaf) for _, leaf in found.leaves}
    path: Path
    for path, leaf in _nnx().iter_graph(state):
        if id(leaf) not in known and isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
            what = f"{'/'.join(map(str, path))} of the abstract state is an array that NNX does"
            what += " not tell from a static attribute any more: in the module, make it a variable,"
            raise StateError(f"{what} or nnx.data(array); or pass a concrete module")


def _value(leaf: Any) -> Any:
    """What is in a variable, as it is: no hook sees it."""
    return leaf if not _is_variable(leaf) else jax.tree.leaves(leaf, is_leaf=other_than(leaf))[0]


def _filled(leaf: Any, value: Any) -> Any:
    """A new variable like `leaf`, its metadata included; the value, if `leaf` is none."""
    if not _is_variable(leaf):
        return value
    return _tree_util.tree_structure(leaf, is_leaf=other_than(leaf)).unflatten([value])


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, _nnx().Variable)


def other_than(node: Any) -> Callable[[Any], bool]:
    """An `is_leaf` of JAX's that stops at the children of a node."""
    return lambda other: other is not node


def _is_split(tree: Any) -> bool:
    """Whether this is what nnx.split returns."""
    nnx = _nnx()
    if type(tree) is not tuple or len(pair := cast("Path", tree)) != 2:
        return False
    return isinstance(pair[0], nnx.GraphDef) and isinstance(pair[1], nnx.State)


def _kind(root: Any) -> str:
    nnx = _nnx()
    if isinstance(root, nnx.Optimizer):
        return "optimizer"
    if isinstance(root, nnx.Module | nnx.State):
        return "module"
    return "" if is_node(root) else "leaf"


def _name(root: _Root, inside: Path, leaf: Any) -> Path:
    """Where a leaf is among the fields of its state."""
    if root.kind == "leaf":
        return (OTHER, *root.prefix)
    if root.kind == "optimizer":
        if inside[0] == OPT_STATE:
            return (OPT_STATE, *root.prefix, *inside[1:])
        if inside == ("step",):
            return ("step", *root.prefix)
        if inside[0] == "model":  # of a ModelAndOptimizer
            inside = inside[1:]
    return (_collection(leaf), *root.prefix, *map(str, inside))


def _collection(leaf: Any) -> str:
    """The name of a variable's type, where Linen has one, Linen's."""
    nnx = _nnx()
    if not _is_variable(leaf):
        return ARRAYS
    for kind, name in {nnx.Param: PARAMS, nnx.RngState: "rngs", nnx.OptState: OPT_STATE}.items():
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
        what = f"two values of this state would both be saved as {'/'.join(map(str, name))}"
        hint = "give the type of variable, or the place in the state, another name"
        raise StateError(f"{what}: {hint}")
    node[name[-1]] = value


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        by_name = isinstance(key, str) and not isinstance(tree, Mapping)
        tree = cast("Any", getattr(tree, key) if by_name else tree[key])
    return tree
