"""A process for each case of the bench and each number of threads.

What ran before in a process may slow down what runs next: compiled functions are dispatched in
another way, the heap is in another state, threads wait for work. So nothing has run before.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from md_plugin.bench.core import Options

PATIENCE = 15.0  # s, for a process that was interrupted: it ends its LAMMPS, which may take 5 s


class CaseError(RuntimeError):
    """The process of a case failed; with what it said."""


def environment(threads: int) -> dict[str, str]:
    """That of a process with so many threads of torch and numba; both read it when they start."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    return {**os.environ, **counts}


def run_case(
    case: str,
    options: Options,
    heard: Callable[[dict[str, Any]], None],
    module: str = "md_plugin.bench.cases",
    limit: float | None = None,
) -> None:
    """Run one case in a new process to its end.

    Args:
        case: name of a case, or `cases.CEILINGS`.
        options: of the process.
        heard: is given each message as it comes; see `cases`.
        module: runs the case, and ends in `speak`.
        limit: seconds after which it is ended; None: never.

    Raises:
        CaseError: the process failed, its standard error was shown as it came; or took too long.
    """
    task = json.dumps({"case": case, "options": asdict(options)})
    failure = ""
    with started([sys.executable, "-m", module, task], options) as process:
        assert process.stdout is not None
        late = threading.Event()
        with ended_after(limit, process, late):
            for line in process.stdout:
                message = json.loads(line)
                failure = message.get("failed", failure)
                heard(message)
            code = process.wait()
    if late.is_set():
        failure = f"ended after {limit:g} s, its limit"
    if code != 0:
        raise CaseError(f"case {case}, threads {options.threads}: {failure or verdict(code)}")


@contextmanager
def ended_after(
    limit: float | None, process: subprocess.Popen[str], late: threading.Event
) -> Iterator[None]:
    """A block of code during which the process is killed, and `late` set, after so many seconds."""

    def kill() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit or 0.0, kill)
    if limit is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def speak(said: Iterator[dict[str, Any]]) -> int:
    """In the process of a case: write its messages, a line of JSON each; returns the exit code.

    Whatever else prints goes to standard error.
    """
    # Descriptors, not sys.stdout: compiled libraries print, too.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        try:
            for message in said:
                out.write(json.dumps(message) + "\n")
                out.flush()
        except KeyboardInterrupt:
            return 130
        except Exception as problem:
            traceback.print_exc()
            out.write(json.dumps({"failed": f"{type(problem).__name__}: {problem}"}) + "\n")
            return 1
    return 0


@contextmanager
def started(command: list[str], options: Options) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, so that an interrupt reaches it once, from here.

    It ends with this block, also where this process is told to terminate.
    """
    process = subprocess.Popen(
        command,
        env=environment(options.threads),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _exit) if main else None
    try:
        yield process
    finally:
        end(process)
        if main:
            signal.signal(signal.SIGTERM, before)


def _exit(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def end(process: subprocess.Popen[str]) -> None:
    """End it where it still runs, by an interrupt first, so that it can end its own processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def verdict(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    memory = ", which the system sends where memory is full" if name == "SIGKILL" else ""
    return f"ended by {name}{memory}"
