"""Batches of a data set's examples, fetched in this process or in workers."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple, Never

import torch
from torch._C import _error_if_any_worker_fails, _remove_worker_pids, _set_worker_pids
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from fnrun.core.counts import count
from fnrun.core.examples import attach_count
from fnrun.core.key import Key
from fnrun.core.position import Cursor
from fnrun.core.waiting import Interrupted, asked
from fnrun.core.words import unknown
from fnrun.data import ambient
from fnrun.data.arrays import Order, check_seed, cut, passes
from fnrun.data.content import fingerprint
from fnrun.data.stream import Stream, walk


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Loader(Stream):
    """See `loader`."""

    dataset: Any
    rows: int
    batch_size: int
    shuffle: bool
    drop_last: bool
    workers: int
    collate: Callable[[list[Any]], Any]
    name: str | None
    timeout: float | None = None
    seed: int | None = None

    def brief(self) -> str:
        return f"{type(self.dataset).__name__} of {self.rows} examples, {cut(self.batch_size, self.shuffle, self.drop_last, self.seed)}"

    @cached_property
    def content(self) -> Any:
        return fingerprint(self.dataset)

    def __len__(self) -> int:
        return passes(self.rows, self.batch_size, self.drop_last)

    def iterate(self, key: Key, cursor: Cursor, *, replay: bool = False) -> Iterator[tuple[Any, Cursor]]:
        fetch = _Fetch(self.dataset, self.collate, key)
        asks, source = _Asks(self, key, cursor, replay), self.source
        made = _in_workers(fetch, asks, self.workers, self.timeout) if self.workers else map(fetch.__getitem__, asks)
        try:
            for batch, (_, at, after) in zip(made, walk(cursor, len(self), replay), strict=True):
                examples = min(self.batch_size, self.rows - at * self.batch_size)
                yield attach_count(batch, examples, columns=self.collate is default_collate), Cursor(*after, source)
        finally:
            getattr(made, "close", lambda: None)()


#: The equivalents of arguments of torch's `DataLoader`.
OURS = {
    "num_workers": "it is workers= here",
    "collate_fn": "it is collate= here",
    "generator": "the order comes of the state's key, with seed= of that alone",
    "worker_init_fn": "the generators in a worker are seeded for each example; "
    "what else a worker needs is made in the data set's __getitem__",
    "pin_memory": "stream.to(device) copies from pinned memory, one batch ahead",
    "persistent_workers": "workers live as long as the iteration, across passes",
    "prefetch_factor": "each worker is two batches ahead",
    "sampler": "give a data set in the order of the sampler, torch.utils.data.Subset(dataset, indices), "
    "or data.stateful a loader that has one",
    "batch_sampler": "data.stateful takes a loader that has one, and that says where it stands (torchdata's StatefulDataLoader)",
}


def loader(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool = False,
    drop_last: bool = False,
    workers: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    timeout: float | None = None,
    name: str | None = None,
    seed: int | None = None,
    **others: Never,
) -> Loader:
    """The stream of a map-style `torch.utils.data.Dataset`, or of anything with `len()` and `[index]`.

    Random numbers are the same with any number of workers, and after a resume: torch's, Python's and NumPy's ambient generators are seeded
    for each example from the key, the epoch and the example's position in the pass, and for `collate` from the batch's position. In this
    process the generators are restored. A data set with `__getitems__` fetches whole batches, and is seeded once for each. `dataset[index]`
    must not depend on earlier calls: an example may be fetched twice.

    - `batch_size`: examples in a batch, at least 1. A larger one than the data set makes one short batch; with `drop_last` it is an error.
    - `shuffle=False`: a new order for each pass, drawn from the state's key.
    - `drop_last=False`: omit a short last batch of a pass.
    - `workers=0`: processes that fetch; 0 fetches in this one.
    - `collate=None`: makes a batch of a list of examples; None is torch's default. The batch counts the examples of the list, whatever its
      lengths. If `collate` drops some, or an example is a whole batch, the steps need `examples=`.
    - `timeout=None`: seconds to wait for a worker's batch before a TimeoutError; None waits for ever. An interrupt ends the wait at once.
    - `name=None`: the stream's name in messages.
    - `seed=None`: with `shuffle`, the order depends on this number alone, so that runs with other seeds have the same order. Random
      numbers in the examples still depend on the state's key.

    Workers:

    - A batch is in shared memory, and keeps a file open as long as it, or a view of it, is alive: keep `tensor.clone()`.
    - They live as long as the iteration, across passes, and leave Ctrl-C and signals to the process group to the parent.
    - An exception in the data set has its traceback, and a note that names the example. The death of a worker is a RuntimeError with its
      cause.

    `fingerprint`, an attribute or a method of the data set, identifies its content in the stream's source.

    Raises ValueError for an empty data set, a batch size below 1, a negative number of workers, a seed without `shuffle`, and a timeout
    that is not above 0 or without workers; TypeError for an iterable-style data set.

    >>> stream = loader(torch.utils.data.TensorDataset(torch.arange(5)), 2)
    >>> next(stream.iterate(Key(0), Cursor(batch=1)))[0]
    [tensor([2, 3])]
    """
    if others:
        raise unknown("data.loader", others, OURS)
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"{type(dataset).__name__} has no len() or no [index]; if it has state_dict() and load_state_dict(), use data.stateful"
        )
    batch_size, workers = count("batch_size", batch_size), count("workers", workers, 0)
    if timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ValueError(f"timeout is a number of seconds above 0, not {timeout!r}; None waits for ever")
        if not workers:
            raise ValueError("timeout= is for workers: a data set that hangs in this process cannot be left alone; give workers=1 or more")
    check_seed("data.loader", seed, shuffle)
    passes(len(dataset), batch_size, drop_last)
    return Loader(dataset, len(dataset), batch_size, shuffle, drop_last, workers, collate or default_collate, name, timeout, seed)


class _Ask(NamedTuple):
    """One batch to fetch: its place, the position of its first example in the pass, and the indices of its examples."""

    epoch: int
    batch: int
    position: int
    indices: list[int]


@dataclasses.dataclass(frozen=True)
class _Asks:
    """The batches to fetch from a cursor on."""

    stream: Loader
    key: Key
    cursor: Cursor
    replay: bool

    def __iter__(self) -> Iterator[_Ask]:
        stream = self.stream
        order = Order(self.key, stream.rows, stream.batch_size, stream.shuffle, stream.seed)
        for epoch, batch, _ in walk(self.cursor, len(stream), self.replay):
            order.fill(epoch, batch)
            yield _Ask(epoch, batch, batch * stream.batch_size, order.block[order.within(batch)].tolist())


class _Fetch:
    """`fetch[ask]` is the batch, a function of the key and the ask; the ambient generators are restored.

    For the first batch all generators are seeded for each example, later only those that were drawn from. If another one moves, the batch
    is fetched again with that one seeded too. The result is always that of seeding all.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], key: Key) -> None:
        self.dataset, self.collate, self.key = dataset, collate, key
        self.whole = _fetches_batches(dataset)
        self.drawn: list[ambient.Generator] | None = None  # unknown before the first batch
        for generator in ambient.generators():
            generator.save()  # the first call of NumPy's takes milliseconds: here, not in each worker

    def __getitem__(self, ask: _Ask) -> Any:
        saved = [(generator, generator.save()) for generator in ambient.generators()]
        drawn = self.drawn
        while True:
            moved = []
            try:
                batch = self._first(ask) if drawn is None else self._batch(ask, _seeding(drawn))
            finally:
                for generator, state in saved:
                    if generator.moved(state):
                        generator.restore(state)
                        moved.append(generator)
            if drawn is None or all(generator in drawn for generator in moved):
                return batch
            drawn = self.drawn = [*drawn, *(generator for generator in moved if generator not in drawn)]

    def _first(self, ask: _Ask) -> Any:
        drawn: list[ambient.Generator] = []
        marks: list[tuple[ambient.Generator, Any]] = []

        def look() -> None:
            drawn.extend(generator for generator, mark in marks if generator not in drawn and generator.moved(mark))

        def seed(key: Key) -> None:
            look()
            for generator in ambient.generators():
                generator.seed(key)
            marks[:] = [(generator, generator.mark()) for generator in ambient.generators()]

        batch = self._batch(ask, seed)
        look()
        self.drawn = drawn
        return batch

    def _batch(self, ask: _Ask, seed: Callable[[Key], None] | None) -> Any:
        """The batch; `seed` is called before each example, and before `collate`."""
        of_pass = self.key.fold_in(ask.epoch) if seed is not None else self.key
        what = "the examples"
        try:
            if self.whole:
                if seed is not None:
                    seed(of_pass.fold_in("examples", ask.batch))
                examples = self.dataset.__getitems__(ask.indices)
            else:
                examples = self._one_by_one(ask, of_pass, seed)
            what = "collating the examples"
            if seed is not None:
                seed(of_pass.fold_in("collate", ask.batch))
            return self.collate(examples)
        except Exception as error:
            _note(error, f"{what} {ask.indices} (batch {ask.batch} of epoch {ask.epoch})")
            if isinstance(error, StopIteration):  # it would silently end the iteration
                raise RuntimeError("the data set raised StopIteration") from error
            raise

    def _one_by_one(self, ask: _Ask, of_pass: Key, seed: Callable[[Key], None] | None) -> list[Any]:
        dataset, examples = self.dataset, []
        of_example = of_pass.fold_in("example") if seed is not None else of_pass
        try:
            for index in ask.indices:
                if seed is not None:
                    seed(of_example.fold_in(ask.position + len(examples)))
                examples.append(dataset[index])
        except Exception as error:
            at = len(examples)
            _note(error, f"example {ask.indices[at]} (position {ask.position + at} of epoch {ask.epoch})")
            raise
        return examples


