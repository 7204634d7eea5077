"""Processes that compile side by side and are timed one at a time.

Each job runs in a process of its own. Compilation takes minutes and mostly CPU, timing takes
seconds and must have the card to itself. So the processes run together until one asks for its turn;
then all others are stopped (SIGSTOP) until it gives the turn back. A process that crashes or hangs
costs its own remaining figures and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

Interval = tuple[float, float]
Record = dict[str, Any]

_TURN_LIMIT_S = 75.0
# Work that a stopped process has put into the GPU's queue still runs: a forward pass at most.
_SETTLE_S = 0.6
_OUT_OF_TIME = "out of time"


class Turn:
    """A worker's end of the link to the scheduler: figures go out, turns come in."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._held = False

    def take(self) -> None:
        """Wait until all other workers are stopped; return at once where they are."""
        if self._held:
            return
        self._link.send(("turn", {}))
        self._link.recv()
        self._held = True

    def give_back(self) -> None:
        """Let the others go on, if the turn is held."""
        if self._held:
            self._held = False
            self._link.send(("release", {}))

    def report(self, **figures: Any) -> None:
        """Add figures to the job's record; those sent survive a crash."""
        self._link.send(("figures", figures))

    def report_span(self, name: str, start: float, end: float) -> None:
        """Add a duration, from two readings of `time.monotonic`; pauses will be taken out of it."""
        self._link.send(("span", {"name": name, "start": start, "end": end}))


@dataclass(frozen=True)
class Task:
    """A job for the scheduler: `work(turn, *args)` is called in a process with `env` set.

    `known` is what its record says from the start.
    """

    name: str
    work: Callable[..., None]
    args: tuple[Any, ...]
    limit_s: float
    gib: float
    env: Mapping[str, str] = field(default_factory=dict)
    known: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Worker:
    task: Task
    process: BaseProcess
    link: Connection
    record: Record
    started: float
    was_alone: bool
    idle: list[Interval] = field(default_factory=list)
    idle_since: float | None = None

    def pause(self) -> None:
        _signal(self.process, signal.SIGSTOP)
        self.wait_begins()

    def resume(self, is_waiting: bool) -> None:
        _signal(self.process, signal.SIGCONT)
        if not is_waiting:
            self.wait_ends()

    def wait_begins(self) -> None:
        if self.idle_since is None:
            self.idle_since = time.monotonic()

    def wait_ends(self) -> None:
        if self.idle_since is not None:
            self.idle.append((self.idle_since, time.monotonic()))
            self.idle_since = None

    def busy_s(self, start: float, end: float) -> float:
        """Seconds between two times without pauses and waiting."""
        open_one = [] if self.idle_since is None else [(self.idle_since, time.monotonic())]
        return end - start - overlap([*self.idle, *open_one], start, end)


def overlap(intervals: list[Interval], start: float, end: float) -> float:
    """Seconds of [start, end] that lie in `intervals`, which do not overlap each other."""
    return sum(max(0.0, min(end, stop) - max(start, begin)) for begin, stop in intervals)


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, number)


def _enter(work: Callable[..., None], link: Connection, args: tuple[Any, ...]) -> None:
    turn = Turn(link)
    try:
        work(turn, *args)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        turn.report(note=f"{type(error).__name__}: {lines[0][:200]}")
        raise
    finally:
        turn.give_back()


