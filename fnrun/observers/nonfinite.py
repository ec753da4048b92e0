"""Where a number that is not finite comes from."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fnrun.checkpoint import CheckpointError, Checkpoints
from fnrun.core import files, tree
from fnrun.core.environment import rank
from fnrun.optim.lists import all_finite

logger = logging.getLogger("fnrun")

NAMED = 5  # leaves in a message


def debug_nonfinite(step: Any, model: nn.Module, to: str | Path) -> Any:
    """`step`, returning exactly what it returns; the first time that its loss or a parameter is not finite, it says why.

    A step is pure, so it is done once more on the same state and batch, with hooks on the modules of `model`. The log then names what was
    not finite first: the state that came in, the batch, the output of a module, the loss, the gradient of a module's input or output, or a
    parameter after the update. In the directory `to/step-N` are the state (a checkpoint), the batch (`batch.pt`) and `report.txt`: what was
    found, and the lines that repeat the step. Afterwards training goes on as it would: put `skip_nonfinite` around it, or let
    `early_stopping` end it.

    It waits for the device at each step, and as it keeps the old state, a loop with `donate=True` goes on in new memory. The modules of a
    compiled step cannot be seen: debug it with `compile=False`. What cannot be written (a full disk) is an error in the log. The step needs
    `loss` among its metrics. It goes around a step and inside a loop; around a loop it is refused (TypeError).
    """
    seen, place = False, files.local_path(to)

    @functools.wraps(step)
    def wrapped(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        nonlocal seen
        new, metrics = step(state, batch)
        if new.position is not state.position:
            raise TypeError("debug_nonfinite goes around a step, inside the loop: epoch_loop(debug_nonfinite(step, ...))")
        if not seen and not _finite([metrics["loss"], new.params]):
            seen = True
            own = rank()
            directory = place / (f"step-{new.step}" + (f".rank{own}" if own else ""))
            found = _report(step, model, state, batch, new, metrics)
            try:
                found += "\n\n" + _save(directory, state, batch, found)
            except (OSError, CheckpointError) as error:
                found += f"\n\nand it could not be saved: {error}"
            logger.error("debug_nonfinite: %s", found)
        return new, metrics

    return wrapped


def _finite(value: Any) -> bool:
    """Whether every number in it is."""
    return bool(all_finite(tree.leaves(value)))


def _paths(value: Any) -> list[str]:
    """The paths of the leaves that are not finite."""
    return [path or "itself" for path, leaf in zip(tree.paths(value), tree.leaves(value), strict=True) if not _finite(leaf)]


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:NAMED]) + (f" and {len(paths) - NAMED} more" if len(paths) > NAMED else "")


# --- the step once more ------------------------------------------------------------------------------------------------


def _report(step: Any, model: nn.Module, state: Any, batch: Any, new: Any, metrics: dict[str, Any]) -> str:
    head = f"step {new.step}: the loss is {float(metrics['loss']):g}"
    if after := _paths(new.params):
        head += f", not finite after it: {_listed(after)}"
    return f"{head}\n{_cause(step, model, state, batch, metrics)}"


def _cause(step: Any, model: nn.Module, state: Any, batch: Any, metrics: dict[str, Any]) -> str:
    if paths := _paths({"params": state.params, "opt_state": state.opt_state}):  # an infinite buffer is a mask, as a rule
        return f"the state was not finite before the step: {_listed(paths)}"
    if paths := _paths(batch):
        return f"the batch is not finite: {_listed(paths)}"
    with _watching(model) as (forward, backward):
        step(state, batch)
    if not forward:
        return (
            "no module was called when the step was repeated, so none can be named: a compiled step calls none, make it with compile=False"
        )
    modules = [(name, has_nan, finite_input) for name, finite, has_nan, finite_input in forward if not finite]
    if modules:
        name, has_nan, finite_input = modules[0]
        said = f"the first module with an output that is not finite: {_module_in_words(model, name)}" + (
            "" if finite_input else ", and its input was not finite"
        )
        nan = next((name for name, has_nan, _ in modules if has_nan), None)
        if not has_nan and nan is not None:  # an infinity may be meant, in a mask; a NaN is not
            said += f" (infinite); the first with a NaN: {_module_in_words(model, nan)}"
        return said
    if not _finite(metrics["loss"]):
        return "every module's output is finite: the loss function made it"
    if backward:
        return f"the forward is finite; in the backward, the first gradient that is not is that of the {backward[0]}"
    return "the forward is finite, and so are the gradients between modules: a parameter's gradient or the optimizer made it"


def _module_in_words(model: nn.Module, name: str) -> str:
    return f"{name or 'the model itself'} ({type(model.get_submodule(name)).__name__})"


@contextmanager
def _watching(model: nn.Module) -> Iterator[tuple[list[tuple[str, bool, bool, bool]], list[str]]]:
    """Two lists that fill within it: of each call of a module what is known as it ends, and which gradients are not finite.

    Of a call: the module's name, whether its output is finite, whether that has a NaN, and whether its inputs are finite. Gradients are
    those of the tensors between modules, in words, as the backward comes to them.
    """
    forward: list[tuple[str, bool, bool, bool]] = []
    backward: list[str] = []
    words: dict[int, str] = {}
    held: list[Tensor] = []  # so that no other tensor gets the id of one

    def follow(tensors: list[Tensor], said: str, rename: bool) -> None:
        for tensor in tensors:
            key = id(tensor)
            if key not in words and tensor.requires_grad:
                held.append(tensor)
                tensor.register_hook(lambda gradient, key=key: backward.append(words[key]) if not _finite(gradient) else None)
                words[key] = said
            elif key in words and rename:
                words[key] = said

    def look(name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        taken, given = ([t for t in tree.leaves(value) if isinstance(t, Tensor)] for value in (inputs, outputs))
        forward.append((name, _finite(given), any(bool(t.isnan().any()) for t in given), _finite(taken)))
        # Its gradient is made by what takes a tensor, so that is what it is called by; of modules within each other by the innermost.
        follow(taken, f"input of {_module_in_words(model, name)}", rename=next(module.children(), None) is None)
        follow(given, f"output of {_module_in_words(model, name)}", rename=False)

    hooks = [
        module.register_forward_hook(
            lambda module, args, kwargs, outputs, name=name: look(name, module, (args, kwargs), outputs), with_kwargs=True
        )
        for name, module in model.named_modules()
    ]
    try:
        yield forward, backward
    finally:
        for hook in hooks:
            hook.remove()


# --- on disk -----------------------------------------------------------------------------------------------------------


def _save(directory: Path, state: Any, batch: Any, found: str) -> str:
    """Write all of it; returns the lines that repeat the step."""
    directory.mkdir(parents=True, exist_ok=True)
    with Checkpoints(directory / "state") as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
    file = directory / "batch.pt"
    with files.replacing(file) as stream:
        torch.save(tree.snapshot(batch), stream)  # copies: of a tensor that is a piece of another, the whole other would be written
    lines = (
        "To repeat it, with the model, the optimizer and the step made as in the run:\n\n"
        f'    state = fnrun.checkpoint.Checkpoints("{directory / "state"}").restore(like=fnrun.TrainState.create(model, optimizer))\n'
        f'    batch = torch.load("{file}", weights_only={_loads_safely(file)})\n'
        "    state, metrics = train_step(state, batch)\n"
    )
    files.write(directory / "report.txt", f"{found}\n\n{lines}".encode())
    return lines


def _loads_safely(file: Path) -> bool:
    """Whether it can be read without running code: tensors in plain containers can, other classes cannot."""
    try:
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True
