import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate

import fnrun
from fnrun import data
from fnrun.core import waiting
from fnrun.core.key import Key
from fnrun.core.position import Cursor
from tests.data.streams import KEY, same, take, unhurried, untouched
from tests.programs import fresh


class Augmented(Dataset):
    """Draws from the generators in `draws`, for every `rarely`-th example."""

    def __init__(self, rows=10, draws=("torch", "numpy", "python"), rarely=1):
        self.rows, self.draws, self.rarely, self.fetched = rows, draws, rarely, []

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.fetched.append(index)
        example = {"index": index}
        if index % self.rarely == 0:
            if "torch" in self.draws:
                example["torch"] = torch.randn(3)
            if "numpy" in self.draws:
                example["numpy"] = np.random.randn()  # one of two: the other stays in the generator's cache
            if "python" in self.draws:
                example["python"] = random.gauss(0, 1)
        return example


class Pid(Augmented):
    def __getitem__(self, index):
        return os.getpid()


class Whole(Augmented):
    def __getitems__(self, indices):
        noise = torch.rand(())
        return [{"index": i, "noise": noise, "more": np.random.rand()} for i in indices]


def as_is(examples):
    return examples


def mixed(examples):
    return default_collate(examples), np.random.rand(), torch.rand(2)


draws = st.sets(st.sampled_from(["torch", "numpy", "python"]))


@unhurried
@given(st.integers(1, 12), st.integers(1, 5), st.booleans(), st.booleans(), draws, st.integers(1, 5), st.integers(0, 8))
def test_from_any_cursor_comes_the_tail(rows, batch_size, shuffle, drop_last, draws, rarely, at):
    drop_last = drop_last and rows >= batch_size
    stream = data.loader(Augmented(rows, draws, rarely), batch_size, shuffle=shuffle, drop_last=drop_last, collate=as_is)
    everything = take(stream, 13)
    assert same(take(stream, 13 - at - 1, everything[at][1]), everything[at + 1 :])


@pytest.mark.parametrize("dataset", [Augmented(10), Augmented(10, rarely=4), Whole(10)], ids=["augmented", "rarely", "whole"])
def test_the_bits_do_not_depend_on_the_workers(dataset):
    def bits(workers, cursor=None):
        stream = data.loader(dataset, 3, shuffle=True, workers=workers, collate=as_is)
        return take(stream, 9, cursor)

    alone = bits(0)
    assert same(bits(1), alone)
    assert same(bits(3, alone[4][1])[:4], alone[5:])


def test_collation_draws_from_the_key_too():
    alone, helped = (take(data.loader(Augmented(7), 3, workers=workers, collate=mixed), 7) for workers in (0, 2))
    assert same(alone, helped)
    assert len({float(batch[1]) for batch, _ in alone}) == 7


def test_examples_are_seeded_by_their_position_and_collation_by_its_batch():
    """The contract, spelled out: key, epoch, position in the pass."""
    stream = data.loader(Augmented(6), 4, shuffle=True, collate=lambda examples: (examples, np.random.rand()))
    (batch, drawn), _ = take(stream, 1, Cursor(epoch=2, batch=1))[0]
    for position, example in zip((4, 5), batch, strict=True):
        with KEY.fold_in(2, "example", position).scope(host=True):
            assert same(example, Augmented(6)[example["index"]])
    with KEY.fold_in(2, "collate", 1).scope(host=True):
        assert drawn == np.random.rand()


def test_a_normal_number_that_lies_ready_is_not_taken():
    """The second of two is in a cache: a draw would take it without moving the generator's words."""

    class Late(Augmented):
        def __getitem__(self, index):
            return (np.random.randn(), random.gauss(0, 1)) if index == 5 else (0.0, 0.0)

    found = []
    for draw in (False, True):
        np.random.seed(1)
        random.seed(1)
        if draw:
            np.random.randn()
            random.gauss(0, 1)
        with untouched():
            found.append(take(data.loader(Late(6), 2, collate=as_is), 3))
    assert same(*found)


@settings(max_examples=30, deadline=None)
@given(draws, st.integers(1, 4), st.booleans())
def test_global_generators_are_never_moved(draws, rarely, cached):
    np.random.seed(1)
    random.seed(1)
    if cached:  # a second normal number lies ready in the caller's generators
        np.random.randn()
        random.gauss(0, 1)
    with untouched():
        take(data.loader(Augmented(9, draws, rarely), 2, collate=as_is), 12)


def test_global_generators_are_never_moved_by_workers():
    with untouched():
        take(data.loader(Augmented(4), 2, workers=1), 3)


def test_nothing_is_fetched_twice_or_thrown_away():
    dataset = Augmented(100)
    take(data.loader(dataset, 2, collate=as_is), 3, Cursor(epoch=1, batch=40))
    assert dataset.fetched == [80, 81, 82, 83, 84, 85]


def test_a_pass_has_every_example_once_and_replays():
    stream = data.loader(TensorDataset(torch.arange(7)), 3, shuffle=True)
    assert len(stream) == 3
    batches = take(stream, 6, Cursor(epoch=1), replay=True)
    assert sorted(torch.cat([batch[0] for batch, _ in batches[:3]]).tolist()) == list(range(7))
    assert same(batches[:3], batches[3:])


