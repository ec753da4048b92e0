"""Loops: a loop is a step over a bigger `x`, so loops nest without limit.

base.py          what all loops have in common
ticking.py       what a kind of loop says of itself: how many ticks it has, and what one is
tick.py          an open loop and its ticks, in phases; unobserved.py: ticks that nobody looks at
data_loops.py    loops over batches: epoch_loop, step_loop, eval_loop, predict_loop; fused.py: several steps at a time
combinators.py   loops whose ticks are rounds and members: repeat, sequence, workflow; and every
contracts.py     what a hook and an observer are, and are able to do
guarded.py       how they are called: generators seeded, what they were given looked at
entry.py         a program called from outside, and its end
program.py       a program at work: the lives of its hooks and observers, where in it a loop is called; streams.py: its data
exits.py         what comes up through all open loops: a stop, an interrupt, a state that does not belong
structure.py     how a program is drawn and counted, and functions that say which loops they call
totals.py        the metrics of a loop's ticks, folded
dry_run.py       every loop for one tick
interrupts.py    what ends a call from outside
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Never

from fnrun.core.counts import count
from fnrun.core.words import kind, unknown
from fnrun.loops.base import AnyHook, Loop
from fnrun.loops.combinators import Every, InOrder, Repeat, Workflow
from fnrun.loops.contracts import Observer
from fnrun.loops.data_loops import EpochLoop, EvalLoop, PredictLoop, StepLoop
from fnrun.loops.fused import FusedStepLoop
from fnrun.loops.structure import AnyStep, Composed, Wrapper, check_step, title


def epoch_loop(step: AnyStep, *, hooks: Sequence[AnyHook] = (), observers: Sequence[Observer] = (), donate: bool = False) -> Loop:
    """`step` over the batches of a stream, from where it stands to the end of its pass.

    The metrics are the folds of its ticks: a plain tensor is a mean, weighted by the batch's number of examples.

    With `donate` each new state is written over the one before: parameters and moments are updated in place, with the same bits and the
    memory of an in-place loop. The caller's state is not touched (the first update copies; `state.donate()` gives it away), and states
    that the program made are dead once the next one is written over them: a hook or an observer that keeps one keeps `snapshot(state)`.

    >>> import torch
    >>> from fnrun import TrainState, step
    >>> @step
    ... def count(state, batch):
    ...     return state, {"mean": batch.mean()}
    >>> state, metrics = epoch_loop(count)(TrainState.create(torch.nn.Linear(1, 1)), [torch.tensor([1.0, 2.0]), torch.tensor([6.0])])
    >>> state.step, metrics["mean"].item()
    (2, 3.0)
    """
    return EpochLoop(step=step, hooks=hooks, observers=observers, donate=donate)


def step_loop(
    step: AnyStep,
    steps: int,
    *,
    until_step: int | None = None,
    hooks: Sequence[AnyHook] = (),
    observers: Sequence[Observer] = (),
    donate: bool = False,
    fused_steps: int = 1,
) -> Loop:
    """`step` over so many batches, going over into the stream's next pass; not beyond `state.step == until_step`.

    `donate` as in `epoch_loop`. With `fused_steps=k` a step of `make_train_step(..., compile=True)` does k steps in one compiled call;
    each draws what it draws by itself. Hooks, observers and interrupts act between the calls. Raises TypeError for another step,
    ValueError for a hook or an observer that would act within one.
    """
    steps = count("steps", steps, 0)
    until = None if until_step is None else count("until_step", until_step, 0)
    if (fused := count("fused_steps", fused_steps)) > 1:
        loop = FusedStepLoop(step=step, steps=steps, until_step=until, hooks=hooks, observers=observers, donate=donate, fused_steps=fused)
    else:
        loop = StepLoop(step=step, steps=steps, until_step=until, hooks=hooks, observers=observers, donate=donate)
    return loop


def eval_loop(eval_step: AnyStep, *, steps: int | None = None, again: bool = False, observers: Sequence[Observer] = ()) -> Loop:
    """`eval_step` (`(state, batch) -> metrics`) over one pass from the beginning: the state as it came, the metrics folded.

    - `steps=n`: n batches, going on through its own stream from call to call.
    - `again=True` too: the first n batches of the stream each time, so that the metrics of two calls compare. Raises ValueError without
      `steps`.
    """
    return EvalLoop(step=eval_step, steps=None if steps is None else count("steps", steps, 0), again=again, observers=observers)


def predict_loop(
    predict_step: AnyStep, *, steps: int | None = None, again: bool = False, observers: Sequence[Observer] = (), keep: bool = True
) -> Loop:
    """`predict_step` (`(state, batch) -> outputs`) over one pass: the state as it came, and a list with each batch's outputs, in order.

    `steps` and `again` are as in `eval_loop`. With `keep=False` the list is empty: for outputs that an observer writes as they come
    (`observers.predictions`).
    """
    taken = None if steps is None else count("steps", steps, 0)
    return PredictLoop(step=predict_step, steps=taken, again=again, observers=observers, keep=keep)


def repeat(
    step: AnyStep,
    times: int | None = None,
    *,
    until: Callable[[Any], bool] | None = None,
    hooks: Sequence[AnyHook] = (),
    observers: Sequence[Observer] = (),
    **others: Never,
) -> Loop:
    """`step` (a loop, as a rule) so many times over the same data, or until `until(state)` holds; the metrics are the last round's.

    `repeat(step, 1)` is `step`. A state saved at the end of a `repeat(step, 10)` and given to `repeat(step, 15)` does five more.
    """
    if others:
        raise unknown("repeat", others, dict.fromkeys(("epochs", "num_epochs", "max_epochs", "n", "rounds"), "it is times= here"))
    check_step("repeat", step, "repeat(step, times): what is repeated comes first")
    if until is not None and not callable(until):
        raise TypeError(f"repeat: until is a function of the state, until=lambda state: state.step >= 100, and not {kind(until)}")
    if times is None and until is None:
        raise ValueError("repeat: say how often (times=) or how long (until=)")
    return Repeat(step=step, times=None if times is None else count("times", times, 0), until=until, hooks=hooks, observers=observers)


def sequence(*, hooks: Sequence[AnyHook] = (), observers: Sequence[Observer] = (), **steps: AnyStep) -> Loop:
    """`steps` one after the other: their names pick the data (`data["train"]`) and prefix the metrics (`train/loss`)."""
    return InOrder(steps=_members(steps), hooks=hooks, observers=observers)


def workflow(
    phases: Sequence[tuple[str, int]], *, times: int, hooks: Sequence[AnyHook] = (), observers: Sequence[Observer] = (), **steps: AnyStep
) -> Loop:
    """mmcv's workflow: each phase so many times in a row, in turn, until the first has run `times` times in all.

    `workflow([("train", 2), ("val", 1)], times=3, train=..., val=...)` runs train, train, val, train, val.
    """
    for phase in phases if isinstance(phases, (list, tuple)) else [phases]:
        if not isinstance(phase, (list, tuple)) or len(phase) != 2:
            raise TypeError(f"workflow: phases are pairs of a member's name and a count, [('train', 2), ('val', 1)]; here is {kind(phase)}")
    unknown = [name for name, _ in phases if name not in steps]
    if not phases or unknown:
        raise ValueError(f"workflow: phases {unknown or 'are missing'}; there are steps for {list(steps)}")
    phases = tuple((name, count(f"the count of {name!r}", n)) for name, n in phases)
    return Workflow(steps=_members(steps), phases=phases, times=count("times", times, 0), hooks=hooks, observers=observers)


def every(n: int | Sequence[tuple[int, int]], step: AnyStep, *, begin: int = 1, last: bool = True) -> AnyStep:
    """`step` on each n-th round of the nearest `repeat`, from round `begin`, and on its last; on other rounds nothing, without metrics.

    `n` may change: `[(0, 5), (20, 1)]` is each 5th, and from round 20 each. Outside a repeat it always works; where the repeat's end is not
    known (`until`) there is no last round.
    """
    check_step("every", step, "every(n, step): the interval comes first")
    pairs = n if isinstance(n, (list, tuple)) else [(0, n)]
    if not pairs or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"every: an interval is at least 1 round, or pairs (round, interval), not {n!r}")
    named = [(count("every: a round", start, 0), count("every: an interval", interval, unit=" round")) for start, interval in pairs]
    return Every(tuple(sorted(named)), step, count("every: begin", begin), last)


def wraps(*loops: Any) -> Callable[[AnyStep], AnyStep]:
    """Say which loops a function of the type of a step calls: `@fnrun.wraps(loop)` above it, or `fnrun.wraps(loop)(function)`.

    A function may wrap loops without a word; then each begins when it is first called. With the word their hooks' memory begins with the
    program and their observers are opened with it, `print(program)` draws them, and their steps are counted. Any callable may say it: a
    `functools.partial`, a method, an object with `__call__`. Raises TypeError for what is no loop.

    >>> import torch
    >>> from fnrun import TrainState, hooks, step
    >>> @step
    ... def count(state, batch):
    ...     return state, {"mean": batch.mean()}
    >>> warm = epoch_loop(count, hooks=[hooks.ema(0.9)])
    >>> @wraps(warm)
    ... def doubled(state, data):
    ...     return warm(state, [2 * batch for batch in data])
    >>> fit = repeat(doubled, 2)
    >>> print(fit)
    repeat 2 times
      doubled
        epoch_loop
          count
          hook ema 0.9
    >>> state, metrics = fit(TrainState.create(torch.nn.Linear(1, 1)), [torch.tensor([1.0, 2.0])])
    >>> state.step, metrics["mean"].item()
    (2, 3.0)
    """
    wrong = [loop for loop in loops if not isinstance(loop, Composed)]
    if wrong or not loops:
        what = f"{title(wrong[0])} is no loop" if wrong else "no loop is given"
        raise TypeError(f"wraps: {what}; it takes the loops that a function calls, @fnrun.wraps(loop). One around a step needs no word")

    def says(fn: AnyStep) -> AnyStep:
        if not callable(fn):
            raise TypeError(f"wraps: it goes above a function of (state, data), and {kind(fn)} is not callable")
        return Wrapper(fn, loops)

    return says


def _members(steps: Mapping[str, AnyStep]) -> dict[str, AnyStep]:
    if not steps:
        raise ValueError("name at least one step: sequence(train=..., val=...)")
    for name, step in steps.items():
        if "/" in name or not name:
            raise ValueError(f"{name!r} is no name for a step: its metrics are named NAME/METRIC, so it has no '/' and is not empty")
        check_step(f"{name}=", step)
    return dict(steps)
