"""Values in messages: what somebody gave, in a few words."""

from __future__ import annotations

import inspect
import re
import sys
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


def kind(value: Any) -> str:
    """What a value is: of numbers and short text the value itself, of a class or a function its name, of anything else its type.

    >>> kind(None), kind("16"), kind([1]), kind(dict), kind(kind)
    ('None', "'16'", 'a list', 'the class dict', 'the function kind')
    """
    if value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) < 50):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__qualname__', value)}".replace("<locals>.", "").replace("<lambda>.", "")
    return a(type(value).__name__)


def uncalled(value: Any) -> str | None:
    """The name of a function of this package that makes something, where it is given in place of what it makes; else None."""
    module = getattr(value, "__module__", None) or ""
    if not inspect.isfunction(value) or not module.startswith("fnrun.") or vars(sys.modules[module]).get(value.__name__) is not value:
        return None
    return f"{module.split('.')[1]}.{value.__name__}"


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
