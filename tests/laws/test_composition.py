"""Laws 4 and 5: hooks compose, loops compose."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings, strategies as st

import fnrun
from fnrun import hooks
from fnrun.testing import assert_same
from tests.programs import Build, Counter, build, fresh, lengths, plain_hook, programs, train

many = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def scale(state, metrics):
    return state.replace(params={"x": state.params["x"] * 2.0})


def shift(state, metrics):
    return state.replace(params={"x": state.params["x"] + metrics["loss"]})


@many
@given(programs, lengths)
def test_repeating_once_changes_nothing(program, lens):
    loop, data = build(program, lens)
    once, _ = build(program, lens)
    assert_same(fnrun.repeat(once, 1)(fresh(), data), loop(fresh(), data), "repeat(loop, 1) is not loop")


@many
@given(st.integers(0, 4), st.integers(0, 4), st.integers(1, 4))
def test_repeats_multiply(a, b, n):
    data = Build([n]).stream()
    nested = fnrun.repeat(fnrun.repeat(fnrun.epoch_loop(train), a), b)
    flat = fnrun.repeat(fnrun.epoch_loop(train), a * b)
    assert_same(nested(fresh(), data)[0], flat(fresh(), data)[0], "repeat(repeat(s, a), b) is not repeat(s, a * b)")


@many
@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_is_so_many_steps(n, epochs, cut):
    data = Build([n]).stream()
    by_epoch = fnrun.repeat(fnrun.epoch_loop(train), epochs)(fresh(), data)[0]
    first = min(cut, n * epochs)
    state = fnrun.step_loop(train, first)(fresh(), data)[0]
    by_step = fnrun.step_loop(train, n * epochs - first)(state, data)[0]
    assert_same(by_epoch, by_step, "epochs are not as many steps")


@many
@given(st.lists(st.sampled_from([plain_hook, scale, shift, "ema", "counter"]), max_size=5), st.integers(0, 5), st.integers(0, 5))
def test_hooks_compose_left_to_right(kinds, i, j):
    def made():
        fresh_hooks = {"ema": lambda k: hooks.ema(0.5, name=f"ema {k}"), "counter": lambda k: Counter(f"counter {k}", None)}
        return [fresh_hooks[kind](k) if isinstance(kind, str) else kind for k, kind in enumerate(kinds)]

    data = Build([3]).stream()
    low, high = sorted((min(i, len(kinds)), min(j, len(kinds))))
    apart, together = made(), made()
    together = [*together[:low], hooks.compose(*together[low:high]), *together[high:]]
    one = fnrun.epoch_loop(train, hooks=apart)(fresh(), data)
    two = fnrun.epoch_loop(train, hooks=together)(fresh(), data)
    assert_same(one, two, "hooks=[f, g] is not hooks=[compose(f, g)]")


def test_the_order_of_hooks_counts():
    data = Build([2]).stream()
    one = fnrun.epoch_loop(train, hooks=[scale, shift])(fresh(), data)[0]
    two = fnrun.epoch_loop(train, hooks=[shift, scale])(fresh(), data)[0]
    assert one.params["x"].tolist() != two.params["x"].tolist()
