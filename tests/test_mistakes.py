"""What a user is told who made a mistake: what is wrong, where, and what to write instead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fnrun
from fnrun import data, hooks, observers, optim, schedules
from fnrun.checkpoint import Checkpoints

MODEL = nn.Linear(2, 1)
OPTIMIZER = optim.sgd(0.1)
STATE = fnrun.TrainState.create(MODEL, OPTIMIZER)
BATCHES = [torch.ones(4, 2), torch.zeros(4, 2)]


def loss_fn(model, batch):
    return model(batch).square().mean()


STEP = fnrun.make_train_step(MODEL, loss_fn, OPTIMIZER)
LOOP = fnrun.epoch_loop(STEP)


def told(*words: str) -> str:
    """A pattern: these words, in this order."""
    return "(?s)" + ".*".join(words)


# --- hooks and observers ------------------------------------------------------------------------------------------------


class Remembering:
    name = "mine"

    def init(self, state):
        return 0

    def after(self, state, metrics):
        return state


class Forgetful(Remembering):
    def after(self, state, metrics):
        state.replace(step=0)


class ForgetfulBefore(Remembering):
    def before(self, state, batch):
        state.replace(step=0)


def forgetful(state, metrics):
    state.replace(step=0)


def with_metrics(state, metrics):
    return state, metrics


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (forgetful, ["the hook forgetful returned None", "returns the state", "observers="]),
        (with_metrics, ["the hook with_metrics returned a tuple", "no metrics"]),
        (hooks.every(1, forgetful), ["the hook forgetful returned None"]),
        (hooks.compose(hooks.ema(0.9), hooks.when(lambda state: True, Forgetful())), ["the hook mine returned None"]),
        (Forgetful(), ["the hook mine returned None"]),
        (ForgetfulBefore(), ["`before` of the hook mine returned None"]),
    ],
)
def test_a_hook_that_returns_no_state_is_named(hook, words):
    with pytest.raises(TypeError, match=told(*words)):
        fnrun.epoch_loop(STEP, hooks=[hook])(STATE, BATCHES)


LOG = observers.log(2, to=[])


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"observers": [hooks.ema(0.9)]}, ["ema 0.9 is no observer", "hooks="]),
        ({"observers": [hooks.stop_after(steps=3)]}, ["stop_after 3 steps is no observer", "hooks="]),
        ({"observers": [Remembering()]}, ["mine is no observer", "hooks="]),
        ({"hooks": [LOG]}, ["log is no hook", r"observers=\[log\]"]),
        ({"hooks": [hooks.every(2, LOG)]}, ["log is no hook", r"observers=\[log\]"]),
        ({"hooks": [hooks.compose(hooks.ema(0.9), LOG)]}, ["log is no hook"]),
        ({"hooks": [LOG], "observers": [observers.log(2, to=[], name="other")]}, ["log is no hook"]),
        ({"hooks": [observers.progress()]}, ["progress is no hook", "observers="]),
        ({"hooks": [hooks.ema]}, ["the function ema is no hook", r"call it, hooks.ema\("]),
        ({"hooks": [hooks.every]}, ["the function every is no hook", r"call it, hooks.every\("]),
        ({"observers": [observers.log]}, ["the function log is no observer", r"call it, observers.log\("]),
        ({"hooks": [Remembering]}, ["the class Remembering is no hook"]),
        ({"hooks": [lambda state: state]}, ["is no hook", r"called with \(state, metrics\)"]),
        ({"observers": [lambda state: None]}, ["is no observer: an observer is called with"]),
        ({"observers": [observers.console()]}, ["console is no observer", "observers.log"]),
        ({"observers": ["log"]}, ["'log' is no observer: an observer is"]),
        ({"hooks": [None]}, ["None is no hook: a hook is"]),
        ({"hooks": [[hooks.ema(0.9)]]}, ["a list is no hook"]),
        ({"hooks": hooks.ema(0.9)}, ["hooks= takes a list"]),
        ({"hooks": [schedules.cosine(0.1, 10)]}, ["is no hook", r"optim.adamw\(schedule\)"]),
        ({"hooks": [optim.clip_by_global_norm(1.0)]}, ["is no hook", "optim.chain"]),
        ({"hooks": [optim.accumulate(2)]}, ["is no hook", "optim.chain"]),
        ({"hooks": [LOOP]}, ["is no hook: a loop stands in another one"]),
    ],
)
@pytest.mark.parametrize("around", [False, True])
def test_what_is_no_hook_and_no_observer_is_told_where_it_belongs(parts, words, around):
    with pytest.raises(TypeError, match=told(*words)):
        fnrun.repeat(LOOP, 2, **parts) if around else fnrun.epoch_loop(STEP, **parts)


def test_checkpoints_are_no_observer(tmp_path):
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(TypeError, match=told("Checkpoints is no observer", "observers.checkpoint")),
    ):
        fnrun.repeat(LOOP, 2, observers=[checkpoints])


def test_torchs_schedulers_are_no_hook():
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(MODEL.parameters(), 0.1), 1)
    with pytest.raises(TypeError, match=told("StepLR is no hook", r"optim.adamw\(fnrun.schedules")):
        fnrun.epoch_loop(STEP, hooks=[scheduler])
    with pytest.raises(TypeError, match=told("and not a StepLR", "schedule")):
        fnrun.make_train_step(MODEL, loss_fn, scheduler)


def test_a_log_may_be_both_also_in_a_dry_run():
    log = observers.log(1, to=[], window="run")
    fit = fnrun.repeat(fnrun.epoch_loop(STEP, hooks=[log], observers=[log]), 2)
    assert fit(STATE, BATCHES)[0].step == 4
    assert fit.dry_run(STATE, BATCHES).inner


# --- steps and loops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fnrun.repeat([LOOP], 3), ["repeat", "a list is no step", "fnrun.sequence"]),
        (lambda: fnrun.repeat(3, LOOP), ["repeat", "3 is no step", r"repeat\(step, times\)"]),
        (lambda: fnrun.repeat(LOOP, until=3), ["until is a function of the state"]),
        (lambda: fnrun.every(LOOP, 2), ["every", "2 is no step", "interval comes first"]),
        (lambda: fnrun.epoch_loop(MODEL), ["epoch_loop: a Linear is no step", "make_train_step"]),
        (lambda: fnrun.epoch_loop(None), ["epoch_loop: None is no step"]),
        (lambda: fnrun.eval_loop(nn.Linear), ["eval_loop: the class Linear is no step"]),
        (lambda: fnrun.epoch_loop(fnrun.make_train_step), ["epoch_loop: the function make_train_step is no step", "call it"]),
        (lambda: fnrun.sequence(train=[LOOP]), ["train=: a list is no step"]),
        (lambda: fnrun.sequence(train=STATE), ["train=: a TrainState is no step"]),
        (lambda: fnrun.workflow(["train"], times=2, train=LOOP), ["workflow: phases are pairs", "here is 'train'"]),
        (lambda: fnrun.step(None or nn.Linear), ["step takes a function", "the class Linear"]),
        (lambda: fnrun.step(lambda state: state), ["step takes a function", r"\(state, batch\)"]),
        (lambda: fnrun.skip_nonfinite(MODEL.weight), ["skip_nonfinite takes a function", "a Parameter"]),
        (lambda: fnrun.value_and_grad(3), ["value_and_grad takes a function", "and not 3"]),
    ],
)
def test_what_is_no_step(make, words):
    with pytest.raises(TypeError, match=told(*words)):
        make()


@pytest.mark.parametrize("stream", [BATCHES, data.arrays(torch.ones(4, 2), 2), iter(BATCHES), lambda: BATCHES])
def test_a_step_where_a_loop_over_the_data_is_meant(stream):
    with pytest.raises(TypeError, match=told(r"sequence: /train: train_step\(Linear\) is a step", r"epoch_loop\(step\)")):
        fnrun.sequence(train=STEP)(STATE, {"train": stream})
    with pytest.raises(TypeError, match=told(r"repeat: train_step\(Linear\) is a step", r"epoch_loop\(step\)")):
        fnrun.repeat(STEP, 2)(STATE, stream)


def test_a_step_over_one_batch_is_no_mistake():
    assert fnrun.repeat(STEP, 2)(STATE, BATCHES[0])[0].step == 2


def test_a_training_step_in_eval_loop():
    with pytest.raises(TypeError, match=told("Is it a training step", "epoch_loop")):
        fnrun.eval_loop(STEP)(STATE, BATCHES)


# --- states -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "given", "words"),
    [
        (BATCHES, STATE, ["its state is a list", "swapped"]),
        (data.arrays(torch.ones(4, 2), 2), STATE, ["its state is an Arrays", "swapped"]),
        (MODEL, BATCHES, ["its state is a Linear", r"TrainState.create\(model, optimizer\)"]),
        (fnrun.TrainState, BATCHES, ["its state is the class TrainState", r"TrainState.create\("]),
        (None, BATCHES, ["its state is None", "TrainState.create"]),
        (MODEL.state_dict(), BATCHES, ["its state is an OrderedDict", "TrainState.create"]),
        ((STATE, {}), BATCHES, ["its state is a tuple", "state, metrics = "]),
    ],
)
def test_what_is_no_state(state, given, words):
    hand_written = fnrun.step(lambda state, batch: (state, {}))
    for call in (LOOP, fnrun.repeat(LOOP, 2), STEP, fnrun.make_eval_step(MODEL, loss_fn), hand_written):
        with pytest.raises(TypeError, match=told(*words)):
            call(state, given)


def test_a_state_is_immutable_and_says_how_one_gets_another():
    with pytest.raises(AttributeError, match=told("'step'", "immutable", r"state.replace\(step=3\)")):
        STATE.step = 3
    with pytest.raises(AttributeError, match=told("'other'", "immutable", "has the fields params", "struct")):
        STATE.other = 3
    with pytest.raises(AttributeError, match=told("'step'", "immutable")):
        del STATE.step
    with pytest.raises(AttributeError, match=told("'ticks'", "a Position is immutable", "dataclasses.replace")):
        STATE.position.ticks = 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda", [r"state.to\(device\)"]),
        ("half", [r"model.to\(dtype\)"]),
        ("state_dict", ["state.params", r"state.load_into\(model\)"]),
        ("load_state_dict", ["load_from"]),
        ("optimizer", ["state.opt_state"]),
        ("epoch", ["state.position.streams"]),
        ("nonsense", ["it has params, buffers, opt_state"]),
    ],
)
def test_what_a_state_has_not(name, words):
    with pytest.raises(AttributeError, match=told(f"no attribute '{name}'", *words)):
        getattr(STATE, name)


# --- makers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((loss_fn, MODEL, OPTIMIZER), ["make_train_step takes a model", "not the function loss_fn", "the model comes first"]),
        ((nn.Linear, loss_fn, OPTIMIZER), ["make_train_step takes a model", "not the class Linear", "call it"]),
        ((None, loss_fn, OPTIMIZER), ["make_train_step takes a model", "not None"]),
        ((MODEL, OPTIMIZER, loss_fn), ["make_train_step takes a function", "not an Optimizer"]),
        ((MODEL, None, OPTIMIZER), ["make_train_step takes a function", "not None"]),
        ((MODEL, nn.MSELoss, OPTIMIZER), ["make_train_step takes a function", "not the class MSELoss"]),
        ((MODEL, nn.MSELoss(), OPTIMIZER), ["not an MSELoss", "lambda model, batch"]),
        ((MODEL, nn.functional.mse_loss, OPTIMIZER), ["not the function mse_loss", "lambda model, batch"]),
        ((MODEL, lambda batch: 0.0, OPTIMIZER), ["make_train_step takes a function", "other arguments"]),
        ((MODEL, loss_fn, torch.optim.AdamW), ["not the class AdamW", r"optim.adamw\(...\) or optim.from_torch"]),
        ((MODEL, loss_fn, torch.optim.AdamW(MODEL.parameters())), ["not an AdamW", r"optim.adamw\("]),
        ((MODEL, loss_fn, torch.optim.LBFGS(MODEL.parameters())), ["not an LBFGS: optim.from_torch"]),
        ((MODEL, loss_fn, optim.adamw), ["not the function adamw", r"call it, optim.adamw\("]),
        ((MODEL, loss_fn, optim.clip_by_global_norm(1.0)), ["not a Transform", "optim.chain"]),
        ((MODEL, loss_fn, optim.accumulate(2)), ["not a Wrapper", "optim.chain"]),
        ((MODEL, loss_fn, "adamw"), ["not 'adamw'", r"optim.adamw\(1e-3\)"]),
        ((MODEL, loss_fn, None), ["not None", r"optim.adamw\(1e-3\)"]),
    ],
)
def test_make_train_step(arguments, words):
    with pytest.raises(TypeError, match=told(*words)):
        fnrun.make_train_step(*arguments)
    model, _, optimizer = arguments
    if model is not MODEL or (optimizer is not OPTIMIZER and optimizer is not None):
        with pytest.raises(TypeError, match=r"TrainState.create takes"):
            fnrun.TrainState.create(model, optimizer)


def test_make_eval_step():
    with pytest.raises(TypeError, match=told("make_eval_step takes a model", "the model comes first")):
        fnrun.make_eval_step(loss_fn, MODEL)
    with pytest.raises(TypeError, match=told("make_predict_step takes a function", "not None")):
        fnrun.make_predict_step(MODEL, None)
    with pytest.raises(TypeError, match=told("weights= takes", "weights='ema'")):
        fnrun.make_eval_step(MODEL, loss_fn, weights=hooks.ema(0.9))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_modules():
    scripted = torch.jit.script(nn.Linear(2, 1))
    for model in (scripted, nn.Sequential(scripted), torch.jit.trace(nn.Linear(2, 1), BATCHES[0])):
        for make in (
            lambda model: fnrun.make_train_step(model, loss_fn, OPTIMIZER),
            lambda model: fnrun.make_eval_step(model, loss_fn),
            lambda model: fnrun.TrainState.create(model, OPTIMIZER),
        ):
            with pytest.raises(TypeError, match=told("TorchScript", "the module that it was made of")):
                make(model)


@pytest.mark.parametrize("layer", [nn.Embedding(4, 2, sparse=True), nn.EmbeddingBag(4, 2, sparse=True)])
@pytest.mark.parametrize("optimizer", [optim.sgd(0.1), optim.adamw(1e-3)])
def test_sparse_gradients(layer, optimizer):
    model = nn.Sequential(layer, nn.Linear(2, 1))
    step = fnrun.make_train_step(model, lambda model, x: model(x).sum(), optimizer)
    with pytest.raises(ValueError, match=told("gradient of 0.weight is sparse", "sparse=False")):
        step(fnrun.TrainState.create(model, optimizer), torch.tensor([[1, 2]]))


OPTIMIZERS = {
    "sgd": optim.sgd(0.1),
    "momentum": optim.sgd(0.1, momentum=0.9),
    "adamw": optim.adamw(1e-3),
    "chain": optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3)),
    "accumulate": optim.accumulate(2, optim.adamw(1e-3)),
    "partition": optim.partition(optim.decay_labels, {"decay": optim.adamw(1e-3), "no_decay": optim.sgd(0.1)}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("other", OPTIMIZERS)
def test_the_optimizer_state_of_another_optimizer_also_after_good_calls(name, other):
    """Each structure is looked at once; what the step made itself, and its like, goes on."""
    step = fnrun.make_train_step(MODEL, loss_fn, OPTIMIZERS[name])
    state = fnrun.TrainState.create(MODEL, OPTIMIZERS[name])
    for _ in range(2):
        state, _ = step(state, BATCHES[0])
    swapped = state.replace(opt_state=OPTIMIZERS[other].init(state.params))
    if name == other:
        assert step(swapped, BATCHES[0])[0].step == 3
    else:
        with pytest.raises(ValueError, match=told(r"train_step\(Linear\)", "opt_state is not that of this optimizer", "optimizer.init")):
            step(swapped, BATCHES[0])
        with pytest.raises(ValueError, match="opt_state is not that of this optimizer"):
            fnrun.epoch_loop(step)(swapped, BATCHES)
    with pytest.raises(ValueError, match="created without an optimizer"):
        step(state.replace(opt_state=None), BATCHES[0])
    assert step(fnrun.tree.snapshot(state), BATCHES[0])[0].step == 3


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stream = data.arrays(torch.ones(4, 2), 2)
    for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
        with pytest.raises(ValueError, match=told("there is no cuda", "there are: cpu")):
            stream.to(device)
    for device in ("gpu", None, nn.Linear):
        with pytest.raises(ValueError, match=told("is no device", "there are: cpu")):
            data.batches(BATCHES).to(device)


# --- experiments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"state": fnrun.TrainState}, ["state= takes a function", "the class TrainState", "lambda: TrainState.create"]),
        ({"state": STATE}, ["state= takes a function", "a TrainState", "lambda: TrainState.create"]),
        ({"state": None}, ["state= takes a function", "None"]),
        ({"program": STEP}, ["program= takes a loop", "train_step", r"epoch_loop\(step\)"]),
        ({"program": None}, ["program= takes a loop", "None"]),
        ({"program": [LOOP]}, ["program= takes a loop", "a list"]),
        ({"data": None}, ["data= takes a mapping", "None"]),
        ({"evaluate": True}, ["evaluate= takes a loop", "True"]),
        ({"evaluate": fnrun.make_eval_step(MODEL, loss_fn)}, ["evaluate= takes a loop", r"eval_loop\(step\)"]),
    ],
)
def test_the_fields_of_an_experiment(fields, words):
    good = {"state": lambda: STATE, "program": LOOP, "data": {"train": BATCHES}}
    with pytest.raises(TypeError, match=told("Experiment: ", *words)):
        fnrun.Experiment(**{**good, **fields})


def test_an_experiment_whose_state_is_none():
    experiment = fnrun.Experiment(lambda: None, LOOP, BATCHES)
    with pytest.raises(TypeError, match=told("returned None", "TrainState.create")):
        experiment.fresh()


# --- what is printed ----------------------------------------------------------------------------------------------------

SCHEDULE = schedules.warmup_cosine(0.1, warmup=10, total=100)
CHAIN = optim.chain(optim.accumulate(2), optim.clip_by_global_norm(1.0), optim.adamw(SCHEDULE, weight_decay=0.1))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (SCHEDULE, "warmup_cosine(0.1, warmup=10, total=100)"),
        (
            schedules.join([schedules.linear(0.0, 1.0, 10), SCHEDULE], [10]),
            f"join([linear(0.0, end=1.0, steps=10), {SCHEDULE}], boundaries=[10])",
        ),
        (schedules.warmup(0.1, 5), "warmup(0.1, steps=5)"),
        (optim.sgd(0.1, momentum=0.9), "sgd(lr=0.1, momentum=0.9)"),
        (optim.adamw(optim.in_state(0.5)), "adamw(lr=in_state(0.5))"),
        (CHAIN, f"chain(accumulate(2), clip_by_global_norm(1.0), adamw(lr={SCHEDULE}, weight_decay=0.1))"),
        (optim.clip_by_norm(2.0), "clip_by_norm(2.0)"),
        (optim.from_torch(torch.optim.AdamW, lr=0.1), "from_torch(AdamW, lr=0.1)"),
        (OPTIMIZERS["partition"], "partition(decay_labels, optimizers={decay: adamw(lr=0.001), no_decay: sgd(lr=0.1)})"),
        (data.arrays(torch.ones(4, 2), 2, name="train"), "<stream train: arrays of 4 rows, 2 a batch, in order>"),
        (data.batches(BATCHES).to("cpu"), "<stream: 2 batches in a list, on cpu>"),
        (data.loader(torch.utils.data.TensorDataset(torch.ones(4, 2)), 2), "<stream: TensorDataset of 4 examples, 2 a batch, in order>"),
    ],
)
def test_schedules_optimizers_and_streams_print_in_one_line(value, expected):
    assert repr(value) == str(value) == expected


def test_a_program_prints_optimizers_and_schedules():
    step = fnrun.make_train_step(MODEL, loss_fn, CHAIN)
    fit = fnrun.repeat(fnrun.sequence(train=fnrun.epoch_loop(fnrun.skip_nonfinite(step))), 3)
    assert f"      train_step(Linear)\n        optimizer {CHAIN}" in str(fit)


def test_a_step_prints_what_it_was_asked_for_and_errors_call_it_by_its_short_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    step = fnrun.make_train_step(model, loss_fn, OPTIMIZER, microbatches=4, precision="bf16", checkpoint_activations="blocks", compile=True)
    options = "4 microbatches, autocast to bfloat16, 2 parts computed twice, compiled"
    assert repr(step) == f"<train_step(Sequential), {options}>"
    assert step.name == "train_step(Sequential)"
    for each in (step, fnrun.skip_nonfinite(step)):
        assert f"  train_step(Sequential), {options}\n    optimizer" in str(fnrun.epoch_loop(each))
    assert repr(STEP) == "<train_step(Linear)>"


def test_a_state_prints_in_one_line():
    state, _ = fnrun.epoch_loop(STEP, hooks=[hooks.ema(0.9)])(STATE, BATCHES)
    for shown in (state, fnrun.tree.map(str, state), state.replace(params={"w": torch.zeros(1000, 1000)}, stop="enough")):
        assert repr(shown) == str(shown)
        assert "\n" not in str(shown)
        assert len(str(shown)) < 500
        assert "step=2" in str(shown).replace("'", "")
        assert "<ema>" in str(shown)
    assert "params=<2 tensors, 3 elements, float32 on cpu>" in str(state)
    assert "data at epoch 1, batch 0" in str(state)
    given = STATE.replace()
    given.donate()
    assert "given away" in str(given)


# --- other makers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: observers.checkpoint("runs/c"), ["checkpoint", r"Checkpoints\(directory\)", "'runs/c'"]),
        (lambda: observers.log(to=observers.console()), ["log: to= takes a list of sinks"]),
        (lambda: observers.log(to=[observers.console]), ["log: to=", "call it, observers.console"]),
        (lambda: observers.log(to="x.csv"), ["log: to=", "'x.csv'"]),
        (lambda: observers.log(statistics=["mean"]), ["log: statistics= takes a dict"]),
        (lambda: optim.sgd(schedules.cosine), ["lr is a number, a schedule", "call it, schedules.cosine"]),
        (lambda: optim.sgd(torch.optim.lr_scheduler.StepLR), ["lr is a number, a schedule", "the class StepLR"]),
        (lambda: optim.sgd(lambda a, b: 0.1), ["lr is a number, a schedule", "one number, the step"]),
        (lambda: optim.partition({"decay": OPTIMIZER}, optim.decay_labels), ["partition takes labels and then a dict"]),
        (lambda: schedules.join([schedules.constant, schedules.constant(1.0)], [10]), ["join takes", "call it, schedules.constant"]),
        (lambda: schedules.join(schedules.constant(1.0), [10]), ["join takes a list of schedules"]),
        (lambda: schedules.multiply(None), ["multiply takes schedules and numbers, and not None"]),
        (lambda: hooks.when(None, hooks.ema(0.9)), ["condition is a function of the state, and not None"]),
        (lambda: LOOP(STATE, BATCHES, interrupt="1h"), ["interrupt= takes a function", "'1h'"]),
        (lambda: data.loader(BATCHES, 2, num_workers=2), ["data.loader", "'num_workers': it is workers= here"]),
        (lambda: data.loader(BATCHES, batch_size=2, collate_fn=list), ["'collate_fn': it is collate= here"]),
        (lambda: data.loader(BATCHES, 2, pin_memory=True), ["'pin_memory': stream.to"]),
        (lambda: data.loader(BATCHES, 2, wrokers=2), ["data.loader", "unexpected keyword argument 'wrokers'$"]),
        (lambda: data.arrays(torch.ones(4), 2, collate_fn=list), ["data.arrays", "'collate_fn': transform=f"]),
        (lambda: fnrun.repeat(LOOP, epochs=3), ["repeat", "'epochs': it is times= here"]),
    ],
)
def test_other_makers(make, words):
    with pytest.raises(TypeError, match=told(*words)):
        make()


def test_a_length_that_is_text():
    with pytest.raises(ValueError, match="steps is a number of steps, at least 0, not '10'"):
        schedules.cosine(0.1, "10")


def test_an_observer_that_returns_a_state_is_told_to_be_a_hook():
    for late in (0, 5):

        def clamp(state, metrics, late=late):
            return state.replace(memory={}) if state.step > late else None

        with pytest.raises(TypeError, match=r"returned a state, which an observer cannot change: it is a hook, hooks=\[...\]"):
            fnrun.epoch_loop(STEP, observers=[clamp])(STATE, [BATCHES[0]] * 8)