def _seeding(generators: Sequence[ambient.Generator]) -> Callable[[Key], None] | None:
    if not generators:
        return None
    if len(generators) == 1:
        return generators[0].seed

    def seed(key: Key) -> None:
        for generator in generators:
            generator.seed(key)

    return seed


def _note(error: Exception, what: str) -> None:
    begin = "raised in the data set, for "
    if not any(note.startswith(begin) for note in getattr(error, "__notes__", ())):
        error.add_note(begin + what)


def _fetches_batches(dataset: Any) -> bool:
    """Whether `dataset` fetches whole batches. A `Subset` always has the method; it counts if the data set below has it."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return bool(getattr(dataset, "__getitems__", None))


# --- workers -----------------------------------------------------------------------------------------------------------

#: Signals for the parent alone: a terminal or a scheduler sends them to all processes of a job.
PARENTS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU}
#: Seconds between two checks for interrupts and dead workers while a batch is waited for.
SLICE = 0.2
#: Seconds for a worker to end, for its death to show, and for the signal that ended it to arrive here.
SETTLES = 1.0


class WorkerDied(RuntimeError):
    """A data worker has died."""


def _in_workers(fetch: _Fetch, asks: _Asks, workers: int, timeout: float | None) -> Iterator[Any]:
    live = _started(fetch, asks, workers)
    waiting = live._get_data = _Waiting(live, timeout)
    try:
        while True:
            waiting.begin()
            yield next(live)
    except (WorkerDied, TimeoutError, Interrupted):
        _kill(live._workers)
        raise
    finally:
        _ask_to_end(live)
        live._shutdown_workers()


def _ask_to_end(live: Any) -> None:
    """End the workers within SETTLES seconds; torch would wait 5 seconds for each that hangs, one after the other."""
    lock = live._workers_done_event._cond
    if lock.acquire(timeout=SETTLES):
        lock.release()
        live._workers_done_event.set()
    else:  # a worker that was killed while it read the event holds its lock for ever
        _kill(live._workers)
        live._workers_done_event = threading.Event()
    for queue in live._index_queues:
        queue.put(None)
    end = time.monotonic() + SETTLES
    for worker in live._workers:
        worker.join(max(0.0, end - time.monotonic()))
    _kill(live._workers)


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


class _Waiting:
    """The wait of a loader's iterator for a batch.

    torch's handler of SIGCHLD raises wherever the main thread is: in a hook, in a save, or with a lock during a fork. Here it is on only
    during a wait.
    """

    def __init__(self, live: Any, timeout: float | None) -> None:
        self.live, self.timeout = live, timeout
        self.pids = tuple(worker.pid for worker in live._workers) if threading.current_thread() is threading.main_thread() else ()
        self.begin()

    def begin(self) -> None:
        """Start the time of a wait."""
        self.began = time.monotonic()

    def __call__(self) -> Any:
        while True:
            try:
                arrived, data = self._arrived()
            except Exception as error:
                if (judged := self._judged(error)) is error:
                    raise
                raise judged from error
            if arrived:
                return data
            self._look()

    def _arrived(self) -> tuple[bool, Any]:
        if not self.pids:
            return self.live._try_get_data(SLICE)
        try:
            _set_worker_pids(id(self.live), self.pids)
            _error_if_any_worker_fails()
            return self.live._try_get_data(SLICE)
        finally:
            _remove_worker_pids(id(self.live))

    def _look(self) -> None:
        if (interrupted := asked()) is not None:
            raise interrupted
        waited = time.monotonic() - self.began
        if self.timeout is not None and waited > self.timeout:
            raise TimeoutError(
                f"data.loader: no batch has come from {len(self.live._workers)} workers in {self.timeout:g} seconds (timeout=): a data set "
                "that hangs, on a disk or a network that does not answer, or one that needs longer for a batch"
            )
        thread = getattr(self.live, "_pin_memory_thread", None)
        if thread is not None and not thread.is_alive():
            raise RuntimeError("torch's thread that copies batches to pinned memory has ended")

    def _judged(self, error: Exception) -> BaseException:
        """The cause of a failed read from the workers: an interrupt, which ended them too, a worker's death, or the error itself."""
        if "Too many open files" in str(error):
            return OSError(
                errno.EMFILE,
                "data.loader: too many open files. Each tensor of a worker's batch holds one open as long as it, or a view of it, is kept. "
                "Keep copies (tensor.clone()), or raise the limit (ulimit -n)",
            )
        with contextlib.suppress(ValueError):  # torch's handler may have raised half-way
            _remove_worker_pids(id(self.live))
        end = time.monotonic() + SETTLES
        while True:
            if (interrupted := asked()) is not None:
                return interrupted
            dead = [worker for worker in self.live._workers if not worker.is_alive()]
            meant = [worker for worker in dead if -(worker.exitcode or 0) in PARENTS]
            if (dead and not meant) or time.monotonic() > end:
                break
            time.sleep(0.02)
        if not dead:
            return error
        ends = ", ".join(f"worker {worker.pid} {_ended(worker.exitcode)}" for worker in dead)
        return WorkerDied(f"data.loader: {ends}, while a batch was waited for")


