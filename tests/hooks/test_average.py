"""Averages against torch's own `AveragedModel`, and the annealed one against its recursion."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fnrun
from fnrun import hooks, optim
from fnrun.core import tree
from fnrun.testing import assert_resumable

HOOKS = {"ema": hooks.ema(0.9), "annealed_ema": hooks.annealed_ema(0.9), "swa": hooks.swa()}


def network():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def walked(model, steps, hook):
    """The state after so many ticks of a loop whose step moves every tensor at random, and parameters and buffers at each."""
    seen = []

    def moved(tensors):
        return {name: t + torch.randn_like(t) if t.is_floating_point() else t + 1 for name, t in tensors.items()}

    @fnrun.step
    def move(state, batch):
        state = state.replace(params=moved(state.params), buffers=moved(state.buffers))
        seen.append((state.params, state.buffers))
        return state, {}

    state, _ = fnrun.step_loop(move, steps, hooks=[hook])(fnrun.TrainState.create(model), [torch.zeros(1)])
    return state, seen


def theirs(model, seen, chosen, **options):
    """torch's average of the chosen ones of these tensors."""
    averaged = AveragedModel(model, use_buffers=True, **options)
    for i, (params, buffers) in enumerate(seen, start=1):
        if i in chosen:
            model.load_state_dict({**params, **buffers})
            averaged.update_parameters(model)
    return averaged.module


