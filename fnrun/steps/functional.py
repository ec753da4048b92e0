"""An `nn.Module` as a function of its tensors.

A module reads its tensors from slots: entries of each submodule's `_parameters` and `_buffers`. A `FunctionalModule` puts a state's tensors
there for the length of a call, and then the module's own back. Any module works unchanged, and it costs less than
`torch.func.functional_call`, which looks the slots up by name at each call.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optree
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fnrun.core import key as rng, tree
from fnrun.core.state import buffers_of
from fnrun.core.undisturbed import undisturbed
from fnrun.steps.watch import FirstCalls, reentrant, versions

#: The functional modules whose calls are under way, outermost first, under the ambient lock: a loss may call another step.
_at_work: list[FunctionalModule] = []
_NONE: dict[str, torch.Tensor] = {}

#: The result of a call, the buffers after it, and the parameters that it wrote to.
Outcome = tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]

Slots = list[tuple[dict[str, Any], str, str]]  # the container, key and name of each


class FunctionalModule:
    """The slots of `model`, by the names of its parameters and buffers; tied tensors have several.

    - `whose`: whose calls they are, in messages.
    - `watched=0`: the number of first calls that are watched for side effects.

    `modes` are the train/eval modes of the submodules when this is made: each call sets them, whatever was done to the module since.
    """

    def __init__(self, model: nn.Module, whose: str | None = None, *, watched: int = 0) -> None:
        with rng.ambient_lock:  # not during another thread's call
            parameters, buffers = dict(model.named_parameters()), buffers_of(model)
            named = {**parameters, **buffers}
            self.model, self.name = model, type(model).__name__
            self.whose = whose or self.name
            self.params = tuple(parameters)
            self.trained = tuple(name for name, p in parameters.items() if p.requires_grad)
            self.buffers = tuple(buffers)
            self.modes = [(module, module.training) for module in model.modules()]
            self.eval_modes = [(module, False) for module, _ in self.modes]
            self.device_type = next((t.device.type for t in named.values()), "cpu")
            self.structure = _Structure(model, named)
            index = {id(tensor): i for i, tensor in enumerate(named.values())}
            modules = dict(model.named_modules())
            self._slots: list[tuple[dict[str, Any], str, int]] = []
            self._empty: list[tuple[dict[str, Any], str, str]] = []
            for path, container, caches in [
                (p, held, m._non_persistent_buffers_set) for p, m in modules.items() for held in (m._parameters, m._buffers)
            ]:
                for key, tensor in container.items():
                    if tensor is None:
                        self._empty.append((container, key, "" if key in caches else f"{path}.{key}".lstrip(".")))
                    else:
                        self._slots.append((container, key, index[id(tensor)]))
            places = {i: (container, key) for container, key, i in self._slots}
            #: A slot of each parameter, of each buffer.
            self._owners = [places[i] for i in range(len(parameters))]
            self._places = [places[len(parameters) + i] for i in range(len(buffers))]
            borrowed = [_Attributes(path, module) for path, module in modules.items()]
            self._borrowed = [(a, a.dict, len(a.dict), a.buffers, len(a.buffers)) for a in borrowed]
            self._changing = [a for a in borrowed if a.kept or a.unset]
            #: Buffers of torch's norms that training writes to: running averages, and counts of calls.
            self.statistics = _statistics(modules)
            self._uncounted: set[str] = set()  # buffers that calls write to without a change of `_version`
            self._overrides = any(_overrides(module) for module in modules.values())
            self.first = FirstCalls(self.whose, model, named, len(parameters), self._slots, watched)
            self.written, self._keys = self.first.written, self.first.keys

    def tensors(self, what: str, tensors: Mapping[str, torch.Tensor], *, apart: bool = True) -> list[torch.Tensor]:
        """`tensors` in the order of the model's names. Raises ValueError, with the names, where the two don't match.

        With `apart` calls do not reach the state: parameters are detached in the first calls, and copied if calls write to them.
        """
        names = self.params if what == "params" else self.buffers
        if len(tensors) == len(names):
            try:
                found = [tensors[name] for name in names]
            except KeyError:
                pass
            else:
                if apart and what == "params" and (self.first.remaining or self.written):
                    found = [t.detach().clone() if name in self.written else t.detach() for name, t in zip(names, found, strict=True)]
                return found
        missing, extra = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
        raise ValueError(f"the state's {what} are not those of {self.name}: missing {missing}, unexpected {extra}")

    def run(
        self,
        fn: Callable[[], Any],
        params: list[torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        *,
        train: bool,
        moved: set[str] | None = None,
    ) -> Outcome:
        """`fn()` while the module has these tensors: its result, the buffers afterwards, and the parameters that it wrote to.

        - `params`, in the order of names, and `buffers` are not written to.
        - `train`: use the modes of when this was made; otherwise eval mode.
        - `moved`: a set to which the names of written buffers are added, by counts of writes, and by values in the first calls, since
          kernels of norms do not count.

        Raises ValueError, with the name, for a buffer that the call makes or removes: the state has no place for it. Raises RuntimeError
        for a write to a parameter that the first calls did not write to: the state's tensor has changed.
        """
        with rng.ambient_lock:
            if self._overrides and not _at_work:
                with self._in_made_modes():
                    return self._called(fn, params, buffers, train, moved)
            return self._called(fn, params, buffers, train, moved)

    def _called(
        self, fn: Callable[[], Any], params: list[torch.Tensor], buffers: Mapping[str, torch.Tensor], train: bool, moved: set[str] | None
    ) -> Outcome:
        tensors = [*params, *(b.clone() for b in self.tensors("buffers", buffers))] if self.buffers or buffers else params
        if self.first.remaining and not _at_work:
            self.structure.check(self.whose, train, kinds=True)
            if train:
                self.check_hooks()
        before, watched = versions(params), self.first.remaining
        outcome = self.first.run(self._run, fn, tensors, train) if self.first.remaining else self._run(fn, tensors, train)
        if moved is not None:
            pairs = list(zip(self.buffers, tensors[len(params) :], strict=True))
            if watched:
                self._uncounted.update(name for name, now in pairs if not now._version and not tree.equal(now, buffers[name]))
            moved.update(name for name, now in pairs if now._version or outcome[1][name] is not now)
            moved.update(self._uncounted)
        if before != (after := versions(params)):
            counts = zip(self.params, before or (), after or (), strict=True)
            self._late([name for name, a, b in counts if a != b and name not in self.written])
        return outcome

    def _run(self, fn: Callable[[], Any], tensors: list[torch.Tensor], train: bool) -> Outcome:
        modes = self.modes if train else self.eval_modes
        if not _at_work:
            self.structure.check(self.whose, train)
        saved = [container[key] for container, key, _ in self._slots]
        changed = [(module, module.training) for module, mode in modes if module.training != mode]
        if self._overrides and (changed or not train):  # an overridden `train` may set the modes of all submodules
            changed = [(module, module.training) for module, _ in modes]
        depth = len(_at_work)
        try:
            try:
                _at_work.append(self)
                for container, key, i in self._slots:
                    container[key] = tensors[i]
                if changed:
                    self._switch(modes)
                result = fn()
                values = self._buffers_after()  # no comprehension here: since 3.12 they are inlined, with their own handlers
                written = self._rewritten() if self.written else _NONE
                strays = self._strays(values)
            finally:
                self._put_back(saved, changed, depth)
        except KeyboardInterrupt:  # outside of a program it may have interrupted `_put_back`
            self._put_back(saved, changed, depth)
            raise
        if strays:
            raise ValueError(
                f"{self.name}: the call made or took away the buffers {strays}, and the state cannot follow: give them a tensor in "
                "__init__, or run the module once before you create the state and the step"
            )
        if not self.buffers:
            return result, {}, written
        # All are new tensors, even those that were not written to: batch norm's kernels write without a change of `_version`.
        return result, {name: b.detach() if b.requires_grad else b for name, b in zip(self.buffers, values, strict=True)}, written  # pyright: ignore[reportOptionalMemberAccess,reportReturnType]  # fmt: skip

    @undisturbed
    def _put_back(self, saved: list[Any], changed: list[tuple[nn.Module, bool]], depth: int) -> None:
        try:
            if changed:
                self._switch(changed)
        finally:
            del _at_work[depth:]
            for attributes in self._changing:
                attributes.put_back()
            for attributes, entries, size, held, count in self._borrowed:
                if len(entries) != size or len(held) != count:
                    attributes.put_back()
            for entries, key, value in self._keys:
                entries[key] = value
            for (container, key, _), tensor in zip(self._slots, saved, strict=True):
                container[key] = tensor
            for container, key, _ in self._empty:
                container[key] = None

    def _strays(self, values: list[Any]) -> list[str]:
        strays: list[str] = []
        if self.buffers:
            strays += [name for name, value in zip(self.buffers, values, strict=True) if value is None]
        if self._empty:
            strays += [path for container, key, path in self._empty if path and container.get(key) is not None]
        for attributes, _, _, buffers, count in self._borrowed:
            if len(buffers) != count:
                strays += attributes.new_buffers()
        return strays

    def _buffers_after(self) -> list[Any]:
        return [container.get(key) for container, key in self._places]

    def _rewritten(self) -> dict[str, torch.Tensor]:
        owners = {name: self._owners[i] for i, name in enumerate(self.params) if name in self.written}
        return {name: container[key].detach() for name, (container, key) in owners.items()}  # pyright: ignore[reportOptionalMemberAccess]

    def check(self) -> None:
        """Raise ValueError where the module's structure has changed since this was made."""
        with rng.ambient_lock:
            if not _at_work:
                self.structure.check(self.whose, train=True)

    def slots_of(self, modules: list[nn.Module]) -> tuple[Slots, Slots]:
        """The slots of the buffers of these modules, and all other slots, parameters too."""
        names, containers = [*self.params, *self.buffers], {id(module._buffers) for module in modules}
        slots: tuple[list[Any], list[Any]] = [], []
        for container, key, i in self._slots:
            slots[id(container) not in containers].append((container, key, names[i]))
        return slots

    def hook(self, places: list[int], leaves: list[torch.Tensor]) -> None:
        """Register the gradient hooks of the module's parameters at these places on `leaves`, which replace them."""
        parameters = self.structure.parameters
        if any(map(_hooks, parameters)):
            for i, leaf in zip(places, leaves, strict=True):
                for hook in (_hooks(parameters[i]) or {}).values():
                    leaf.register_hook(hook)

    def check_hooks(self) -> None:
        """Raise ValueError for hooks that wait for `parameter.grad`, which a functional step never sets."""
        hooked = [name for name, p in zip(self.params, self.structure.parameters, strict=True) if p._post_accumulate_grad_hooks]  # pyright: ignore[reportAttributeAccessIssue]
        if hooked:
            raise ValueError(
                f"{self.whose}: {hooked} have hooks of register_post_accumulate_grad_hook, which wait for parameter.grad, and a step never "
                "sets that: use parameter.register_hook, or a transform in the optimizer's chain"
            )

    def _late(self, names: list[str]) -> None:
        if names:
            self.written.update(names)
            raise RuntimeError(
                f"{self.whose}: the call wrote to {names} in place, which the first ones did not, so the state that it was "
                "given has changed. Go on from a checkpoint, and write in every call (then the step keeps the old values), or change "
                "parameters between steps, in a hook: state.replace(params=...)"
            )

    @contextlib.contextmanager
    def _in_made_modes(self) -> Iterator[None]:
        """Set the modes of when this was made, for modules with their own `train` and `eval`, which may keep caches."""
        found = [(module, module.training) for module, _ in self.modes]
        if found == self.modes:
            yield
            return
        self._switch(self.modes)
        try:
            yield
        finally:
            self._switch(found)

    def _switch(self, modes: list[tuple[nn.Module, bool]]) -> None:
        try:
            if self._overrides:
                train = next((mode for module, mode in modes if module is self.model), self.model.training)
                self.model.train() if train else self.model.eval()
        finally:
            for module, mode in modes:
                module.training = mode


