"""What stands in a program: steps, loops and what lets rounds through to them; how it is drawn and counted."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from torch import nn

from fnrun.core.words import bindable, kind, uncalled
from fnrun.steps import PureStep

AnyStep = Callable[[Any, Any], Any]


def check_step(who: str, step: Any, example: str = "") -> None:
    """Raise TypeError, with what to write, where `step` is no function of the type of a step."""
    if isinstance(step, (list, tuple)):
        hint = "of several, one after the other, fnrun.sequence(first=..., second=...)"
    elif isinstance(step, nn.Module):
        hint = "make_train_step(model, loss_fn, optimizer) makes a step of a model"
    elif isinstance(step, type):
        hint = "a class is called first"
    elif uncalled(step) is not None:
        hint = f"call it, {uncalled(step)}(...)"
    elif not callable(step):
        hint = example or "make_train_step makes a step, epoch_loop(step) a loop"
    elif not bindable(step, None, None):
        hint = "it takes other arguments"
    else:
        return
    raise TypeError(f"{who}: {kind(step)} is no step and no loop, a function of (state, data): {hint}")


class Composed:
    """A step that says which others it holds: a loop, `every`, a function under `wraps`."""

    is_loop: ClassVar[bool] = False  # with a frame, hooks and observers of its own
    #: Those of a loop, and what they are able to do.
    hooks: Any = ()
    observers: Any = ()
    hook_contracts: Any = ()
    observer_contracts: Any = ()

    def inner(self) -> Iterable[tuple[str, AnyStep]]:
        """The steps within, each with the name that it adds to the path ('' for none)."""
        raise NotImplementedError

    def title(self) -> str:
        """What it is, in a few words."""
        raise NotImplementedError

    def prefixes(self) -> list[str]:
        """What the names of its metrics may begin with: the paths of members; '' where any name may come."""
        return [""]

    def total_steps(self) -> int | None:
        """How many training steps it will have taken, where that follows from the program alone."""
        return None

    def shortened(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        """One tick of it, with these hooks and observers, and what `within` makes of each step that it holds."""
        raise NotImplementedError

    def __str__(self) -> str:
        first, *rest = drawn("", self, 0)
        total = self.total_steps()
        return "\n".join([first + (f", {total:,} steps in all" if total else ""), *rest])


@dataclasses.dataclass(frozen=True, eq=False)
class Wrapper(Composed):
    """A function of the type of a step, and the loops that it says it calls: see `fnrun.wraps`."""

    fn: AnyStep
    loops: tuple[Any, ...]

    def __call__(self, state: Any, x: Any) -> Any:
        return self.fn(state, x)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Bound to an object, as a function is: for a method in the body of a class."""
        return self if instance is None else dataclasses.replace(self, fn=self.fn.__get__(instance, owner))

    def inner(self) -> Iterable[tuple[str, AnyStep]]:
        return [("", loop) for loop in self.loops]

    def title(self) -> str:
        return title(self.fn)

    def total_steps(self) -> int | None:
        return added(map(total_steps, self.loops))

    def shortened(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        return self  # the function calls the loops that it knows


def loops_of(step: Any) -> list[Any]:
    """The loops of a program that are known to stand in it, outermost first."""
    if not isinstance(step, Composed):
        return []
    return [*([step] if step.is_loop else []), *(loop for _, each in step.inner() for loop in loops_of(each))]


def donates(step: Any) -> bool:
    """Whether a loop that stands in it openly, with no wrapper between, writes over its states."""
    if not isinstance(step, Composed) or isinstance(step, Wrapper):
        return False
    return getattr(step, "donate", False) or any(donates(each) for _, each in step.inner())


def stands_openly(step: Any) -> bool:
    """Whether a loop stands there, with no wrapper around it."""
    if not isinstance(step, Composed) or isinstance(step, Wrapper):
        return False
    return step.is_loop or all(stands_openly(each) for _, each in step.inner())


def opaque_steps(step: Any) -> list[Any]:
    """What stands there and does not say which loops it calls: steps, and functions that may wrap a loop."""
    if not isinstance(step, Composed):
        return [step]
    return [each for _, inner in step.inner() for each in opaque_steps(inner)]


def prefixes(step: Any) -> list[str]:
    """Those of any step."""
    return step.prefixes() if isinstance(step, Composed) else [""]


def total_steps(step: Any) -> int | None:
    """Those of any step; what is neither a loop nor a step of a loop over data takes none that are known of."""
    return step.total_steps() if isinstance(step, Composed) else None


def added(counts: Iterable[int | None]) -> int | None:
    """The sum, where all are known."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


# --- drawing -----------------------------------------------------------------------------------------------------------


def title(step: Any) -> str:
    if isinstance(step, Composed):
        return step.title()
    return title(step.func) if isinstance(step, functools.partial) else named(step)


def drawn(name: str, step: Any, depth: int) -> Iterator[str]:
    indent = "  " * depth
    options = f", {step.options_text}" if isinstance(step, PureStep) and step.options_text else ""
    yield f"{indent}{name + ': ' if name else ''}{title(step)}{options}"
    if isinstance(step, Composed):
        for inner_name, inner in step.inner():
            yield from drawn(inner_name, inner, depth + 1)
        for what, parts in (("hook", step.hooks), ("observer", step.observers)):
            for part in parts:
                yield f"{indent}  {what} {named(part)}"
    elif isinstance(step, PureStep) and step.optimizer_text:
        yield f"{indent}  optimizer {step.optimizer_text}"


def named(part: Any) -> str:
    if hasattr(type(part), "holding_back"):  # one that acts now and then: it goes by the name of what it holds back
        return f"{named(part.hook)}, now and then"
    if not isinstance(part, type) and type(part).__str__ is not object.__str__:
        return str(part)
    return getattr(part, "name", None) or getattr(part, "__qualname__", type(part).__name__)
