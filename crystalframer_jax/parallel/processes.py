"""Processes that run together: how they start, what they tell one another, and that all end if one of them fails."""

import contextlib
import io
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from crystalframer_jax.errors import UserError
from crystalframer_jax.parallel.devices import Tree
from crystalframer_jax.parallel.heartbeats import Watchdog
from crystalframer_jax.parallel.interruption import TrainingInterrupted

SCHEDULERS = "SLURM (srun), Open MPI (mpirun) or Kubernetes"


class DistributedError(UserError):
    """The processes of a training cannot find one another."""


# Starting


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int = 300,
) -> None:
    """Joins the processes of a training; to be called before anything else of JAX.

    Under SLURM, Open MPI and Kubernetes what is not given is found out. Elsewhere give all of it: the address of
    process 0 (host:port, or $JAX_COORDINATOR_ADDRESS), how many processes there are, and which of them this one is.

    If not all processes have come within `timeout_seconds`, JAX cannot be interrupted any more: then this prints the
    error in one line and ends the process with status 1. From here on JAX does not notice processes that are gone; all
    that follows belongs into `failing_together`.

    Raises:
      DistributedError: something is missing or impossible, the port of process 0 is taken, or JAX is in use already.
    """
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and not address.rpartition(":")[2].isdecimal():
        raise DistributedError(f"the coordinator's address {address!r} has no port; give host:port of process 0")
    if num_processes is not None and num_processes < 1:
        raise DistributedError(f"there cannot be {num_processes} processes; give a number of at least 1")
    if process_id is not None and (process_id < 0 or (num_processes is not None and process_id >= num_processes)):
        of = "" if num_processes is None else f" of {num_processes}"
        raise DistributedError(f"there is no process {process_id}{of}; number the processes from 0")
    if process_id == 0 and address and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _check_port(address)
    jax.config.update("jax_enable_preemption_service", False)  # it would make the process deaf to SIGTERM
    this = "this process" if process_id is None else f"process {process_id}"
    everyone = "all processes" if num_processes is None else f"all {num_processes} processes"
    reason = (
        f"{this} has not met the others at {address or 'the coordinator'} within {timeout_seconds:g} s; check that "
        f"{everyone} were started, and that the address is that of process 0 and its port reachable"
    )
    too_late = threading.Timer(timeout_seconds, _give_up, [reason])
    too_late.daemon = True
    too_late.start()
    try:
        # JAX ends the process with a C++ stack dump when its own time is up, so that is later. Its heartbeats would end
        # jobs that were suspended for long; `failing_together` has others.
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=timeout_seconds + 60,
            heartbeat_timeout_seconds=10**8,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        if "Failed to start RPC server" in reason:
            reason = "the coordinator's port is in use on this host; set JAX_COORDINATOR_PORT to another one"
        elif "defined" in reason:  # the address, the number of processes or which this is
            reason += (
                f" and cannot be found out here; start the processes by {SCHEDULERS}, or give each the coordinator's "
                "address, the number of processes and its own number"
            )
        raise DistributedError(f"the processes cannot join: {reason}") from error
    finally:
        too_late.cancel()


def _check_port(address: str) -> None:
    """Raises DistributedError unless the port of host:port is free; two services of JAX would share it unnoticed."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", int(address.rpartition(":")[2])), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise DistributedError(
            f"the port of {address} cannot be used: {os.strerror(error.errno or 0)}; choose another"
        ) from error


def _give_up(reason: str) -> None:
    """Ends a process whose main thread waits for the others in vain."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


# Telling one another


def is_first_process() -> bool:
    """Tells whether this is the process that writes files and messages."""
    return jax.process_index() == 0


def largest_of_processes(number: int) -> int:
    """Finds the largest of the numbers that the processes give."""
    return int(np.max(multihost_utils.process_allgather(np.array(number))))


def from_first_process(content: bytes) -> bytes:
    """Sends the `content` of the first process to all of them."""
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(content), np.int32)))
    data = np.frombuffer(content, np.uint8) if is_first_process() else np.zeros(size, np.uint8)
    return multihost_utils.broadcast_one_to_all(data).tobytes()


