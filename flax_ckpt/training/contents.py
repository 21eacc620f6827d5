"""What goes into a step of a run: the state's parts, the config, the data's position, metrics."""

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.message import Message

from flax_ckpt.adapters import config as configs
from flax_ckpt.adapters import state as states
from flax_ckpt.context import Context
from flax_ckpt.format import names
from flax_ckpt.training import data, notices, provenance
from flax_ckpt.training.best import Best

CONFIG: Final = "config"


class Contents:
    """What goes into each step, whatever its state.

    Attributes:
        config: the run's, with where it comes from, as a message; or None.
        data_iterator: whose position is saved, or None.
        best: which steps are the best, or None.
    """

    def __init__(
        self, config: Any, data_iterator: Any, best: tuple[Any, ...] | None, context: Context
    ) -> None:
        self.config: Message | None = None
        if config is not None:
            self.config = configs.add_provenance(configs.to_message(config), provenance.collect())
        data.require_iterator(data_iterator, context)
        self.data_iterator = data_iterator
        self.best = None if best is None else Best.of(best)
        self._warned = self._lacked = False

    def of(self, step: int, state: Any, metrics: Mapping[str, Any] | None) -> tuple[Any, ...]:
        """What :meth:`Saver.save` takes after the step; warns once if it is odd."""
        parts = {name: tree for name, tree in states.split(state).items() if tree is not None}
        trees = list(parts)
        if self.config is not None:
            parts[CONFIG] = configs.add_provenance(self.config, {"mesh": provenance.mesh(parts)})
        if self.data_iterator is not None:
            parts[names.DATA] = self.data_iterator
        numbers, custom = metrics and notices.numbers(metrics), None
        if self.best is not None:
            custom = self.best.to_metadata()
            self._lacked = self._lacked or notices.no_metric(step, self.best.metric, numbers)
        self._warned = self._warned or notices.other_count(step, "is saved", state)
        return parts, trees, numbers, custom

    def is_whole(self, state: Any) -> bool:
        """Whether a state seen earlier can still be saved as it was, with what goes with it."""
        return self.data_iterator is None and states.is_whole(state)