class Scheduler:
    """Runs tasks within limits of time, memory and processes, and calls `save` on every change.

    Args:
        tasks: in the order in which they start; one that does not fit into memory lets later ones
            go first.
        save: is given the records of all tasks, each a dict with what its worker reported, and a
            `note` where something went wrong.
        deadline: `time.monotonic()` after which nothing goes on.
        processes: how many run at once.
        gib: what the memory of tasks at work may add up to.
    """

    def __init__(
        self,
        tasks: list[Task],
        save: Callable[[list[Record]], None],
        *,
        deadline: float,
        processes: int,
        gib: float,
    ) -> None:
        self._queue = list(tasks)
        self._save = save
        self._deadline = deadline
        self._processes = processes
        self._gib = gib
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._asking: list[_Worker] = []
        self._holder: _Worker | None = None
        self._granted = 0.0
        self._retried: set[str] = set()
        self.records: dict[str, Record] = {task.name: dict(task.known) for task in tasks}

    def run(self) -> list[Record]:
        """Run all tasks; return the records, in the order of the tasks."""
        try:
            while (self._queue or self._workers) and time.monotonic() < self._deadline:
                self._start_what_fits()
                self._listen()
                self._end_overdue()
                self._grant()
        finally:
            self._end_all()
        self._save(list(self.records.values()))
        return list(self.records.values())

    def _start_what_fits(self) -> None:
        # A process that starts during a turn would disturb it.
        while self._holder is None and len(self._workers) < self._processes:
            used = sum(worker.task.gib for worker in self._workers)
            fitting = (t for t in self._queue if not self._workers or used + t.gib <= self._gib)
            task = next(fitting, None)
            if task is None:
                return
            self._queue.remove(task)
            self._start(task)

    def _start(self, task: Task) -> None:
        os.environ.update(task.env)  # the new process inherits it
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=_enter, args=(task.work, theirs, task.args))
        process.start()
        theirs.close()
        record = self.records[task.name]
        alone = not self._workers
        self._workers.append(_Worker(task, process, mine, record, time.monotonic(), alone))

    def _listen(self) -> None:
        ready = wait([worker.link for worker in self._workers], timeout=0.5)
        for worker in [one for one in self._workers if one.link in ready]:
            try:
                kind, content = worker.link.recv()
            except (EOFError, OSError):
                self._ended(worker)
                continue
            self._handle(worker, kind, content)

    def _handle(self, worker: _Worker, kind: str, content: Record) -> None:
        if kind == "turn":
            worker.wait_begins()
            self._asking.append(worker)
        elif kind == "release":
            self._take_back(worker)
        elif kind == "span":
            seconds = worker.busy_s(content["start"], content["end"])
            worker.record[content["name"]] = seconds
        else:
            worker.record.update(content)
        if kind in ("span", "figures"):
            self._save(list(self.records.values()))

    def _grant(self) -> None:
        if self._holder is not None or not self._asking:
            return
        chosen = self._asking.pop(0)
        for other in self._workers:
            if other is not chosen:
                other.pause()
        time.sleep(_SETTLE_S)
        chosen.wait_ends()
        self._holder, self._granted = chosen, time.monotonic()
        try:
            chosen.link.send("go")
        except OSError:
            self._ended(chosen)

    def _take_back(self, worker: _Worker) -> None:
        if self._holder is not worker:
            return
        self._holder = None
        for other in self._workers:
            if other is not worker:
                other.resume(is_waiting=other in self._asking)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            busy = worker.busy_s(worker.started, now)
            if busy > worker.task.limit_s:
                self._end(worker, f"stopped after {busy:.0f} s")
            elif worker is self._holder and now - self._granted > _TURN_LIMIT_S:
                self._end(worker, f"stopped after {_TURN_LIMIT_S:.0f} s of its turn")

    def _end(self, worker: _Worker, note: str) -> None:
        worker.record["note"] = note
        worker.process.kill()
        self._ended(worker)

    def _ended(self, worker: _Worker) -> None:
        worker.process.join()
        worker.link.close()
        worker.record["seconds"] = worker.busy_s(worker.started, time.monotonic())
        if worker.process.exitcode and not worker.record.get("note"):
            worker.record["note"] = f"exit code {worker.process.exitcode}"
        print(f"{worker.task.name}: {worker.record.get('note') or 'done'}, "
              f"{worker.record['seconds']:.0f} s at work", flush=True)  # fmt: skip
        self._workers.remove(worker)
        if worker in self._asking:
            self._asking.remove(worker)
        self._take_back(worker)
        self._retry(worker)
        self._save(list(self.records.values()))

    def _retry(self, worker: _Worker) -> None:
        """Give a task that ran out of memory beside others a second chance, alone."""
        name, note = worker.task.name, worker.record.get("note", "")
        if "out of memory" not in note.lower() or worker.was_alone or name in self._retried:
            return
        self._retried.add(name)
        worker.record.pop("note")
        self._queue.append(replace(worker.task, gib=self._gib))

    def _end_all(self) -> None:
        for task in self._queue:
            self.records[task.name]["note"] = f"not run: {_OUT_OF_TIME}"
        self._queue.clear()
        for worker in list(self._workers):
            self._end(worker, f"stopped: {_OUT_OF_TIME}")