def json_from_first_process(value: Any) -> Any:
    """Sends a value of the first process to all of them, as JSON; with one process it stays as it is."""
    return json.loads(from_first_process(json.dumps(value).encode())) if jax.process_count() > 1 else value


def arrays_from_first_process(tree: Tree, like: Tree) -> Tree:
    """Sends the numpy arrays of the first process to all of them, bit for bit; `like` has their shapes and types."""
    leaves, structure = jax.tree.flatten(like)
    buffer = io.BytesIO()
    if is_first_process():
        own = zip(jax.tree.leaves(tree), leaves, strict=True)
        np.savez(buffer, *(np.asarray(x, leaf.dtype) for x, leaf in own))
    with np.load(io.BytesIO(from_first_process(buffer.getvalue()))) as arrays:
        return jax.tree.unflatten(structure, [arrays[name] for name in arrays.files])


# Ending


@contextlib.contextmanager
def failing_together(seconds: float = 600) -> Iterator[Watchdog]:
    """Makes all processes end with status 1 and say why if one fails or is lost; around all they do after `start`.

    The main thread calls `report` of the Watchdog at every step that it dispatches, in all processes alike. Ends are

    - an exception: its process prints it (errors that the user can mend in one line), the others its reason;
    - a process that is killed or unreachable for min(seconds, 60) s, or whose main thread has not reported for
      `seconds`: all others, and itself if it can, say which and where it was;
    - the normal one, SystemExit(0) or TrainingInterrupted, in all alike: the block is left when all are at its end.

    Exit statuses of failures are 1, that of SystemExit(n) in its process, and 130 after Ctrl-C. Nothing of this happens
    if there is but one process: exceptions pass.
    """
    watchdog = Watchdog(*_group(), seconds)
    if watchdog.store is None:
        yield watchdog
        return
    stopped: BaseException | None = None
    with watchdog.watching():
        try:
            try:
                yield watchdog
            except (TrainingInterrupted, SystemExit) as stop:
                if isinstance(stop, SystemExit) and stop.code:
                    raise
                stopped = stop
            watchdog.finish(str(stopped or "finished"))
        except BaseException as error:
            if _may_follow_from_another(error):
                with contextlib.suppress(KeyboardInterrupt):  # which ends the wait
                    watchdog.find_culprit()
            watchdog.fail(*_described(error))
    if stopped is not None:
        raise stopped


def _group() -> tuple[Any, str, int, int]:
    """Finds the store that the processes share, its address, which process this is, of how many; no store for one.

    JAX has no public access to its store; jax.process_index() would initialize the devices, which may fail already.
    """
    if not jax.distributed.is_initialized():
        return None, "", 0, 1
    try:
        from jax._src.distributed import global_state as state

        store = state.client if state.num_processes > 1 else None
        return store, state.coordinator_address or "", state.process_id, state.num_processes
    except (ImportError, AttributeError) as error:
        raise DistributedError(f"several processes need an older jax than {jax.__version__}; install one") from error


def _may_follow_from_another(error: BaseException) -> bool:
    """Tells whether this may come of another process having ended, as errors of collective operations do."""
    text = str(error).lower()
    if isinstance(error, UserError | OSError) or "resource_exhausted" in text:
        return False
    words = ("gloo", "nccl", "unavailable", "deadline_exceeded")
    return isinstance(error, jax.errors.JaxRuntimeError) or any(word in text for word in words)


def _described(error: BaseException) -> tuple[str, str, int]:
    """Gives the error in one line, its traceback unless the user can mend it, and the exit status."""
    line = " ".join(str(error).split())
    match error:
        case KeyboardInterrupt():
            return "interrupted by Ctrl-C", "", 130
        case SystemExit(code=int(status)):
            return f"it ended with status {line}", "", status
        case SystemExit() | UserError() | OSError():
            return line.removeprefix("error: "), "", 1
    return f"{type(error).__name__}: {line}", "".join(traceback.format_exception(error)).rstrip(), 1