def assert_close(memory, module):
    for field, tensors in (("params", dict(module.named_parameters())), ("buffers", dict(module.named_buffers()))):
        assert set(memory[field]) == set(tensors)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(memory[field][name], tensor.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
@pytest.mark.parametrize(("every", "start", "chosen"), [(1, 0, range(1, 11)), (3, 0, [3, 6, 9]), (2, 5, [5, 7, 9])])
def test_ema_is_torchs(decay, every, start, chosen):
    state, seen = walked(model := network(), 10, hooks.ema(decay, every=every, start=start, buffers="average"))
    assert_close(state.memory["ema"], theirs(model, seen, chosen, multi_avg_fn=get_ema_multi_avg_fn(decay)))
    assert state.memory["ema"]["updates"] == len(chosen)


@pytest.mark.parametrize(("every", "start", "chosen"), [(1, 0, range(1, 11)), (3, 0, [3, 6, 9]), (2, 5, [5, 7, 9])])
def test_swa_is_torchs_and_the_mean_of_the_snapshots(every, start, chosen):
    state, seen = walked(model := network(), 10, hooks.swa(start, every=every, buffers="average"))
    assert_close(state.memory["swa"], theirs(model, seen, chosen))
    for name, average in state.memory["swa"]["params"].items():
        torch.testing.assert_close(average, torch.stack([seen[i - 1][0][name] for i in chosen]).mean(0))


@pytest.mark.parametrize("every", [1, 3])
def test_annealed_ema_is_the_recursion(every):
    """MMEngine's: the momentum is max(momentum, gamma / (gamma + steps)), the average (1 - momentum) * average + momentum * value."""
    state, seen = walked(network(), 12, hooks.annealed_ema(0.8, gamma=2, every=every))
    values = [params["0.weight"] for params, _ in seen][every - 1 :: every]
    average, momenta = values[0], []
    for n, value in enumerate(values[1:], start=1):
        momenta.append(max(0.2, 2 / (2 + n * every)))
        average = (1 - momenta[-1]) * average + momenta[-1] * value
    torch.testing.assert_close(state.memory["annealed_ema"]["params"]["0.weight"], average)
    assert momenta[0] > 0.2 == momenta[-1]


def test_the_warmup_is_that_of_diffusers():
    """The decay of update 2 is 2/11, of update 3 3/12, and so on to the decay."""
    state, seen = walked(network(), 30, hooks.ema(0.7, warmup=10))
    average, decays = seen[0][0]["0.weight"], []
    for n, (params, _) in enumerate(seen[1:], start=1):
        decays.append(min(0.7, (1 + n) / (10 + n)))
        average = decays[-1] * average + (1 - decays[-1]) * params["0.weight"]
    torch.testing.assert_close(state.memory["ema"]["params"]["0.weight"], average)
    assert (decays[0], decays[1], decays[-1]) == (2 / 11, 3 / 12, 0.7)


@pytest.mark.parametrize("name", HOOKS)
def test_the_first_update_copies_and_memory_owns_its_tensors(name):
    state, seen = walked(nn.Linear(3, 2), 1, HOOKS[name])
    assert tree.equal(state.memory[name]["params"], seen[0][0])
    assert all(t.data_ptr() != state.params[key].data_ptr() for key, t in state.memory[name]["params"].items())
    start = fnrun.TrainState.create(nn.Linear(3, 2))
    memory = HOOKS[name].init(start)["params"]
    assert all(memory[key].data_ptr() != p.data_ptr() for key, p in start.params.items())


@pytest.mark.parametrize("hook", [hooks.ema(0.5, every=6), hooks.ema(0.5, start=6), hooks.swa(6, every=4)])
def test_until_the_first_update_the_newest_weights_stand_there(hook):
    """So an evaluation with the average is one of the weights, not of those that the run began with."""
    state, seen = walked(nn.Linear(3, 2), 5, hook)
    assert tree.equal(state.memory[hook.name], {"params": seen[4][0], "updates": 0})


def test_a_value_that_was_no_number_before_the_first_update_leaves_no_trace():
    bad = fnrun.TrainState.create(nn.Linear(3, 2))
    bad = bad.replace(params={name: torch.full_like(p, torch.nan) for name, p in bad.params.items()})
    step = fnrun.step(lambda state, batch: (state.replace(params={name: torch.ones_like(p) for name, p in state.params.items()}), {}))
    state, _ = fnrun.epoch_loop(step, hooks=[hooks.ema(0.9)])(bad, [torch.zeros(1)])
    assert all(bool((p == 1).all()) for p in state.memory["ema"]["params"].values())


def test_evaluation_finds_averaged_buffers_and_the_newest_ones_otherwise():
    model = network()

    def read(model, batch):
        return {"mean": model[1].running_mean.sum()}

    for buffers in ("copy", "average"):
        state, seen = walked(model, 3, hooks.swa(buffers=buffers))
        means = [b["1.running_mean"].sum() for _, b in seen]
        found = fnrun.make_eval_step(model, read, weights="swa")(state, torch.zeros(1))["mean"]
        torch.testing.assert_close(found, means[-1] if buffers == "copy" else sum(means) / 3)
    assert state.memory["swa"]["buffers"]["1.num_batches_tracked"].item() == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hook", [hooks.ema(0.999), hooks.ema(0.999, warmup=10), hooks.annealed_ema(0.999), hooks.swa()])
def test_averages_of_weights_with_few_digits_have_more(dtype, hook):
    """Against the same recursion in float64: what is added to the average is less than the last digit of a bfloat16."""
    start = torch.tensor([1.0, 2.0], dtype=dtype)
    state = fnrun.TrainState({"w": start}, {}, None, fnrun.Key(0))
    state = state.replace(memory={hook.name: hook.init(state)})
    average = None
    for step in range(1, 501):
        value = (start.double() + 1.0 + step / 100).to(dtype)
        state = hook.after(state.replace(params={"w": value}, step=step), {})
        average = value.double() if average is None else average + hook.weight(step - 1) * (value.double() - average)
    assert state.memory[hook.name]["params"]["w"].dtype == torch.float32
    torch.testing.assert_close(state.memory[hook.name]["params"]["w"].double(), average, rtol=1e-5, atol=0)


def test_a_memory_that_was_saved_with_few_digits_goes_on_with_more():
    hook = hooks.ema(0.5, every=2)
    state = fnrun.TrainState({"w": torch.tensor([2.0], dtype=torch.bfloat16)}, {}, None, fnrun.Key(0))
    state = state.replace(memory={"ema": {"params": {"w": torch.tensor([1.0], dtype=torch.bfloat16)}, "updates": 1}})
    assert hook.after(state.replace(step=3), {}).memory == state.memory
    after = hook.after(state.replace(step=4), {}).memory["ema"]["params"]["w"]
    assert (after.dtype, after.item()) == (torch.float32, 1.5)


def test_an_evaluation_has_the_average_in_the_dtype_of_the_module():
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    state = fnrun.TrainState.create(model)
    hook = hooks.ema(0.9)
    state = state.replace(memory={"ema": hook.init(state)})
    state = hook.after(state.replace(step=1), {})
    seen = fnrun.make_eval_step(model, lambda model, x: {"y": model(x).sum()}, weights="ema")(state, torch.ones(1, 2, dtype=torch.bfloat16))
    torch.testing.assert_close(seen["y"], model(torch.ones(1, 2, dtype=torch.bfloat16)).sum())
    assert seen["y"].dtype == torch.bfloat16


@pytest.mark.parametrize("spectral_norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_unit_vectors_are_not_averaged(spectral_norm):
    model = nn.Sequential(spectral_norm(nn.Linear(3, 2)), nn.BatchNorm1d(2))
    state = fnrun.TrainState.create(model)
    vectors = [name for name, b in state.buffers.items() if b.ndim == 1 and "1." not in name]
    assert len(vectors) == 2
    hook = hooks.ema(0.9, buffers="average")
    state = state.replace(memory={"ema": hook.init(state)})
    for step in range(1, 6):
        turned = {name: -b if name in vectors else b + 1 for name, b in state.buffers.items()}
        state = hook.after(state.replace(buffers=turned, step=step), {})
    averages = state.memory["ema"]["buffers"]
    for name in vectors:
        torch.testing.assert_close(averages[name], state.buffers[name])
    assert not torch.equal(averages["1.running_mean"], state.buffers["1.running_mean"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.chain(optim.accumulate(4), optim.sgd(0.1)),
        lambda: optim.chain(
            optim.scale_by_schedule(lambda step: 1.0), optim.accumulate(4), optim.lookahead(sync_period=2), optim.adamw(0.1)
        ),
        lambda: optim.accumulate(4, optim.partition(optim.decay_labels, {"decay": optim.sgd(0.1), "no_decay": optim.freeze()})),
        lambda: optim.accumulate(4, optim.from_torch(torch.optim.SGD, lr=0.1)),
    ],
)
@pytest.mark.parametrize(("every", "start", "chosen"), [(1, 0, range(1, 6)), (2, 0, [2, 4]), (2, 1, [1, 3, 5])])
@pytest.mark.parametrize("donate", [False, True])
def test_an_average_may_count_updates_in_place_of_steps(make, every, start, chosen, donate):
    """Five updates of four batches each: torch's average of the weights after each update."""
    model, seen = nn.Linear(3, 2), []

    def keep(state, metrics):
        seen.append(({name: p.clone() for name, p in state.params.items()}, state.buffers))

    step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), make())
    hook = hooks.ema(0.9, every=every, start=start, per="update")
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, generator=g) for _ in range(22)]
    state, _ = fnrun.epoch_loop(step, hooks=[hook], observers=[keep], donate=donate)(fnrun.TrainState.create(model, make()), batches)
    expected = theirs(model, seen[3::4], chosen, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    torch.testing.assert_close(dict(state.memory["ema"]["params"]), dict(expected.named_parameters()), rtol=1e-5, atol=1e-6)
    assert state.memory["ema"]["updates"] == len(chosen)


def test_updates_that_were_skipped_are_none():
    make = lambda: optim.apply_if_finite(optim.sgd(0.1))  # noqa: E731
    model = nn.Linear(3, 2)
    step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), make())
    batches = [torch.ones(2, 3), torch.full((2, 3), torch.nan), torch.ones(2, 3)]
    state, _ = fnrun.epoch_loop(step, hooks=[hooks.swa(per="update")])(fnrun.TrainState.create(model, make()), batches)
    assert state.memory["swa"]["updates"] == 2


