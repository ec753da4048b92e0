"""What each combinator does: where it begins and ends, what it reports, what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import io
import warnings
from typing import Any

import pytest
import torch

import fnrun
from fnrun import data, hooks, optim
from fnrun.loops import Loop
from fnrun.testing import assert_resumable, assert_same, states_seen
from tests.programs import Counter, fresh, train


def batches(n):
    return [torch.full((1 + i % 2,), float(i)) for i in range(n)]


WARM = fnrun.epoch_loop(train, hooks=[hooks.ema(0.1)])


def traced(name, log):
    """A step and an eval step that write down when they were called."""

    @fnrun.step
    def step(state, batch):
        log.append(name)
        return state, {"n": 1.0}

    def eval_step(state, batch):
        log.append(name)
        return {"n": 1.0}

    return eval_step if name == "V" else step


class TestMetrics:
    def test_a_plain_tensor_is_a_mean_over_examples(self):
        step = fnrun.step(lambda state, batch: (state, {"x": batch.mean()}))
        _, metrics = fnrun.epoch_loop(step)(fresh(), [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])])
        assert metrics["x"].item() == 4.0

    def test_a_sequence_prefixes_and_a_repeat_gives_its_last_round(self):
        seen = []
        step = fnrun.step(lambda state, batch: (state, {"step": float(state.step)}))
        loop = fnrun.repeat(
            fnrun.sequence(train=fnrun.epoch_loop(step), val=fnrun.eval_loop(lambda state, batch: {"at": float(state.step)})), 2,
            observers=[lambda state, metrics: seen.append(metrics)],
        )  # fmt: skip
        _, metrics = loop(fresh(), {"train": batches(2), "val": batches(1)})
        assert seen == [{"train/step": pytest.approx(2 / 3), "val/at": 2.0}, metrics]
        assert metrics["val/at"] == 4.0

    def test_predict_gives_the_outputs_in_order(self):
        state, outputs = fnrun.predict_loop(lambda state, batch: batch * 2)(fresh(), batches(3))
        assert [o.tolist() for o in outputs] == [[0.0], [2.0, 2.0], [4.0]]
        assert state.position.frames == ()


class TestEvaluation:
    def test_it_changes_nothing_but_the_count_of_ticks(self):
        state, _ = fnrun.step_loop(train, 2)(fresh(), batches(3))
        after, _ = fnrun.eval_loop(lambda state, batch: {"x": batch.sum()})(state, batches(2))
        assert after.position.ticks == state.position.ticks + 2
        assert_same(after.replace(position=state.position), state, "evaluation changed the state")

    def test_with_steps_it_goes_on_through_its_own_stream(self):
        seen = []
        loop = fnrun.repeat(fnrun.eval_loop(lambda state, batch: seen.append(batch[0].item()) or {"x": 0.0}, steps=2), 3)
        loop(fresh(), batches(3))
        assert seen == [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]

    @pytest.mark.parametrize(("steps", "expected"), [(2, [0.0, 1.0]), (3, [0.0, 1.0, 2.0]), (9, [0.0, 1.0, 2.0]), (0, [])])
    @pytest.mark.parametrize("make", [fnrun.eval_loop, fnrun.predict_loop])
    def test_with_steps_and_again_it_takes_the_same_batches_each_time(self, make, steps, expected):
        """A stream that has fewer is taken whole: no batch counts twice."""
        seen = []
        loop = make(lambda state, batch: seen.append(batch[0].item()) or {"x": 0.0}, steps=steps, again=True)
        state, _ = fnrun.repeat(loop, 3)(fresh(), batches(3))
        assert seen == expected * 3
        assert state.position.streams == {}

    def test_again_begins_a_shuffled_stream_at_the_same_place_and_leaves_others_where_they_stand(self):
        shared, seen = data.arrays(torch.arange(12.0), 2, shuffle=True, name="all"), []
        val = fnrun.eval_loop(lambda state, batch: seen.append(batch.tolist()) or {"x": batch.sum()}, steps=2, again=True)
        program = fnrun.repeat(fnrun.sequence(train=fnrun.step_loop(train, 4), val=val), 4)
        state, _ = program(fresh(), {"train": shared, "val": shared})
        assert (len(seen), seen[:2] * 4) == (8, seen)
        assert (state.position.streams["all"].epoch, state.position.streams["all"].batch) == (2, 4)

    def test_again_is_killed_and_goes_on_in_the_middle_of_a_validation(self):
        val = fnrun.eval_loop(lambda state, batch: {"x": batch.sum() * state.params["x"].sum()}, steps=3, again=True)
        program = fnrun.repeat(fnrun.sequence(train=fnrun.step_loop(train, 2), val=val), 2)
        streams = {"train": batches(3), "val": data.arrays(torch.arange(20.0), 4, shuffle=True)}
        assert_resumable(program, fresh(), streams)

    def test_again_is_for_a_number_of_batches(self):
        with pytest.raises(ValueError, match=r"eval_loop: again=True is for steps=n"):
            fnrun.eval_loop(lambda state, batch: {}, again=True)
        with pytest.raises(TypeError, match="again= is True or False, and not 3"):
            fnrun.eval_loop(lambda state, batch: {}, steps=2, again=3)  # pyright: ignore[reportArgumentType]
        loop = fnrun.eval_loop(lambda state, batch: {"x": batch.sum()}, steps=2, again=True)
        assert "eval_loop, the first 2 batches" in str(loop)
        assert "eval_loop" in str(loop.dry_run(fresh(), batches(3)))

    def test_a_pass_takes_no_position_from_training_over_the_same_stream(self):
        shared = data.arrays(torch.arange(6.0), 2, shuffle=True, name="all")
        program = fnrun.sequence(a=fnrun.step_loop(train, 2), b=fnrun.eval_loop(lambda s, b: {"x": b.sum()}), c=fnrun.epoch_loop(train))
        state, metrics = program(fresh(), {"a": shared, "b": shared, "c": shared})
        assert metrics["b/x"].item() == pytest.approx(15 / 3)
        assert state.step == 3  # `c` goes on where `a` stopped

    def test_other_data_may_be_evaluated_each_time(self):
        loop = fnrun.eval_loop(lambda state, batch: {"x": batch.sum()})
        state, _ = loop(fresh(), batches(2))
        loop(state, batches(3))


class TestHowOften:
    @pytest.mark.parametrize(
        ("times", "n", "begin", "expected"),
        [(7, 3, 1, [3, 6, 7]), (7, 3, 5, [6, 7]), (12, [(0, 5), (11, 2)], 1, [5, 10, 12]), (12, [(0, 5), (10, 2)], 1, [5, 10, 12])],
    )
    def test_every(self, times, n, begin, expected):
        seen = []
        inner = fnrun.eval_loop(lambda state, batch: seen.append(state.step) or {"x": 0.0})
        loop = fnrun.repeat(fnrun.sequence(train=fnrun.epoch_loop(train), val=fnrun.every(n, inner, begin=begin)), times)
        loop(fresh(), {"train": batches(1), "val": batches(1)})
        assert seen == expected

    def test_every_without_the_last_outside_a_repeat_and_under_until(self):
        seen = []
        inner = fnrun.eval_loop(lambda state, batch: seen.append(state.step) or {"x": 0.0})
        program = fnrun.sequence(train=fnrun.epoch_loop(train), val=fnrun.every(2, inner, last=False))
        streams = {"train": batches(1), "val": batches(1)}
        fnrun.repeat(program, 3)(fresh(), streams)
        assert seen == [2]
        program(fresh(), streams)
        assert seen == [2, 1]
        late = fnrun.sequence(train=fnrun.epoch_loop(train), val=fnrun.every(2, inner))
        fnrun.repeat(late, until=lambda state: state.step >= 3)(fresh(), streams)
        assert seen == [2, 1, 2]

    def test_validation_by_step(self):
        """Each 4 steps and at the end: 4, 8, 10."""
        seen = []
        program = fnrun.repeat(
            fnrun.sequence(train=fnrun.step_loop(train, 4, until_step=10), val=fnrun.eval_loop(lambda s, b: seen.append(s.step) or {"x": 0.0})),
            until=lambda state: state.step >= 10,
        )  # fmt: skip
        state, _ = program(fresh(), {"train": batches(3), "val": batches(1)})
        assert seen == [4, 8, 10]
        assert state.step == 10

    def test_workflow_by_epoch_and_by_step(self):
        log = []
        streams = {"train": batches(3), "val": batches(2)}
        by_epoch = {"train": fnrun.epoch_loop(traced("T", log)), "val": fnrun.eval_loop(traced("V", log))}
        fnrun.workflow([("train", 2), ("val", 1)], times=3, **by_epoch)(fresh(), streams)
        assert "".join(log) == "TTTTTTVVTTTVV"
        log.clear()
        by_step = {"train": fnrun.step_loop(traced("T", log), 1), "val": fnrun.eval_loop(traced("V", log), steps=1)}
        fnrun.workflow([("train", 2), ("val", 1)], times=5, **by_step)(fresh(), streams)
        assert "".join(log) == "TTVTTVTV"


class TestResuming:
    def test_a_longer_repeat_does_the_rest(self):
        program, stream = lambda n: fnrun.repeat(fnrun.epoch_loop(train), n), batches(3)
        seen, (end, _) = states_seen(program(5), fresh(), stream)
        again, _ = program(5)(seen[-1], stream)
        assert_same(again, end, "a state of the last tick has nothing left to do")
        longer, _ = program(10)(seen[-1], stream)
        assert_same(longer, program(10)(fresh(), stream)[0], "repeat(10) from the end of repeat(5)")
        assert program(2)(end, stream)[0].step == 21  # a finished program trains again

    def test_a_new_member_in_front_does_not_shift_the_place(self):
        log = []
        streams = {k: batches(2) for k in "abc"}
        steps = {"a": fnrun.epoch_loop(traced("a", log)), "b": fnrun.epoch_loop(traced("b", log))}
        seen, _ = states_seen(fnrun.sequence(**steps), fresh(), streams)
        in_b = next(s for s in seen if s.position.frames[0].member == "b" and len(s.position.frames) == 2)
        log.clear()
        fnrun.sequence(c=fnrun.epoch_loop(traced("c", log)), **steps)(in_b, streams)
        assert log == ["b"]

    def test_a_hook_that_is_new_begins_and_one_that_is_gone_is_named(self):
        stream = batches(4)
        with_one = fnrun.epoch_loop(train, hooks=[Counter("one", None)])
        seen, _ = states_seen(with_one, fresh(), stream)
        two = fnrun.epoch_loop(train, hooks=[Counter("one", None), hooks.ema(0.5)])
        state, _ = two(seen[1], stream)
        assert state.memory["one"]["ticks"] == 4
        assert state.memory["ema"]["updates"] == 2
        with pytest.warns(UserWarning, match="hooks that the program does not show: one;"):
            fnrun.epoch_loop(train, hooks=[hooks.ema(0.5)])(seen[1], stream)

    def test_a_loop_that_a_function_only_names_is_no_part_of_the_program(self):
        used = fnrun.epoch_loop(train, hooks=[hooks.ema(0.5)])

        class Host:
            spare = fnrun.epoch_loop(train, hooks=[hooks.ema(0.9)])

            def __init__(self):
                self.warm = self.spare

            def __call__(self, state, x):
                return used(state, x) if state.step >= 0 else WARM(state, x)

        state, _ = fnrun.sequence(a=Host())(fresh(), {"a": batches(2)})
        assert set(state.memory) == {"ema"}
        assert state.memory["ema"]["updates"] == 2

    def test_the_memory_of_a_loop_that_nobody_told_of_begins_when_it_is_called(self):
        inner = fnrun.epoch_loop(train, hooks=[Counter("inner", None)])
        program = fnrun.sequence(first=fnrun.epoch_loop(train), second=lambda state, x: inner(state, x))
        seen, _ = states_seen(program, fresh(), {"first": batches(1), "second": batches(1)})
        assert ["inner" in state.memory for state in seen] == [False, False, True, True]

    def test_the_memory_of_a_loop_that_was_told_of_begins_with_the_program_and_its_observers_open(self):
        opened = []

        class Opened:
            def open(self, program, state):
                opened.append(state.step)

            def __call__(self, state, metrics):
                pass

        inner = fnrun.epoch_loop(train, hooks=[Counter("inner", None)], observers=[Opened()])
        second = fnrun.wraps(inner)(lambda state, x: inner(state, x))
        seen, _ = states_seen(
            fnrun.sequence(first=fnrun.epoch_loop(train), second=second), fresh(), {"first": batches(1), "second": batches(1)}
        )
        assert "inner" in seen[0].memory
        assert opened == [0]

    @pytest.mark.parametrize("told", [True, False])
    @pytest.mark.parametrize("kind", ["function", "list", "object", "partial", "method"])
    def test_any_callable_may_wrap_a_loop(self, kind, told):
        inner = fnrun.epoch_loop(train, hooks=[Counter("inner", None), hooks.ema(0.5)])

        class Host:
            def __init__(self):
                self.loops = [inner]

            def call(self, state, x):
                return self.loops[0](state, x)

            __call__ = call

        in_a_list = [inner]
        wrapper = {
            "function": lambda state, x: inner(state, x),
            "list": lambda state, x: in_a_list[0](state, x),
            "object": Host(),
            "partial": functools.partial(lambda loop, state, x: loop(state, x), inner),
            "method": Host().call,
        }[kind]
        wrapper = fnrun.wraps(inner)(wrapper) if told else wrapper
        for program, streams in [
            (fnrun.repeat(wrapper, 3), batches(2)),
            (fnrun.sequence(first=fnrun.epoch_loop(train), train=wrapper), {"first": batches(2), "train": batches(2)}),
            (fnrun.repeat(fnrun.sequence(a=fnrun.every(2, wrapper)), 3), {"a": batches(2)}),
        ]:
            fnrun.testing.assert_resumable(program, fresh(), streams, restored=lambda s, like: s)

    def test_a_method_may_say_what_it_calls(self):
        inner = fnrun.epoch_loop(train)

        class Host:
            scale = 2

            @fnrun.wraps(inner)
            def fit(self, state, x):
                return inner(state, [self.scale * batch for batch in x])

        state, metrics = fnrun.repeat(Host().fit, 2)(fresh(), [torch.ones(2)])
        assert (state.step, metrics["size"]) == (2, 2.0)

    def test_what_a_function_says_it_calls_is_drawn_and_counted(self):
        inner, other = fnrun.step_loop(train, 4, hooks=[hooks.ema(0.5)]), fnrun.step_loop(train, 3)

        @fnrun.wraps(inner, other)
        def both(state, x):
            state, _ = inner(state, x)
            return other(state, x)

        drawn = str(fnrun.repeat(both, 2))
        name = both.title()
        assert drawn.splitlines() == [
            "repeat 2 times, 14 steps in all", f"  {name}", "    step_loop, 4 steps", "      train", "      hook ema 0.5",
            "    step_loop, 3 steps", "      train",
        ]  # fmt: skip
        assert str(both).splitlines()[0] == f"{name}, 7 steps in all"
        assert fnrun.repeat(both, 2)(fresh(), batches(2))[0].step == 14

    def test_two_loops_that_a_function_says_it_calls_share_no_memory(self):
        a, b = fnrun.epoch_loop(train, hooks=[hooks.ema(0.5)]), fnrun.epoch_loop(train, hooks=[hooks.ema(0.9)])
        with pytest.raises(fnrun.ProgramError, match="two hooks are named 'ema'"):
            fnrun.repeat(fnrun.wraps(a, b)(lambda state, x: a(state, x)), 1)(fresh(), batches(1))

    def test_a_function_that_wraps_a_donating_loop_keeps_the_state_that_it_was_given(self):
        model = torch.nn.Linear(2, 1)
        step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), optim.adamw(1e-2))
        inner = fnrun.epoch_loop(step, donate=True)

        @fnrun.wraps(inner)
        def moved(state, x):
            new, metrics = inner(state, x)
            return new, {**metrics, "moved": (new.params["weight"] - state.params["weight"]).abs().sum()}

        stream = [torch.ones(2, 2) * i for i in range(3)]
        state = fnrun.TrainState.create(model, optim.adamw(1e-2))
        _, metrics = fnrun.repeat(moved, 2)(state, stream)
        assert metrics["moved"] > 0

    def test_what_is_no_loop_is_refused(self):
        for wrong in (train, [fnrun.epoch_loop(train)], None):
            with pytest.raises(TypeError, match=r"wraps: .* is no loop"):
                fnrun.wraps(wrong)
        with pytest.raises(TypeError, match="no loop is given"):
            fnrun.wraps()

    def test_a_function_that_says_what_it_calls_may_call_one_that_does_not(self):
        inner = fnrun.epoch_loop(train, hooks=[Counter("inner", None)])
        outer = fnrun.sequence(a=fnrun.epoch_loop(train), b=lambda state, x: inner(state, x))
        program = fnrun.repeat(fnrun.wraps(outer)(lambda state, x: outer(state, x)), 2)
        fnrun.testing.assert_resumable(program, fresh(), {"a": batches(1), "b": batches(2)}, restored=lambda s, like: s)

    def test_memory_that_no_hook_claims_is_named_at_the_end_where_a_function_may_bring_hooks(self):
        inner, stream = fnrun.epoch_loop(train, hooks=[Counter("inner", None)]), batches(2)
        program = fnrun.repeat(lambda state, x: inner(state, x), 2)
        seen, _ = states_seen(program, fresh(), stream)
        foreign = seen[1].replace(memory={**seen[1].memory, "foreign": {"x": 1}})
        with pytest.warns(UserWarning, match="hooks that the program does not show: foreign;"):
            program(foreign, stream)

    def test_the_context_of_a_program_ends_at_its_hooks(self):
        """A hook or a step may run a program of its own, on a state of its own."""
        inner, stream = fnrun.repeat(fnrun.epoch_loop(train), 2), batches(2)

        def run_inside(state, metrics):
            return state.replace(params={"x": inner(fresh(), stream)[0].params["x"]})

        state, _ = fnrun.epoch_loop(train, hooks=[run_inside])(fresh(), stream)
        assert torch.equal(state.params["x"], inner(fresh(), stream)[0].params["x"])

    def test_a_loop_that_a_hook_or_an_observer_runs_on_the_same_state_is_a_program_of_its_own(self):
        steps, scores = [], []
        inner, probe, stream = fnrun.epoch_loop(train), fnrun.eval_loop(lambda s, b: {"x": float(s.step)}), batches(3)

        def hook(state, metrics):
            after, _ = inner(state, stream)
            steps.append(after.step - state.step)
            assert after.position is state.position
            return state

        def observer(state, metrics):
            scores.append(probe(state, stream)[1]["x"])

        loop = fnrun.epoch_loop(train, hooks=[hook], observers=[observer])
        fnrun.testing.assert_resumable(loop, fresh(), stream, restored=lambda s, like: s)
        assert set(steps) == {3}
        assert scores[:3] == [1.0, 2.0, 3.0]

    def test_a_step_may_run_a_program_and_is_one_tick(self):
        @fnrun.step
        def meta(state, batch):
            inner, metrics = fnrun.step_loop(train, 2)(state, [batch, batch])
            return inner, metrics

        loop = fnrun.repeat(fnrun.epoch_loop(meta), 2)
        fnrun.testing.assert_resumable(loop, fresh(), batches(2), restored=lambda s, like: s)
        seen, _ = states_seen(loop, fresh(), batches(2))
        assert {len(s.position.frames) for s in seen} == {1, 2}

    def test_a_wrapper_with_two_loops_goes_on_in_the_first_and_is_refused_in_the_second(self):
        """What came before the second is not in the state: a sequence keeps it."""
        a, b = fnrun.epoch_loop(train), fnrun.epoch_loop(train)

        def both(state, x):
            state, _ = a(state, x)
            return b(state, x)

        loop, stream = fnrun.repeat(both, 2), batches(3)
        seen, (end, _) = states_seen(loop, fresh(), stream)
        assert end.step == 12
        assert_same(loop(seen[1], stream)[0], end, "from the first")
        with pytest.raises(fnrun.ProgramError, match="epoch_loop / #2, tick 1"):
            loop(seen[3], stream)

    def test_predictions_in_a_sequence_are_no_metrics(self):
        metrics_seen = []
        predict = fnrun.predict_loop(lambda s, b: {"y": b, "id": "a"}, observers=[lambda s, m: metrics_seen.append(m["outputs"]["id"])])
        program = fnrun.repeat(
            fnrun.sequence(train=fnrun.epoch_loop(train), predict=predict), 2, observers=[fnrun.observers.log(to=[]), lambda s, m: metrics_seen.append(sorted(m))]
        )  # fmt: skip
        _, results = program(fresh(), {"train": batches(1), "predict": batches(2)})
        assert metrics_seen == ["a", "a", ["train/loss", "train/size"]] * 2
        assert [out["y"].tolist() for out in results["predict"]] == [[0.0], [1.0, 1.0]]
        fnrun.testing.assert_resumable(program, fresh(), {"train": batches(1), "predict": batches(2)}, restored=lambda s, like: s)

    def test_a_state_may_have_fields_of_its_own(self, tmp_path):
        @fnrun.struct
        class Gan(fnrun.TrainState):
            d_params: dict
            rounds: int = 0

        @fnrun.step
        def step(state, batch):
            return state.replace(d_params={"w": state.d_params["w"] + torch.rand(1)}, rounds=state.rounds + 1), {
                "d": state.d_params["w"].sum()
            }

        state = Gan.create(torch.nn.Linear(1, 1), seed=2, d_params={"w": torch.zeros(1)})
        fnrun.testing.assert_resumable(fnrun.repeat(fnrun.epoch_loop(step, hooks=[hooks.ema(0.5)]), 2), state, batches(2))
        axes = fnrun.tree.map(lambda leaf: 0 if isinstance(leaf, torch.Tensor) else None, state)
        assert axes.rng.seed is None

    def test_a_state_needs_only_step_memory_position_and_stop(self):
        @fnrun.struct
        class Least:
            step: int = 0
            memory: dict = dataclasses.field(default_factory=dict)
            position: fnrun.Position = dataclasses.field(default_factory=fnrun.Position)
            stop: str | None = None

            def replace(self, **changes):
                return dataclasses.replace(self, **changes)

        stream = data.arrays(torch.arange(4.0), 2, shuffle=True)
        state, metrics = fnrun.epoch_loop(lambda s, b: (s.replace(step=s.step + 1), {"x": b.sum()}))(Least(), stream)
        assert state.step == 2
        assert metrics["x"].item() == 3.0

    def test_a_loop_over_the_batches_of_a_loop(self):
        inner = fnrun.epoch_loop(train)
        tasks = [batches(2), batches(3)]
        state, _ = fnrun.repeat(fnrun.epoch_loop(inner), 2)(fresh(), tasks)
        assert state.step == 10
        fnrun.testing.assert_resumable(fnrun.repeat(fnrun.epoch_loop(inner), 2), fresh(), tasks, restored=lambda s, like: s)


class TestData:
    def test_a_function_makes_its_stream_once_and_only_when_it_is_needed(self):
        made = []

        def make(name):
            made.append(name)
            return batches(2)

        streams = {name: functools.partial(make, name) for name in ("train", "val", "never")}
        program = fnrun.repeat(
            fnrun.sequence(
                train=fnrun.epoch_loop(train, observers=[lambda s, m: made.append("tick")]),
                val=fnrun.eval_loop(lambda s, b: {"x": 0.0}),
                never=fnrun.every(5, fnrun.epoch_loop(train), last=False),
            ),
            2,
        )
        program(fresh(), streams)
        assert made == ["train", "tick", "tick", "val", "tick", "tick"]

    def test_other_data_than_the_positions_is_refused_and_may_be_asked_for(self):
        loop = fnrun.repeat(fnrun.epoch_loop(train), 2)
        rows = torch.arange(8.0)
        seen, _ = states_seen(loop, fresh(), data.arrays(rows, 2))
        for other in (data.arrays(rows, 3), data.arrays(rows + 1, 2), data.arrays(rows, 2, shuffle=True)):
            with pytest.raises(
                fnrun.ProgramError, match=r"the data of 'data' is not what the state's position \(epoch 0, batch 2\)"
            ) as error:
                loop(seen[1], other)
            assert "8 rows, 2 a batch, in order" in str(error.value)
        state = seen[1].replace(position=seen[1].position.forget("data"))
        loop(state, data.arrays(rows, 3))

    def test_streams_may_share_a_name_and_take_turns(self):
        seen = []
        step = fnrun.step(lambda state, batch: (seen.append(batch.item()), (state, {}))[1])
        stream = data.batches([torch.tensor(float(i)) for i in range(5)], name="shared")
        loop = fnrun.sequence(a=fnrun.step_loop(step, 2), b=fnrun.step_loop(step, 2))
        loop(fresh(), {"a": stream, "b": stream})
        assert seen == [0.0, 1.0, 2.0, 3.0]


class TestErrors:
    def test_a_state_that_stands_in_another_program_is_refused_with_both_shown(self):
        loop = fnrun.repeat(fnrun.sequence(train=fnrun.epoch_loop(train)), 3)
        seen, _ = states_seen(loop, fresh(), {"train": batches(2)})
        with pytest.raises(fnrun.ProgramError) as error:
            fnrun.repeat(fnrun.epoch_loop(train), 3)(seen[0], batches(2))
        message = str(error.value)
        assert "repeat /, tick 0\n    sequence /, tick 0\n      epoch_loop /train, tick 1" in message
        assert "repeat 3 times\n    epoch_loop\n      train" in message
        assert "state.rewind()" in message
        fnrun.repeat(fnrun.epoch_loop(train), 3)(seen[0].rewind(), batches(2))

    def test_a_state_that_stands_deeper_than_the_program_is_refused(self):
        seen, _ = states_seen(fnrun.repeat(fnrun.repeat(fnrun.epoch_loop(train), 2), 2), fresh(), batches(2))
        with pytest.raises(fnrun.ProgramError, match="another program"):
            fnrun.repeat(train, 2)(seen[0], batches(1)[0])

    def test_an_eval_step_in_an_epoch_loop_and_the_reverse(self):
        with pytest.raises(TypeError, match=r"a step in epoch_loop returns .state, metrics.. Is it an evaluation step"):
            fnrun.epoch_loop(lambda state, batch: {"x": 1.0})(fresh(), batches(1))
        with pytest.raises(TypeError, match="a step in eval_loop returns metrics, a dict"):
            fnrun.eval_loop(train)(fresh(), batches(1))

    def test_data_that_does_not_mirror_the_program(self):
        loop = fnrun.sequence(train=fnrun.epoch_loop(train), val=fnrun.eval_loop(lambda s, b: {}))
        with pytest.raises(fnrun.ProgramError, match=r"the data has nothing for \['val'\]"):
            loop(fresh(), {"train": batches(1), "vall": batches(1)})
        with pytest.raises(TypeError, match="a mapping with the keys"):
            loop(fresh(), batches(1))
        with pytest.raises(TypeError, match=r"data at 'train': .*data.loader"):
            loop(fresh(), {"train": torch.utils.data.DataLoader([1]), "val": batches(1)})

    def test_a_type_error_of_the_users_own_keeps_its_traceback(self):
        def make():
            raise TypeError("mine")

        with pytest.raises(TypeError, match=r"^mine$") as caught:
            fnrun.epoch_loop(train)(fresh(), make)
        assert caught.traceback[-1].name == "make"

    def test_two_hooks_of_one_name(self):
        loop = fnrun.repeat(fnrun.epoch_loop(train, hooks=[hooks.ema(0.5)]), 2, hooks=[hooks.ema(0.9)])
        with pytest.raises(fnrun.ProgramError, match="two hooks are named 'ema'"):
            loop(fresh(), batches(1))

    def test_observers_that_would_share_what_they_gather(self):
        with pytest.raises(ValueError, match=r"need names of their own.*'log', 'log'"):
            fnrun.epoch_loop(train, observers=[fnrun.observers.log(1, to=[]), fnrun.observers.log(3, to=[])])

    def test_skip_nonfinite_around_a_loop(self):
        with pytest.raises(TypeError, match="goes around a step, inside the loop"):
            fnrun.skip_nonfinite(fnrun.epoch_loop(train))(fresh(), batches(1))

    def test_a_step_that_returns_nothing(self):
        with pytest.raises(TypeError, match=r"<lambda> returned NoneType: a step returns .state, metrics."):
            fnrun.epoch_loop(fnrun.step(lambda state, batch: None))(fresh(), batches(1))

    def test_what_is_no_hook_and_no_count(self):
        with pytest.raises(TypeError, match="hooks= takes a list"):
            fnrun.epoch_loop(train, hooks=hooks.ema(0.5))
        with pytest.raises(TypeError, match="is no hook"):
            fnrun.repeat(train, 2, hooks=[fnrun.epoch_loop(train)])
        with pytest.raises(ValueError, match="at least 1 round"):
            fnrun.every(0.5, train)
        with pytest.raises(TypeError, match="is no hook"):
            fnrun.epoch_loop(train, hooks=[3])
        for make in (lambda: fnrun.repeat(train, -1), lambda: fnrun.repeat(train, 2.5), lambda: fnrun.step_loop(train, True)):
            with pytest.raises(ValueError, match="at least 0"):
                make()
        with pytest.raises(ValueError, match="how often"):
            fnrun.repeat(train)
        with pytest.raises(ValueError, match="at least 1 round"):
            fnrun.every(0, train)
        with pytest.raises(ValueError, match=r"workflow: phases \['val'\]"):
            fnrun.workflow([("train", 1), ("val", 1)], times=1, train=train)


class Watching:
    def __init__(self, fails_at=None):
        self.log, self.fails_at = [], fails_at

    def open(self, program, state):
        self.log.append("open")

    def __call__(self, state, metrics):
        if state.step == self.fails_at:
            raise RuntimeError("in the observer")
        self.log.append(state.step)

    def close(self, state, reason):
        self.log.append((state.step, reason))


class TestObservers:
    def test_they_are_opened_once_and_closed_with_the_reason(self):
        watching = Watching()
        loop = fnrun.repeat(fnrun.epoch_loop(train, observers=[watching]), 2, observers=[watching])
        loop(fresh(), batches(1))
        assert watching.log == ["open", 1, 1, 2, 2, (2, None)]
        watching.log.clear()
        polls = iter([None] * 4 + ["SIGTERM"])
        loop(fresh(), batches(1), interrupt=lambda: next(polls))
        assert watching.log == ["open", 1, 1, (1, "SIGTERM")]

    @pytest.mark.parametrize("where", ["step", "hook", "observer"])
    def test_an_exception_arrives_as_it_is_and_they_see_the_last_good_state(self, where):
        def fails(*args):
            raise RuntimeError(f"in the {where}")

        failing = fnrun.step(lambda s, b: fails() if where == "step" and s.step == 2 else (s, {}))
        hook = [lambda s, m: fails() if where == "hook" and s.step == 3 else s]
        first, second = Watching(), Watching(fails_at=3 if where == "observer" else None)
        with pytest.raises(RuntimeError, match=f"in the {where}") as caught:
            fnrun.epoch_loop(failing, hooks=hook, observers=[first, second])(fresh(), batches(5))
        assert caught.traceback[-1].name in ("fails", "__call__")
        assert first.log[-1] == (2, caught.value)
        assert second.log[-1] == (2, caught.value)

    def test_one_that_cannot_close_does_not_keep_the_others_open_nor_hide_the_cause(self):
        class Fails(Watching):
            def close(self, state, reason):
                raise OSError("full")

        last = Watching()
        with pytest.raises(OSError, match="full"):
            fnrun.epoch_loop(train, observers=[Fails(), last])(fresh(), batches(1))
        assert last.log[-1] == (1, None)
        with pytest.raises(ZeroDivisionError) as caught:
            fnrun.epoch_loop(train, hooks=[lambda s, m: 1 / 0], observers=[Fails(), last])(fresh(), batches(1))
        assert caught.value.__notes__ == ["and while closing: OSError: full"]

    def test_those_that_save_come_last_with_the_sinks_flushed(self):
        order = []

        class Saves:
            saves = True

            def __call__(self, state, metrics):
                order.append("save")

        class Sink:
            def __call__(self, state, metrics):
                order.append("write")

            def flush(self):
                order.append("flush")

        fnrun.epoch_loop(train, observers=[Saves(), Sink()])(fresh(), batches(1))
        assert order[:3] == ["write", "flush", "save"]

    def test_an_interrupt_leaves_no_trace_in_the_state(self):
        loop, stream = fnrun.repeat(fnrun.epoch_loop(train), 3), batches(2)
        polls = iter([None] * 5 + ["now"])
        state, _ = loop(fresh(), stream, interrupt=lambda: next(polls))
        assert state.stop is None
        assert_same(loop(state, stream)[0], loop(fresh(), stream)[0], "after the interrupt")


def test_a_program_can_be_printed():
    program = fnrun.repeat(
        fnrun.sequence(
            train=fnrun.epoch_loop(train, hooks=[hooks.ema(0.9)]),
            val=fnrun.every(2, fnrun.eval_loop(lambda s, b: {}), begin=4),
        ),
        10,
        observers=[print],
    )  # fmt: skip
    out = io.StringIO()
    print(program, file=out)
    assert isinstance(program, Loop)
    lines = out.getvalue().splitlines()
    assert lines[0] == "repeat 10 times"
    assert lines[1] == "  sequence"
    assert lines[2] == "    train: epoch_loop"
    assert lines[4] == "      hook ema 0.9"
    assert "    val: every round, each 2, from 4, and the last" in lines
    assert lines[-1] == "  observer print"


def test_no_warning_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state, _ = fnrun.epoch_loop(train, hooks=[hooks.ema(0.5)])(fresh(), batches(2))
        fnrun.eval_loop(lambda s, b: {"x": 0.0})(state, batches(1))


class TestStraightOn:
    """Ticks that nobody looks at follow each other; the states, metrics and lines are those of tick by tick."""

    @staticmethod
    def made(donate: bool = False, every: int = 5, more: tuple[Any, ...] = ()) -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
        optimizer = fnrun.optim.adamw(1e-2)
        step = fnrun.make_train_step(model, lambda m, b: (m(b).square().mean(), {"size": float(len(b))}), optimizer)
        lines: list[Any] = []

        class Kept:
            def open(self, state: Any) -> None: ...
            def flush(self) -> None: ...
            def close(self) -> None: ...
            def write(self, record: Any) -> None:
                lines.append(record._replace(clock={}))

        watching = [fnrun.observers.log(every, to=[Kept()], window=7, statistics={"loss": ["mean", "max", ("last", "line")]}), *more]
        loop = fnrun.repeat(
            fnrun.sequence(
                a=fnrun.epoch_loop(step, observers=watching, donate=donate),
                b=fnrun.step_loop(step, 30, until_step=70, observers=more, donate=donate),
            ),
            3,
        )
        rows = torch.randn(47, 3, generator=torch.Generator().manual_seed(1))
        stream = fnrun.data.arrays(rows, 4, shuffle=True)
        return loop, fnrun.TrainState.create(model, optimizer), {"a": stream, "b": stream}, lines

    @pytest.mark.parametrize("donate", [False, True])
    def test_it_is_tick_by_tick_to_the_bit(self, donate: bool) -> None:
        straight, state, data, lines = self.made(donate)
        looked, _, _, others = self.made(donate, more=(lambda state, metrics: None,))
        assert_same(straight(state, data), looked(state, data), "straight on, the program ends differently")
        assert_same(lines, others, "straight on, the log has other lines")

    def test_interrupts_are_asked_at_each_tick(self) -> None:
        straight, state, data, lines = self.made()
        end, _ = straight(state, data)
        whole = list(lines)
        for n in (2, 7, 20, 33, 61, 100):
            straight, state, data, lines = self.made()
            left, right = iter(range(n)), iter(range(n))
            first, _ = straight(state, data, interrupt=lambda left=left: "now" if next(left, None) is None else None)
            assert first.position.frames, n
            looked, _, _, _ = self.made(more=(lambda state, metrics: None,))
            other, _ = looked(state, data, interrupt=lambda right=right: "now" if next(right, None) is None else None)
            assert_same(first, other, f"asked {n} times, the two stand in different places")
            assert_same(straight(first, data)[0], end, f"interrupted at {n} and continued, the program ends in another state")
            assert_same(lines, whole, f"interrupted at {n} and continued, the log has other lines")

    def test_an_exception_leaves_the_state_of_the_last_tick(self, tmp_path: Any) -> None:
        model, optimizer = torch.nn.Linear(3, 1), fnrun.optim.sgd(0.1)

        def loss(model: Any, batch: Any) -> Any:
            if len(batch) == 3:
                raise ZeroDivisionError
            return model(batch).square().mean()

        step, state = fnrun.make_train_step(model, loss, optimizer), fnrun.TrainState.create(model, optimizer)
        stream = fnrun.data.arrays(torch.randn(47, 3), 4)
        with fnrun.checkpoint.Checkpoints(tmp_path) as checkpoints:
            loop = fnrun.repeat(fnrun.epoch_loop(step), 2, observers=[fnrun.observers.checkpoint(checkpoints)])
            with pytest.raises(ZeroDivisionError):
                loop(state, stream)
            saved = checkpoints.restore(like=state)
        assert (saved.step, saved.position.frames[-1].ticks) == (11, 11)


def test_a_monitor_that_no_member_can_report_is_refused_at_any_depth() -> None:
    stop = hooks.early_stopping("val/c/loss", patience=1)
    inner = fnrun.sequence(a=fnrun.eval_loop(lambda s, b: {}), b=fnrun.eval_loop(lambda s, b: {}))
    with pytest.raises(ValueError, match=r"no step reports 'val/c/loss': the members here are 'train', 'val/a', 'val/b'"):
        fnrun.repeat(fnrun.sequence(train=fnrun.epoch_loop(train), val=inner), 3, hooks=[stop])
    lone = fnrun.repeat(fnrun.epoch_loop(train), 3, hooks=[hooks.early_stopping("val/loss", patience=1)])
    with pytest.raises(ValueError, match=r"no step reports 'val/loss'; reported: 'loss', 'size'"):
        lone(fresh(), [torch.ones(2)] * 3)


def test_predictions_that_an_observer_takes_need_not_be_kept() -> None:
    seen: list[Any] = []
    loop = fnrun.predict_loop(
        lambda s, b: b * 2, observers=[lambda s, m: seen.append((m["outputs"], s.position.frames[-1].totals))], keep=False
    )
    assert loop(fresh(), [torch.ones(1), torch.zeros(1)])[1] == []
    assert [(float(outputs), kept) for outputs, kept in seen] == [(2.0, None), (0.0, None)]


def test_a_program_says_how_many_steps_it_has_where_that_is_known() -> None:
    steps, evaluates = fnrun.step_loop(train, 50), fnrun.every(2, fnrun.eval_loop(lambda s, b: {}))
    assert str(fnrun.repeat(fnrun.sequence(train=steps, val=evaluates), 20)).splitlines()[0] == "repeat 20 times, 1,000 steps in all"
    flow = fnrun.workflow([("train", 2), ("val", 1)], times=3, train=steps, val=evaluates)
    assert str(flow).splitlines()[0].endswith("3 times, 150 steps in all")
    for unknown in (fnrun.epoch_loop(train), fnrun.step_loop(train, 50, until_step=60), fnrun.eval_loop(lambda s, b: {})):
        assert "in all" not in str(fnrun.repeat(unknown, 2))


def test_a_dry_run_is_one_tick_of_every_loop() -> None:
    seen: list[int] = []
    loop = fnrun.repeat(
        fnrun.sequence(
            train=fnrun.epoch_loop(train, observers=[lambda s, m: seen.append(1)]),
            val=fnrun.every(3, fnrun.eval_loop(lambda s, b: {"a": b.mean()})),
        ),
        9,
    )
    state, batches = fresh(), [torch.ones(2)] * 5
    ran = loop.dry_run(state, {"train": batches, "val": batches})
    assert "train/loss" in ran.metrics
    assert "val/a" in ran.metrics
    assert "train: epoch_loop" in str(ran)
    assert (state.step, seen) == (0, [])
