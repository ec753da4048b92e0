"""Values in messages: what somebody gave, in a few words."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_AN = re.compile(r"[aeio]|u(?!ni(?!n)|net|se|t|int)", re.IGNORECASE)
_LETTERS = re.compile(r"[AEFHILMNORSX](?=[A-Z])")  # said letter by letter: an SGD, an MLP


def a(noun: str) -> str:
    """A noun with its article.

    >>> a("loop"), a("observer"), a("AdamW"), a("SGD"), a("UNet")
    ('a loop', 'an observer', 'an AdamW', 'an SGD', 'a UNet')
    """
    noun = noun.lstrip("_")
    return f"{'an' if _LETTERS.match(noun) or _AN.match(noun) else 'a'} {noun}"


def shortened(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are.

    >>> shortened(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def kind(value: Any) -> str:
    """What a value is: of numbers and short text the value itself, of a class or a function its name, of anything else its type.

    >>> kind(None), kind("16"), kind([1]), kind(dict), kind(kind)
    ('None', "'16'", 'a list', 'the class dict', 'the function kind')
    """
    if value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) < 50):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if inspect.isroutine(value) or "__qualname__" in getattr(
        value, "__dict__", ()
    ):  # what is made to go by a function's name, as steps are
        return f"the function {getattr(value, '__qualname__', value)}".replace("<locals>.", "").replace("<lambda>.", "")
    return a(type(value).__name__)


def uncalled(value: Any) -> str | None:
    """The name of a function of this package that makes something, where it is given in place of what it makes; else None."""
    module = getattr(value, "__module__", None) or ""
    if not inspect.isfunction(value) or not module.startswith("fnrun.") or vars(sys.modules[module]).get(value.__name__) is not value:
        return None
    room = module.split(".")[1]
    return f"{_PUBLIC.get(room, room)}.{value.__name__}"


#: Rooms whose functions users know by another name.
_PUBLIC = {"sinks": "observers", **dict.fromkeys(("core", "loops", "runs", "steps"), "fnrun")}


def unknown(who: str, given: Mapping[str, Any], ours: Mapping[str, str]) -> TypeError:
    """The error for keyword arguments that there are not; `ours` says what stands for names of other libraries.

    >>> print(unknown("repeat", {"epochs": 3}, {"epochs": "it is times= here"}))
    repeat() got an unexpected keyword argument 'epochs': it is times= here
    """
    name = next(iter(given))
    return TypeError(f"{who}() got an unexpected keyword argument {name!r}{': ' + ours[name] if name in ours else ''}")


def called(module: str) -> str:
    """The call of the public function of `module` that is at work, in words, without arguments that are defaults; '' outside of any.

    Optimizers and schedules are closures, and this is what is printed of them.
    """
    frame, found = sys._getframe(1), None
    while frame is not None and ((at := frame.f_globals.get("__name__", "")).startswith(module) or at == "dataclasses"):
        function = frame.f_globals.get(frame.f_code.co_name)
        if (
            inspect.isfunction(function)
            and function.__code__ is frame.f_code
            and at != "dataclasses"
            and not function.__name__.startswith("_")
        ):
            found = frame, function
        frame = frame.f_back
    if found is None:
        return ""
    frame, function = found
    parts = []
    for name, parameter in inspect.signature(function).parameters.items():
        value = frame.f_locals.get(name)
        if parameter.kind is parameter.VAR_POSITIONAL:
            parts += map(brief, value or ())
        elif parameter.kind is parameter.VAR_KEYWORD:
            parts += [f"{key}={brief(each)}" for key, each in (value or {}).items()]
        elif parameter.default is parameter.empty or name == "lr" or brief(value) != brief(parameter.default):
            parts.append(brief(value) if parameter.default is parameter.empty and not parts else f"{name}={brief(value)}")
    return f"{function.__name__}({', '.join(parts)})"


def brief(value: Any) -> str:
    """An argument in few words."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {brief(each)}" for key, each in [*value.items()][:6]) + (", ..." if len(value) > 6 else "") + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(brief, value[:6])) + (", ..." if len(value) > 6 else "") + "]"
    if isinstance(value, type) or inspect.isroutine(value):
        return value.__name__
    if value is None or isinstance(value, (bool, int, float, str)) or type(value).__module__.startswith("fnrun."):
        text = repr(value)
        return text if len(text) < 400 else type(value).__name__
    return type(value).__name__


def bindable(function: Any, *arguments: Any) -> bool:
    """Whether a function takes so many arguments, as far as its signature tells."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True