def _ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exited with code {code}"
    hints = {signal.SIGKILL: " (by a person, or for its memory)", signal.SIGBUS: " (is /dev/shm full?)"}
    return f"was killed by {signal.Signals(-code).name}{hints.get(signal.Signals(-code), '')}"


def _started(fetch: _Fetch, asks: _Asks, workers: int) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork")  # JAX and Python warn of threads, none of which a worker uses
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
        loader = DataLoader(
            fetch,  # pyright: ignore[reportArgumentType]
            sampler=asks,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.accelerator.is_available(),
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),
        )
        _start_servers()
        # Signals wait until the end: a worker must not run the parent's handlers before it has its own, nor the parent torch's handler of
        # SIGCHLD, which raises, during a fork.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {*PARENTS, signal.SIGCHLD})
        try:
            live: Any = iter(loader)
            _remove_worker_pids(id(live))
            live._worker_pids_set = False
            return live
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_servers() -> None:
    """Start the servers of `multiprocessing` before signals are blocked: they would inherit the mask for life.

    A fork server without SIGCHLD does not report the end of a worker.
    """
    method = multiprocessing.get_start_method()
    if method != "fork":
        resource_tracker.ensure_running()
    if method == "forkserver":
        forkserver.ensure_running()


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals(worker: int) -> None:
    """In a worker: leave Ctrl-C and signals to the process group to the parent, which ends its workers, with SIGTERM if it must."""
    for number in PARENTS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler is for other loaders' workers, which are no children of this process
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*PARENTS, signal.SIGCHLD})