def test_workers_live_across_passes():
    stream = data.loader(Pid(2), 2, workers=1)
    pids = {int(pid) for batch, _ in take(stream, 5, replay=True) for pid in batch}
    assert len(pids) == 1
    assert os.getpid() not in pids


def test_a_subset_is_seeded_example_by_example():
    stream = data.loader(Subset(Augmented(10), [7, 8, 9]), 3, collate=as_is)
    batch, _ = take(stream, 1)[0]
    assert len({example["numpy"] for example in batch}) == 3
    with KEY.fold_in(0, "example", 0).scope(host=True):
        assert same(batch[0], Augmented(10)[7])


class Failing(Augmented):
    def __init__(self, error):
        super().__init__(6)
        self.error = error

    def __getitem__(self, index):
        if index == 4:
            raise self.error
        return index


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [IndexError("beyond"), StopIteration("over"), OSError("unreadable")], ids=lambda e: type(e).__name__)
def test_an_error_in_the_data_set_arrives_with_its_place(workers, error):
    iterator = data.loader(Failing(error), 3, workers=workers).iterate(KEY, Cursor())
    assert next(iterator)[0].tolist() == [0, 1, 2]
    with pytest.raises((IndexError, OSError, RuntimeError)) as caught:
        next(iterator)
    text = str(caught.getrepr(style="short")) + str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    cause = caught.value.__cause__
    text += "".join(getattr(cause, "__notes__", [])) + repr(cause)
    assert "for example 4 (position 4 of epoch 0)" in text
    assert "raise self.error" in text
    assert str(error) in text


def test_an_error_in_collate_names_the_batch():
    def broken(examples):
        raise TypeError("cannot stack")

    with pytest.raises(TypeError, match="cannot stack") as caught:
        take(data.loader(Augmented(6), 3, collate=broken), 1)
    assert "collating the examples [0, 1, 2] (batch 0 of epoch 0)" in caught.value.__notes__[0]


def test_a_killed_worker_is_an_error():
    class Deadly(Augmented):
        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"worker .*(killed|exited)"):
        take(data.loader(Deadly(4), 2, workers=1), 1)


def counted(state, batch):
    return state.replace(step=state.step + 1), {}


