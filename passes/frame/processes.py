"""A function applied to many tasks by processes of their own, which import what it needs and nothing of the caller's script.

Neither `multiprocessing` start method will do: a fork is unsafe beside the threads of JAX, and the others run the caller's
main script again.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class ProcessLost(RuntimeError):
    """The process of a task is gone: it crashed, or was ended because it took too long.

    Attributes:
        is_late: whether it took too long.
    """

    def __init__(self, message: str, is_late: bool = False) -> None:
        super().__init__(message)
        self.is_late = is_late


class Workers:
    """Processes that are there as long as the context is entered; with one, all is done in this process.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._count = count if count > 1 else 0
        self._processes = list[subprocess.Popen[bytes]]()
        self._free = SimpleQueue[subprocess.Popen[bytes]]()

    def __enter__(self) -> Workers:
        for _ in range(self._count):
            self._processes.append(_start())
            self._free.put(self._processes[-1])
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def map(self, function: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
        """The results of all tasks, in their order.

        Args:
            function: of a module that can be imported. Tasks and results are pickled.
            tasks: are begun in their order.

        Raises:
            Exception: what the function raised for the first task that failed.
        """
        if not self._processes:
            return [function(task) for task in tasks]

        def run(task: _Task) -> _Result:
            process = self._free.get()
            try:
                return _ask(process, function, task)
            finally:
                self._free.put(process)

        with ThreadPoolExecutor(self._count) as pool:
            return list(pool.map(run, tasks))


class GuardedProcess:
    """A process for tasks that may crash it, or take too long; then the next task gets a new one.

    Args:
        environment: variables that it has beside those of this process.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> GuardedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, function: Callable[[_Task], _Result], task: _Task, seconds: float) -> _Result:
        """The result of one task.

        Args:
            function: of a module that can be imported.
            task: is pickled, as the result is.
            seconds: that it may take.

        Raises:
            ProcessLost: it took longer, or the process crashed.
            Exception: what the function raised.
        """
        process = self._process = self._process or _start(self._environment)
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            return _ask(process, function, task)
        except ProcessLost:
            if is_late.is_set():
                raise ProcessLost(f"it took more than {seconds:g} s", is_late=True) from None
            raise
        finally:
            timer.cancel()
            timer.join()
            if process.poll() is not None or is_late.is_set():
                self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start(environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    # -P: the working directory is no place to import from.
    command = [sys.executable, "-P", "-m", __name__]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | dict(environment or {})
    )


def _ask(worker: subprocess.Popen[bytes], function: Callable[[_Task], _Result], task: _Task) -> _Result:
    assert worker.stdin is not None and worker.stdout is not None
    try:
        pickle.dump((function, task), worker.stdin)
        worker.stdin.flush()
        result, error = pickle.load(worker.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError) as broken:
        raise ProcessLost(f"its process ended with {_status_text(worker.wait())}") from broken
    if error is not None:
        raise error
    return result


def _status_text(status: int) -> str:
    """``SIGSEGV``, or ``exit status 1``."""
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name


def _serve() -> None:
    """Answer the tasks of standard input on standard output; what the function prints goes to standard error."""
    answers, tasks = sys.stdout.buffer, SimpleQueue[tuple[Callable[[Any], Any], Any]]()
    sys.stdout = sys.stderr
    threading.Thread(target=_read_tasks, args=(tasks,), daemon=True).start()
    while True:
        function, task = tasks.get()
        pickle.dump(_answer(function, task), answers)
        answers.flush()


def _read_tasks(tasks: SimpleQueue[tuple[Callable[[Any], Any], Any]]) -> None:
    """Read standard input to its end, where nobody waits for an answer any more: then the process ends, task or no task."""
    try:
        while True:
            tasks.put(pickle.load(sys.stdin.buffer))
    except EOFError:
        os._exit(1)


def _answer(function: Callable[[Any], Any], task: Any) -> tuple[Any, Exception | None]:
    try:
        return function(task), None
    except Exception as error:
        return None, error


if __name__ == "__main__":
    _serve()
