"""A program, whole: a loop called from outside, and the loops that stand in it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from fnrun.core.context import OUTSIDE, loop_context, tick_listener
from fnrun.core.donation import Owner, deleted_reason, owner_of
from fnrun.core.position import Position
from fnrun.core.state import S
from fnrun.core.undisturbed import restoring
from fnrun.core.waiting import Interrupted, interrupts
from fnrun.core.words import kind
from fnrun.loops.exits import ProgramExit
from fnrun.loops.program import LoopContext, Program
from fnrun.loops.structure import Composed, donates, loops_of, opaque_steps
from fnrun.optim.wrappers import waiting
from fnrun.steps import PureStep

logger = logging.getLogger("fnrun")


def outermost(loop: Any, state: S, data: Any, interrupt: Callable[[], str | None] | None) -> tuple[S, Any]:
    if interrupt is not None and not callable(interrupt):
        raise TypeError(
            f"interrupt= takes a function that returns None or a text, such as fnrun.deadline(hours=1), and not {kind(interrupt)}"
        )
    program = Program(loop, state, interrupt)
    loops = loops_of(loop)
    given = owner_of(state) if donates(loop) else None
    with restoring(), given or nullcontext():
        return _through(loop, loops, program, state, data, given)


def _through(loop: Any, loops: list[Any], program: Program, state: Any, data: Any, owner: Owner | None) -> tuple[Any, Any]:
    token = loop_context.set(OUTSIDE)
    asking = interrupts.set((*interrupts.get(), program.interrupt) if program.interrupt is not None else interrupts.get())
    try:
        program.latest = state = program.begin(loops, state)
        program.opaque.update((id(each), each) for each in opaque_steps(loop) if not isinstance(each, PureStep))
        if not program.opaque and any(each.trains for each in loops):  # an evaluation has no hooks, and reads what they remember
            program.warn_unclaimed(state)
        result = loop.run(state, LoopContext(program, data, owner=owner))
        if program.opaque and program.opaque.keys() <= program.called and program.trained:
            program.warn_unclaimed(result[0])
    except ProgramExit as unwound:
        program.close(program.latest, unwound.reason)
        metrics = loop.result(unwound.state.position.frames[0].totals)
        if unwound.state.stop is not None:
            # Where nobody listens to information, Python shows warnings: a run that ends early is never silent.
            level = logging.INFO if logger.isEnabledFor(logging.INFO) else logging.WARNING
            logger.log(level, "stopped at step %d: %s", unwound.state.step, unwound.state.stop)
            _say_what_waits(program, unwound.state)
            _say_what_is_not_finite(program, unwound.state, metrics)
        return unwound.state, metrics
    except Interrupted as interrupted:  # while a program that a hook, an observer or a step of this one calls waited for a batch
        if interrupted.by is not program.interrupt or deleted_reason(program.latest) is not None:
            program.close(program.latest, interrupted)
            raise
        program.close(program.latest, interrupted.text)
        frames = program.latest.position.frames
        return program.latest, loop.result(frames[0].totals if frames else None)
    except BaseException as error:
        program.close(program.latest, error)
        raise
    finally:
        loop_context.reset(token)
        interrupts.reset(asking)
    program.close(program.latest, None)
    _say_what_waits(program, result[0])
    _say_what_is_not_finite(program, *result)
    return result


def _say_what_waits(program: Program, state: Any) -> None:
    """A training that has come to its end between two updates of `optim.accumulate` is told of: it may go on in another call, or not."""
    left = waiting(getattr(state, "opt_state", None)) if program.trained else 0
    if left:
        logger.warning(
            "the program ends between two updates of optim.accumulate: the last %s in the state, and in no update yet. Another call goes "
            "on with that; if this was the last call, make its number of steps a multiple of accumulate's n",
            "batch is" if left == 1 else f"{left} batches are",
        )


def _say_what_is_not_finite(program: Program, state: Any, metrics: Any) -> None:
    """A training that ends with a loss that is infinite or NaN is told of, whatever watched it."""
    for name, value in metrics.items() if program.trained and isinstance(metrics, dict) else ():
        if name.rpartition("/")[2] == "loss" and isinstance(value, (float, torch.Tensor)) and not torch.as_tensor(value).isfinite().all():
            logger.warning(
                "%s is %s at the end, step %d: the weights may be lost. observers.debug_nonfinite finds the first step and where in the "
                "model; fnrun.skip_nonfinite goes on without such steps, hooks.early_stopping and hooks.rollback act on them",
                name,
                float(value) if torch.as_tensor(value).numel() == 1 else "not finite",
                state.step,
            )


def aside(loop: Any, state: Any, data: Any, interrupt: Callable[[], str | None] | None) -> tuple[Any, Any]:
    """A program by itself, called by a hook, an observer or a step of another, whose position comes back with the result."""
    around = state.position
    watching = tick_listener.set(None)
    try:
        end, metrics = outermost(loop, state.replace(position=Position()) if around.frames else state, data, interrupt)
    finally:
        tick_listener.reset(watching)
    return (end.replace(position=around) if around.frames else end), metrics


def with_observers(step: Any, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Any:
    """`step` with the observers of each loop that stands in it openly changed; its hooks and steps are the same objects."""
    if not dataclasses.is_dataclass(step) or isinstance(step, type):
        return step
    fields = {field.name: getattr(step, field.name) for field in dataclasses.fields(step) if field.init}
    inner: dict[str, Any] = {}
    if "step" in fields:
        inner["step"] = with_observers(fields["step"], change)
    if isinstance(fields.get("steps"), dict):
        inner["steps"] = {name: with_observers(member, change) for name, member in fields["steps"].items()}
    if isinstance(step, Composed) and step.is_loop:
        inner["observers"] = change(tuple(step.observers))
    return dataclasses.replace(step, **inner)
