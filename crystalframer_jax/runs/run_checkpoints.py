"""The checkpoints of a training: the first process writes and reads them, all processes get what it reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from crystalframer_jax.parallel.devices import Devices, Tree
from crystalframer_jax.parallel.processes import arrays_from_first_process, is_first_process, json_from_first_process
from crystalframer_jax.runs.checkpoints import MODEL_FIELDS, Checkpoints, on_this_device


class RunCheckpoints:
    """As `Checkpoints`, for a state that is the same on all devices of all processes.

    What is restored is on all devices again, however many there were. Only the first process needs the folder: in the
    others `save`, `wait` and `close` do nothing, there is no `last` checkpoint, and there are no `losses`.
    """

    def __init__(self, workdir: Path, devices: Devices, keep_best: int, keep_last: int):
        self.devices = devices
        self.own = own = Checkpoints(workdir, True, keep_best, keep_last) if is_first_process() else None
        nothing: Any = [lambda *_: None] * 4
        methods = (own.save, own.wait, own.close, own.last, own.losses) if own else (*nothing, list)
        self.save, self.wait, self.close, self.last, self.losses = methods

    def restore_latest(self, like: Tree) -> tuple[Tree, dict[str, Any]] | None:
        """See `Checkpoints.restore_latest`; `like` gives structure, shapes and types."""
        found = self.own.restore_latest(on_this_device(like)) if self.own else None
        state, meta = found or (None, None)
        meta = json_from_first_process(meta)
        return (self.on_all(lambda: state, like), meta) if meta is not None else None

    def best_model(self, like: Tree) -> dict[str, Any] | None:
        """Reads MODEL_FIELDS of the checkpoint with the smallest validation loss, unless that is the newest."""
        own, best = self.own, self.own.best() if self.own else None
        best = json_from_first_process(None if own and best == own.last() else best)
        if best is None:
            return None
        shapes = {name: getattr(like, name) for name in MODEL_FIELDS}
        return self.on_all(lambda: own.restore_model(best, on_this_device(shapes)) if own else None, shapes)

    def on_all(self, read: Callable[[], Tree], like: Tree) -> Any:
        """Puts the arrays that the first process reads on all devices; `like` has their shapes and types."""
        tree = read() if is_first_process() else None
        if jax.process_count() > 1:
            tree = arrays_from_first_process(tree, like)
        return self.devices.replicate(tree)
