"""Training in several processes: starting them, and ending them together if one of them fails."""

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator

import jax

from crystalframer_jax.errors import UserError
from crystalframer_jax.parallel.heartbeats import KeyValueStore, Watchdog
from crystalframer_jax.parallel.interruption import TrainingInterrupted

SCHEDULERS = "SLURM (srun), Open MPI (mpirun) or Kubernetes"


class DistributedError(UserError):
    """The processes of a training cannot find one another."""


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int = 300,
) -> None:
    """Join the processes of a training; to be called before anything else of JAX.

    Under SLURM, Open MPI and Kubernetes what is not given is found out. Elsewhere give all of it: the address of
    process 0 (host:port, or $JAX_COORDINATOR_ADDRESS), how many processes there are, and which of them this one is.

    If not all processes have come within `timeout_seconds`, JAX cannot be interrupted any more: then this prints the
    error in one line and ends the process with status 1.

    Raises:
      DistributedError: something is missing or impossible, the port of process 0 is taken, or JAX is in use already.
    """
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and not address.rpartition(":")[2].isdecimal():
        raise DistributedError(f"the coordinator's address {address!r} has no port; give host:port of process 0")
    if num_processes is not None and num_processes < 1:
        raise DistributedError(f"there cannot be {num_processes} processes; give a number of at least 1")
    if process_id is not None and (process_id < 0 or (num_processes is not None and process_id >= num_processes)):
        count = "" if num_processes is None else f" {num_processes}"
        raise DistributedError(f"there is no process {process_id} of{count}; number the processes from 0")
    if process_id == 0 and address and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _check_port(address)
    too_late = threading.Timer(timeout_seconds, _give_up, [address, num_processes, process_id, timeout_seconds])
    too_late.daemon = True
    too_late.start()
    try:
        # JAX ends the process with a C++ stack dump when its own time is up, so that is later.
        jax.distributed.initialize(address, num_processes, process_id, initialization_timeout=timeout_seconds + 60)
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
    if threading.current_thread() is threading.main_thread():
        # JAX has made the process deaf to SIGTERM.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def _check_port(address: str) -> None:
    """Whether the service can listen at host:port; JAX may crash if it cannot."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", int(address.rpartition(":")[2])), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise DistributedError(
            f"the port of {address} cannot be used: {os.strerror(error.errno or 0)}; choose another"
        ) from error


def _give_up(address: str | None, num_processes: int | None, process_id: int | None, seconds: float) -> None:
    """End a process whose main thread waits for the others in vain."""
    this = "this process" if process_id is None else f"process {process_id}"
    everyone = "all processes" if num_processes is None else f"all {num_processes} processes"
    print(
        f"error: {this} has not met the others at {address or 'the coordinator'} within {seconds:g} s; check that "
        f"{everyone} were started, and that the address is that of process 0 and its port reachable",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


@contextlib.contextmanager
def failing_together(seconds: float = 600) -> Iterator[Watchdog]:
    """Around all that a process does after `start`: if one process fails or is lost, all end with status 1 and say why.

    The main thread calls `report` of the Watchdog at every step that it dispatches, in all processes alike. Ends are

    - an exception: its process prints it (errors that the user can mend in one line), the others its reason;
    - a process that is killed or unreachable for min(seconds, 60) s, or whose main thread has not reported for
      `seconds`: all others, and itself if it can, say which and where it was;
    - the normal one, SystemExit(0) or TrainingInterrupted, in all processes alike: the block is left, with the
      exception, as soon as all processes have come to its end.

    Exit statuses of failures are 1, that of SystemExit(n) in its process, and 130 after Ctrl-C. Nothing of this happens
    if there is but one process: exceptions pass.
    """
    group = _group()
    if group is None:
        yield Watchdog(None, "", 0, 1, seconds)
        return
    watchdog = Watchdog(*group, seconds)
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
            watchdog.fail(_reason(error), _trace(error), _status(error))
    if stopped is not None:
        raise stopped


def _group() -> tuple[KeyValueStore, str, int, int] | None:
    """The store that the processes share, its address, which process this is, and of how many; None for a single one.

    JAX has no public access to its store; jax.process_index() would initialize the devices, which may fail already.
    """
    if not jax.distributed.is_initialized():
        return None
    try:
        from jax._src.distributed import global_state as state

        client, address = state.client, state.coordinator_address or ""
        process, num_processes = state.process_id, state.num_processes
    except (ImportError, AttributeError) as error:
        raise DistributedError(f"several processes need an older jax than {jax.__version__}; install one") from error
    return None if client is None or num_processes == 1 else (client, address, process, num_processes)


def _may_follow_from_another(error: BaseException) -> bool:
    """Whether this may come of another process having ended, as errors of collective operations do."""
    text = str(error).lower()
    if isinstance(error, UserError | OSError) or "resource_exhausted" in text:
        return False
    words = ("gloo", "nccl", "unavailable", "deadline_exceeded")
    return isinstance(error, jax.errors.JaxRuntimeError) or any(word in text for word in words)


def _reason(error: BaseException) -> str:
    """The error in one line, for the other processes."""
    line = " ".join(str(error).split())
    match error:
        case UserError() | OSError():
            return line
        case KeyboardInterrupt():
            return "interrupted by Ctrl-C"
        case SystemExit():
            return line.removeprefix("error: ") if isinstance(error.code, str) else f"it ended with status {line}"
    return f"{type(error).__name__}: {line}"


def _trace(error: BaseException) -> str:
    """The traceback of an error that the user cannot mend."""
    if isinstance(error, UserError | OSError | KeyboardInterrupt | SystemExit):
        return ""
    return "".join(traceback.format_exception(error)).rstrip()


def _status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
