"""Processes that stay alive and take turns as the ranks of one layout after another.

Importing Megatron-Core takes seconds a process, so the ranks are started once per test session, and forked from one
process that has imported it. A job of n ranks runs on the first n of them, with the environment torchrun would give it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GRACE_SECONDS = 3.0
"""How long the other ranks may go on after one has failed; they usually wait in a collective for ever."""


class RanksFailed(AssertionError):
    """A rank raised, died or took too long; the message holds every remote traceback."""


class RankPool:
    """At most ``size`` ranks on this machine."""

    def __init__(self, size: int, ancestor: str | None = None) -> None:
        """``ancestor``: a module; the ranks are forked from a process that has imported it, and nothing else."""
        self.size = size
        self.ancestor = ancestor
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._logs = Path(tempfile.mkdtemp(prefix="groupdpo-ranks-"))

    def run(self, num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        """``function(*args)`` on every rank; the results in order of rank.

        ``function`` is a top-level function of an importable module. After a failure all processes are ended, and
        the next call starts new ones.

        Raises:
            RanksFailed: with the traceback of every rank that raised.
        """
        assert 1 <= num_ranks <= self.size
        self._fail_if_dead()
        if not self._processes:
            self._start()
        port = free_port()
        for rank, pipe in enumerate(self._pipes[:num_ranks]):
            pipe.send((torchrun_environment(rank, num_ranks, port), function, args))
        answers = self._collect(num_ranks, timeout)
        failures = [
            f"rank {rank}:\n{_indent(text)}"
            for rank, text in enumerate(_failure(answer) for answer in answers)
            if text is not None
        ]
        if failures:
            output = self._log_tails(num_ranks)
            self.close()
            raise RanksFailed("\n".join([f"{function.__name__} on {num_ranks} ranks", *failures, output]))
        return [answer[1] for answer in answers if answer is not None]

    def close(self) -> None:
        """End every process, whatever it is doing."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + 2
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def _fail_if_dead(self) -> None:
        """Say who died between two jobs: the job at hand fails with that, and the next one starts new processes."""
        dead = [
            f"rank {rank} (exit code {process.exitcode})"
            for rank, process in enumerate(self._processes)
            if not process.is_alive()
        ]
        if dead:
            output = self._log_tails(self.size)
            self.close()
            raise RanksFailed("\n".join([f"died since the last job: {', '.join(dead)}", output]))

    def _start(self) -> None:
        # Not forked from this process, whose threads would be in an undefined state there. Not daemonic: saving a
        # distributed checkpoint starts a process of its own.
        context: Any = multiprocessing.get_context("spawn" if self.ancestor is None else "forkserver")
        with contextlib.nullcontext() if self.ancestor is None else _forking_from(self.ancestor):
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                arguments = (theirs, str(self._log(rank)), sys.path)
                process = context.Process(target=_serve, args=arguments, daemon=False)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)

    def _collect(self, num_ranks: int, timeout: float) -> list[tuple[bool, Any] | None]:
        answers: list[tuple[bool, Any] | None] = [None] * num_ranks
        deadline = time.monotonic() + timeout
        while None in answers and (left := deadline - time.monotonic()) > 0:
            open_pipes = [pipe for pipe, answer in zip(self._pipes, answers) if answer is None]
            for pipe in wait(open_pipes, timeout=left):
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    self._processes[rank].join(1)
                    answers[rank] = (False, f"the process died with exit code {self._processes[rank].exitcode}")
                if not answers[rank][0]:  # type: ignore[index]
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank{rank}.log"

    def _log_tails(self, num_ranks: int) -> str:
        logs = ((rank, self._log(rank)) for rank in range(num_ranks))
        tails = ((rank, log.read_text(errors="replace")[-2000:].strip()) for rank, log in logs if log.exists())
        return "\n".join(f"output of rank {rank}:\n{_indent(tail)}" for rank, tail in tails if tail)


@functools.cache
def _server(ancestor: str) -> forkserver.ForkServer:
    """The process that has imported ``ancestor``; it ends with this one."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload([ancestor])
    given = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    kept = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        server.ensure_running()
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return server


@contextlib.contextmanager
def _forking_from(ancestor: str) -> Iterator[None]:
    """``multiprocessing`` has one server for all; ranks with and without Transformer Engine need others."""
    kept = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = _server(ancestor).connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = kept


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank of a one-node launch."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _serve(pipe: Connection, log: str, path: Sequence[str]) -> None:
    """Answer jobs until the other end closes."""
    sys.path[:] = path
    os.environ["OMP_NUM_THREADS"] = "1"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    while True:
        try:
            environment, function, args = pipe.recv()
        except EOFError:
            return
        except Exception:  # the job cannot be unpickled, say because its module does not import
            pipe.send((False, traceback.format_exc()))
            continue
        os.environ.update(environment)
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        # Models and process groups refer to each other in circles, some through graphs that a collection does not see
        # before another has freed what held them: uncollected, each job leaves hundreds of threads.
        while gc.collect():
            pass
        gc.freeze()  # what is left is modules, which the next collections need not go through again
        if answer[0] and (left := group_threads()):
            answer = (False, f"{function.__name__} left {left} threads of process groups: something still holds these")
        sys.stdout.flush()
        with contextlib.suppress(BrokenPipeError):  # given up on, and about to be killed
            pipe.send(answer)


def group_threads() -> int:
    """Threads of this process that serve process groups and their stores; a group has them as long as it lives."""
    names = (path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
    return sum(name.startswith(("pt_gloo", "pt_tcpstore")) for name in names)


def _failure(answer: tuple[bool, Any] | None) -> str | None:
    if answer is None:
        return "no answer: it was still running when time was up, or another rank had failed"
    return None if answer[0] else str(answer[1])


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.rstrip().splitlines())