def test_an_average_that_counts_updates_resumes():
    make = lambda: optim.chain(optim.accumulate(3), optim.sgd(0.1))  # noqa: E731
    model = nn.Linear(3, 2)
    step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), make())
    loop = fnrun.repeat(fnrun.epoch_loop(step, hooks=[hooks.ema(0.9, per="update", every=2)]), 2)
    assert_resumable(loop, fnrun.TrainState.create(model, make()), [torch.randn(4, 3) for _ in range(8)], limit=5)


def test_updates_cannot_be_counted_where_no_optimizer_counts_them():
    with pytest.raises(ValueError, match="no count of them"):
        hooks.ema(0.9, per="update").init(fnrun.TrainState.create(nn.Linear(3, 2)))


@pytest.mark.parametrize("name", HOOKS)
def test_members_are_averaged_each_on_its_own(name):
    """Parameters that are stacked, one entry for each member of a sweep."""
    members = [fnrun.TrainState.create(nn.Linear(3, 2), seed=i) for i in range(3)]
    together = members[0].replace(params={key: torch.stack([m.params[key] for m in members]) for key in members[0].params})
    step = fnrun.step(lambda state, batch: (state.replace(params={key: 0.5 * p + 1 for key, p in state.params.items()}), {}))
    loop = fnrun.step_loop(step, 4, hooks=[HOOKS[name]])
    averages = loop(together, [torch.zeros(1)])[0].memory[name]["params"]
    for i, member in enumerate(members):
        alone = loop(member, [torch.zeros(1)])[0].memory[name]["params"]
        assert tree.equal({key: value[i] for key, value in averages.items()}, alone)


def test_an_average_is_a_value():
    for make in (lambda: hooks.ema(0.9, warmup=3), lambda: hooks.annealed_ema(0.9, gamma=3), lambda: hooks.swa(2)):
        assert make() == make()
        assert hash(make()) == hash(make())
    assert hooks.ema(0.9) != hooks.ema(0.8)


def test_options_that_are_none():
    for make in (hooks.ema, hooks.annealed_ema):
        for bad in (-0.1, 1.0, 2.0):
            with pytest.raises(ValueError, match=rf"{make.__name__}: decay is in \[0, 1\)"):
                make(bad)
    for make in (lambda **kw: hooks.ema(0.5, **kw), lambda **kw: hooks.annealed_ema(0.5, **kw), hooks.swa):
        with pytest.raises(ValueError, match="every is at least 1"):
            make(every=0)
        with pytest.raises(ValueError, match="start is at least 0"):
            make(start=-1)
        with pytest.raises(ValueError, match="'copy' or 'average', not 'mean'"):
            make(buffers="mean")
        with pytest.raises(ValueError, match="'step' or 'update', not 'epoch'"):
            make(per="epoch")
    with pytest.raises(ValueError, match="warmup is at least 1"):
        hooks.ema(0.5, warmup=0)
    with pytest.raises(ValueError, match="gamma is above 0"):
        hooks.annealed_ema(0.5, gamma=0)
