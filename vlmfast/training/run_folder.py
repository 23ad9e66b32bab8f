"""The output folder of a run: held by one run at a time, and the place that a resumed run goes on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from torch import distributed as dist

from vlmfast.distributed import rank_and_world_size
from vlmfast.training import checkpoints, record

Result = TypeVar("Result")


class Start(NamedTuple):
    """Where a run begins.

    Attributes:
        checkpoint: to go on from, or None for step 0.
        complete: the run has saved its final model; there is nothing to do.
        notes: a sentence on each checkpoint that was passed over.
    """

    checkpoint: Path | None = None
    complete: bool = False
    notes: tuple[str, ...] = ()


class RunFolder:
    """Holds args.output_dir, on behalf of all ranks, until it is closed or the process ends, however it ends.

    Args:
        args: PretrainingArguments.
    Raises:
        ValueError: on every rank: another run holds the folder, or it has checkpoints and args.resume is not set.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.path = Path(args.output_dir)
        self._lock: IO[str] | None = None
        on_first_rank(self._open)

    def start(self, make_record: Callable[[], record.Record], default: record.Record) -> Start:
        """Compares the run with the one in the folder, if it is to be resumed, and finds where it goes on.

        Args:
            make_record: what decides the course of this run; called on rank 0 only, as it may read data.
            default: see `record.changes`.
        Raises:
            ValueError: on every rank: the run differs from the one in the folder, or no checkpoint can be used.
        """
        return on_first_rank(lambda: self._start(make_record(), default))

    def finish(self) -> None:
        """Marks the run as complete, once its final model is saved."""
        if self._lock is not None:
            checkpoints.seal_model(self.path)

    def _open(self) -> None:
        self._lock = checkpoints.lock(self.path)
        newest = checkpoints.last_checkpoint(self.path)
        if newest is not None and not self.args.resume:
            raise ValueError(f"--output-dir {self.path} holds {newest.name} of an earlier run; pass --resume to go on")

    def _start(self, now: record.Record, default: record.Record) -> Start:
        checkpoint: Path | None = None
        notes: list[str] = []
        if self.args.resume:
            record.check_same_run(self.path / "run.json", now, default)
            newest = checkpoints.last_checkpoint(self.path)
            if (newest is None or checkpoints.is_over(newest, self.args)) and checkpoints.is_complete(self.path):
                return Start(complete=True)
            checkpoint, notes = checkpoints.usable_checkpoint(
                self.path, world_size=self.args.world_size, incomplete=self.args.resume_incomplete
            )
        checkpoints.unseal(self.path)
        record.write(self.path / "run.json", now)
        return Start(checkpoint, notes=tuple(notes))


def on_first_rank(function: Callable[[], Result]) -> Result:
    """function() on rank 0; every rank returns what it returned, or raises what it raised."""
    rank, world_size = rank_and_world_size()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # raised below, on all ranks
            outcome[1] = error
    if world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    try:
        if outcome[1] is not None:
            raise outcome[1]
        result: Result = outcome[0]
        return result
    finally:
        outcome.clear()  # an error whose own frame names it would hold what that frame knows, such as the lock