def _statistics(modules: Mapping[str, nn.Module]) -> tuple[dict[str, None], set[str]]:
    found = [(path, m) for path, m in modules.items() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    averages = {f"{path}.{name}".lstrip("."): None for path, _ in found for name in ("running_mean", "running_var")}
    return averages, {f"{path}.num_batches_tracked".lstrip(".") for path, _ in found}


class _Structure:
    """A module's parameters and submodules, compared before each call: after a change the step would train other parameters than it seems.

    `named` are the module's own tensors. Another tensor of the same shape and dtype in a parameter's place (`model.to("meta")`,
    `load_state_dict(assign=True)`) is no change, since the state has the values.
    """

    def __init__(self, model: nn.Module, named: dict[str, torch.Tensor]) -> None:
        self.model, self.named = model, named
        parameters = dict(model.named_parameters())
        self.params, self.parameters = tuple(parameters), list(parameters.values())
        self.kinds = [(p.shape, p.dtype) for p in self.parameters]
        self.trained = list(map(_requires_grad, self.parameters))
        self._held: list[dict[str, Any]] = [held for m in model.modules() for held in (m._parameters, m._modules)]
        self._parts = list(map(dict, self._held))

    def check(self, whose: str, train: bool, kinds: bool = False) -> None:
        """Raise ValueError, with the names, where parameters or layers have changed since the step was made."""
        try:
            same = self._held == self._parts  # in C, by identity while nothing has changed
        except RuntimeError:  # of two tensors
            same = False
        if same and not kinds and not (train and list(map(_requires_grad, self.parameters)) != self.trained):
            return
        now = dict(self.model.named_parameters())
        before = list(zip(self.params, self.kinds, self.trained, strict=True))
        pairs = [(held.get(key), part) for held, parts in zip(self._held, self._parts, strict=True) for key, part in parts.items()]
        layers = [m for m, part in pairs if isinstance(m, nn.Module) and m is not part]
        paths = [path for path, module in self.model.named_modules() if any(module is layer for layer in layers)]
        found = {
            "new": [name for name in now if name not in self.params],
            "gone": [name for name in self.params if name not in now],
            "layers replaced": paths,
            "of another shape or dtype": [n for n, kind, _ in before if n in now and (now[n].shape, now[n].dtype) != kind],
            "unfrozen": [n for n, _, trained in before if train and n in now and now[n].requires_grad and not trained],
            "frozen": [n for n, _, trained in before if train and n in now and not now[n].requires_grad and trained],
        }
        if any(found.values()):
            what = "; ".join(f"{kind}: {', '.join(map(repr, names))}" for kind, names in found.items() if names)
            raise ValueError(
                f"{whose}: {type(self.model).__name__} has changed since the step was made ({what}), and the step does not follow. Make "
                "the state and the steps after such a change"
            )
        self._parts, self.parameters = list(map(dict, self._held)), list(now.values())
        self.named.update(now)


_hooks = operator.attrgetter("_backward_hooks")
_requires_grad = operator.attrgetter("requires_grad")


def _overrides(module: nn.Module) -> bool:
    """Whether a module overrides `train` or `eval`."""
    cls = type(module)
    return cls.train is not nn.Module.train or cls.eval is not nn.Module.eval or bool({"train", "eval"} & module.__dict__.keys())


class _Attributes:
    """A module's plain attributes, to remove tensors that a call has left there.

    They would keep a graph alive, and make calls differ: the weight of `weight_norm`, activations that a forward stores. Recurrent layers
    rebuild a second list of their weights in a call that finds other tensors in the slots.
    """

    __slots__ = ("buffers", "dict", "entries", "kept", "names", "path", "unset")

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.dict = path, module.__dict__
        self.buffers, self.names = module._buffers, frozenset(module._buffers)
        lists = ("_flat_weights", "_flat_weight_refs") if isinstance(module, nn.RNNBase) else ()
        self.kept = {k: v for k, v in self.dict.items() if isinstance(v, torch.Tensor) or k in lists}
        never = (*lists, "_is_full_backward_hook")  # torch's own, in every module
        self.entries, self.unset = frozenset(self.dict), tuple(k for k, v in self.dict.items() if v is None and k not in never)

    def new_buffers(self) -> list[str]:
        return [
            f"{self.path}.{key}".lstrip(".") for key in self.buffers if key not in self.names | self.dict["_non_persistent_buffers_set"]
        ]

    def put_back(self) -> None:
        attributes = self.dict
        if self.kept:
            attributes.update(self.kept)
        for key in self.unset:
            if isinstance(attributes.get(key), torch.Tensor):
                attributes[key] = None
        if len(attributes) > len(self.entries):
            for key in [key for key, value in attributes.items() if isinstance(value, torch.Tensor) and key not in self.entries]:
                del attributes[key]
        for key in [key for key in self.buffers if key not in self.names]:
            del self.buffers[key]


def not_checkpointed(whose: str, fn: Callable[[], Any], inputs: Any) -> Any:
    """`fn()`, a forward whose backward comes after the call, if any of its `inputs` requires grad.

    Raises RuntimeError where it uses `torch.utils.checkpoint`.
    """
    if not torch.is_grad_enabled() or not any(map(_requires_grad, _tensors(inputs))):
        return fn()
    message = (
        f"{whose}: the forward uses torch.utils.checkpoint (or other hooks for saved tensors), which calls the module again in the "
        "backward, and then it has its own tensors back: the gradient would be another one. Take gradients with make_train_step "
        "(step.gradients), or switch the checkpointing off; for the outputs alone call it under torch.no_grad()"
    )
    with torch.autograd.graph.disable_saved_tensors_hooks(message):
        result = fn()
    if any(reentrant(tensor) for tensor in _tensors(result)):
        raise RuntimeError(message)
    return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in optree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def call(
    model: nn.Module, params: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], *args: Any, train: bool = True, **kwargs: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """`model(*args, **kwargs)` with these tensors in place of its own: the outputs, and the buffers after the call.

    Gradients flow to `params`, `buffers` and arguments. None of them is written to, nor is the module.

    - `train=True`: use the submodules' present modes; False uses eval mode.

    Raises ValueError for missing or unexpected names. Raises RuntimeError where a gradient is required and the forward uses
    `torch.utils.checkpoint`, which calls the module again in the backward, when its own tensors are back (`make_train_step` allows it).

    >>> model = nn.BatchNorm1d(2)
    >>> params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    >>> outputs, after = call(model, params, buffers, torch.ones(4, 2))
    >>> int(after["num_batches_tracked"]), int(model.num_batches_tracked)
    (1, 0)
    """
    functional = FunctionalModule(model)
    tensors = [p.clone() for p in functional.tensors("params", params)]  # a forward may write to them
    functional.written.update(functional.params)
    before = versions(tensors)
    outputs, after, _ = not_checkpointed(
        functional.whose,
        lambda: functional.run(lambda: model(*args, **kwargs), tensors, buffers, train=train),
        [tensors, dict(buffers), args, kwargs],
    )
    if train and before != (now := versions(tensors)):
        names = [name for name, a, b in zip(functional.params, before or (), now or (), strict=True) if a != b]
        raise ValueError(f"{functional.name} writes to {names} in place, and a call has no way to return them: make_train_step has")
    return outputs, after