def dead(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_workers_death_is_told_where_a_batch_is_waited_for_and_nowhere_else():
    """An exception that a signal's handler raises comes anywhere: in a save, or with a lock held where another loader forks."""
    iterator = data.loader(Pid(50), 2, workers=1).iterate(KEY, Cursor())
    pid = int(next(iterator)[0][0])
    dead(pid)
    take(data.loader(Augmented(4), 2, workers=1), 2)
    with pytest.raises(RuntimeError, match=rf"worker {pid} was killed by SIGKILL"):
        next(iterator)


@pytest.mark.parametrize("text", ["SIGTERM", None])
def test_a_worker_that_an_interrupt_ended_is_no_error(text):
    """It is asked before a death is told, and a while after."""
    iterator = data.loader(Pid(50), 2, workers=1).iterate(KEY, Cursor())
    pid = int(next(iterator)[0][0])
    os.kill(pid, signal.SIGTERM)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    token = waiting.interrupts.set((lambda: text,))
    try:
        with pytest.raises(waiting.Interrupted if text else RuntimeError, match="SIGTERM"):
            next(iterator)
    finally:
        waiting.interrupts.reset(token)


def test_a_worker_that_died_with_a_lock_held_keeps_nobody_waiting(monkeypatch):
    """Workers look at an event that is behind a lock, and may be killed at any moment."""
    made, module = [], sys.modules["fnrun.data.loader"]
    started = module._started
    monkeypatch.setattr(module, "_started", lambda *args: made.append(started(*args)) or made[-1])
    iterator = data.loader(Pid(50), 2, workers=1).iterate(KEY, Cursor())
    pid = int(next(iterator)[0][0])
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    made[0]._workers_done_event._cond.acquire()  # as it would have been
    closing = threading.Thread(target=iterator.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()


class Hanging(Augmented):
    """Reads from something that never answers, from an example on."""

    def __init__(self, at):
        super().__init__(10)
        self.at, (self.end, _) = at, os.pipe()

    def __getitem__(self, index):
        return index if index < self.at else os.read(self.end, 1)


def test_a_batch_that_does_not_come_in_time_is_an_error():
    iterator = data.loader(Hanging(4), 2, workers=2, timeout=0.5).iterate(KEY, Cursor())
    assert [next(iterator)[0].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(TimeoutError, match=r"no batch has come from 2 workers in 0\.5 seconds"):
        next(iterator)
    assert multiprocessing.active_children() == []


def test_an_interrupt_ends_the_wait_for_a_batch_and_the_state_goes_on():
    """Also of one that is asked only there: a deadline."""
    stream, program = data.loader(Hanging(6), 2, workers=1), fnrun.epoch_loop(counted)
    asked = itertools.count()
    state, _ = program(fresh(), stream, interrupt=lambda: "enough" if next(asked) > 10 else None)
    assert (state.step, state.position.streams["data"].batch) == (3, 3)


class Signals(Dataset):
    """Sends itself what a terminal sends, and tells how it stands."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGINT)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        own = [
            signal.getsignal(s) == default
            for s, default in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGUSR1, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL))
        ]
        return os.getpgid(0) == os.getpid(), not blocked & {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}, *own


def test_workers_leave_signals_to_the_parent():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        batch, _ = take(data.loader(Signals(), 2, workers=1), 1)[0]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert all(bool(flag.all()) for flag in batch)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def test_closing_ends_the_workers():
    iterator = data.loader(Pid(50), 2, workers=2).iterate(KEY, Cursor())
    pids = {int(next(iterator)[0][0]) for _ in range(4)}
    iterator.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_start_and_end_by_every_start_method_and_leave_later_processes_their_signals(method):
    """A process of its own: the start method is the whole process's."""
    code = f"""
import multiprocessing, signal, torch
from fnrun import Cursor, Key, data
multiprocessing.set_start_method({method!r})
stream = data.loader(torch.utils.data.TensorDataset(torch.arange(4)), 2, workers=1)
batches = stream.iterate(Key(0), Cursor())
assert [next(batches)[0][0].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
batches.close()
with multiprocessing.Pool(1) as pool:
    blocked = pool.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, []))
assert not blocked and not signal.pthread_sigmask(signal.SIG_BLOCK, []), blocked
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (Augmented(0), {}, ValueError, "empty"),
        (Augmented(3), {"batch_size": 0}, ValueError, "at least 1, not 0"),
        (Augmented(3), {"batch_size": 4, "drop_last": True}, ValueError, "3 rows are fewer than batch_size=4"),
        (Augmented(3), {"workers": -1}, ValueError, "workers is at least 0, not -1"),
        (Augmented(3), {"workers": 1, "timeout": 0}, ValueError, "timeout is a number of seconds above 0, not 0"),
        (Augmented(3), {"workers": 1, "timeout": float("nan")}, ValueError, "timeout is a number of seconds above 0, not nan"),
        (Augmented(3), {"workers": 1, "timeout": "60"}, ValueError, "timeout is a number of seconds above 0, not '60'"),
        (Augmented(3), {"timeout": 60}, ValueError, "timeout= is for workers"),
        (Endless(), {}, TypeError, r"use data\.stateful"),
        (iter([]), {}, TypeError, r"no len\(\)"),
    ],
)
def test_what_cannot_be_loaded_is_refused(dataset, options, error, message):
    with pytest.raises(error, match=message):
        data.loader(dataset, **{"batch_size": 2, **options})


def test_the_source_says_what_the_batches_are_made_of():
    dataset = Augmented(10)
    assert data.loader(dataset, 4, shuffle=True).source == "Augmented of 10 examples, 4 a batch, shuffled"
    assert data.loader(dataset, 4, shuffle=True, workers=3).source == data.loader(dataset, 4, shuffle=True).source
    dataset.fingerprint = "abc"
    assert (
        data.loader(dataset, 4, drop_last=True).source
        == "Augmented of 10 examples, 4 a batch, in order, short last batch dropped, content abc"
    )


def test_keys_differ():
    stream = data.loader(Augmented(4), 4, collate=as_is)
    assert not same(take(stream, 1, key=Key(1)), take(stream, 1, key=Key(2)))


def test_what_is_kept_of_a_workers_batch():
    """In a process that may open few files: predictions and metrics have copies, and whoever keeps batches is told of it."""
    code = """
import resource, numpy as np, torch, fnrun
from fnrun import data, metrics
resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120))
state = fnrun.TrainState({}, {}, None, fnrun.Key(0))
stream = data.loader(torch.utils.data.TensorDataset(torch.arange(1.0, 401)), 2, workers=1)

def predict(state, batch):
    (x,) = batch
    return {"row": x, "views": (x[:1], [x.view(2, 1)]), "array": x.numpy()[1:], "sparse": x.to_sparse(), "parameter": torch.nn.Parameter(x)}

_, outputs = fnrun.predict_loop(predict)(state, stream)
for name in ("row", "parameter"):
    assert torch.cat([output[name] for output in outputs]).tolist() == list(range(1, 401))
assert torch.cat([output["sparse"].to_dense() for output in outputs]).tolist() == list(range(1, 401))
assert np.concatenate([output["array"] for output in outputs]).tolist() == list(range(2, 401, 2))

_, found = fnrun.eval_loop(lambda state, batch: {"rows": metrics.collect(batch[0]), "last": metrics.last(batch[0]), "mean": batch[0][0]})(state, stream)
assert found["rows"].tolist() == list(range(1, 401))

try:
    kept = [batch for batch, _ in stream.iterate(fnrun.Key(0), fnrun.Cursor())]
except OSError as error:
    assert "Keep copies (tensor.clone())" in str(error), error
else:
    raise AssertionError("the batches are endless")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
