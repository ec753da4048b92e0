"""The origin of a number that is not finite."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fnrun.checkpoint import CheckpointError, Checkpoints
from fnrun.core import files, tree
from fnrun.core.environment import rank
from fnrun.core.words import shortened
from fnrun.optim.lists import all_finite

logger = logging.getLogger("fnrun")

NAMED = 5  # leaves in a message


def debug_nonfinite(step: Any, model: nn.Module, to: str | Path) -> Any:
    """`step` with the same results; the first time that its loss or a parameter is not finite, the log says where that comes from.

    A step is pure, so it is repeated on the same state and batch, with hooks on the modules of `model`. The log then names what was not
    finite first: the state, the batch, the output of a module, the loss, the gradient of a module's input or output, or a parameter after
    the update. Afterwards training goes on: put `skip_nonfinite` around the step, or let `early_stopping` end the run.

    - `step`: a training step with `loss` among its metrics. A loop is refused (TypeError).
    - `model`: the module of the step.
    - `to`: a directory. `to/step-N` gets the state (a checkpoint), the batch (`batch.pt`) and `report.txt`: what was found, and the lines
      that repeat the step. What cannot be written (a full disk) is an error in the log.

    It waits for the device at each step. It keeps the old state, so a loop with `donate=True` goes on in new memory. The modules of a
    compiled step cannot be seen: debug it with `compile=False`.
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
            this = rank()
            directory = place / (f"step-{new.step}" + (f".rank{this}" if this else ""))
            found = _report(step, model, state, batch, new, metrics)
            try:
                found += "\n\n" + _save(directory, state, batch, found)
            except (OSError, CheckpointError) as error:
                found += f"\n\nand it could not be saved: {error}"
            logger.error("debug_nonfinite: %s", found)
        return new, metrics

    return wrapped


def _finite(value: Any) -> bool:
    """Whether every number in `value` is finite."""
    return bool(all_finite(tree.leaves(value)))


def _paths(value: Any) -> list[str]:
    """The paths of the leaves that are not finite."""
    return [path or "itself" for path, leaf in zip(tree.paths(value), tree.leaves(value), strict=True) if not _finite(leaf)]


# --- the step once more ------------------------------------------------------------------------------------------------


def _report(step: Any, model: nn.Module, state: Any, batch: Any, new: Any, metrics: dict[str, Any]) -> str:
    head = f"step {new.step}: the loss is {float(metrics['loss']):g}"
    if after := _paths(new.params):
        head += f", not finite after it: {shortened(after, NAMED)}"
    return f"{head}\n{_cause(step, model, state, batch, metrics)}"


def _cause(step: Any, model: nn.Module, state: Any, batch: Any, metrics: dict[str, Any]) -> str:
    if paths := _paths({"params": state.params, "opt_state": state.opt_state}):  # an infinite buffer is a mask, as a rule
        return f"the state was not finite before the step: {shortened(paths, NAMED)}"
    if paths := _paths(batch):
        return f"the batch is not finite: {shortened(paths, NAMED)}"
    with _watching(model) as (forward, backward):
        step(state, batch)
    if not forward:
        return (
            "no module was called when the step was repeated, so none can be named: a compiled step calls none, make it with compile=False"
        )
    if calls := [call for call in forward if not call.finite]:
        first = calls[0]
        cause = f"the first module with an output that is not finite: {_described(model, first.module)}"
        cause += "" if first.finite_input else ", and its input was not finite"
        nan = next((call.module for call in calls if call.has_nan), None)
        if not first.has_nan and nan is not None:  # an infinity may be meant, in a mask; a NaN is not
            cause += f" (infinite); the first with a NaN: {_described(model, nan)}"
        return cause
    if not _finite(metrics["loss"]):
        return "every module's output is finite: the loss function made it"
    if backward:
        return f"the forward is finite; in the backward, the first gradient that is not is that of the {backward[0]}"
    return "the forward is finite, and so are the gradients between modules: a parameter's gradient or the optimizer made it"


def _described(model: nn.Module, name: str) -> str:
    return f"{name or 'the model itself'} ({type(model.get_submodule(name)).__name__})"


class _Call(NamedTuple):
    """A call of a module: whether its outputs and its inputs are finite, and whether an output has a NaN."""

    module: str
    finite: bool
    has_nan: bool
    finite_input: bool


@contextmanager
def _watching(model: nn.Module) -> Iterator[tuple[list[_Call], list[str]]]:
    """Two lists that fill within it: the calls of modules as they end, and the gradients that are not finite, in the order of the backward.

    The gradients are those of the tensors between modules, by name.
    """
    forward: list[_Call] = []
    backward: list[str] = []
    names: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no other tensor gets the id of one

    def follow(tensors: list[Tensor], name: str, rename: bool) -> None:
        for tensor in tensors:
            key = id(tensor)
            if key not in names and tensor.requires_grad:
                alive.append(tensor)
                tensor.register_hook(lambda gradient, key=key: backward.append(names[key]) if not _finite(gradient) else None)
                names[key] = name
            elif key in names and rename:
                names[key] = name

    def look(name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        taken, made = ([t for t in tree.leaves(value) if isinstance(t, Tensor)] for value in (inputs, outputs))
        forward.append(_Call(name, _finite(made), any(bool(t.isnan().any()) for t in made), _finite(taken)))
        # A gradient is computed by the module that takes the tensor, the innermost one, so it has that name.
        follow(taken, f"input of {_described(model, name)}", rename=next(module.children(), None) is None)
        follow(made, f"output of {_described(model, name)}", rename=False)

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
    """Write state, batch and report. Returns the lines that repeat the step."""
    directory.mkdir(parents=True, exist_ok=True)
    with Checkpoints(directory / "state") as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
    file = directory / "batch.pt"
    with files.replacing(file) as stream:
        torch.save(tree.snapshot(batch), stream)  # copies: torch.save writes the whole storage of a view
    lines = (
        "To repeat it, with the model, the optimizer and the step made as in the run:\n\n"
        f'    state = fnrun.checkpoint.Checkpoints("{directory / "state"}").restore(like=fnrun.TrainState.create(model, optimizer))\n'
        f'    batch = torch.load("{file}", weights_only={_loads_safely(file)})\n'
        "    state, metrics = train_step(state, batch)\n"
    )
    files.write(directory / "report.txt", f"{found}\n\n{lines}".encode())
    return lines


def _loads_safely(file: Path) -> bool:
    """Whether the file can be read without running code: tensors in plain containers can, other classes cannot."""
    try:
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True
