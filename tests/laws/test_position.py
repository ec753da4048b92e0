"""Law 2: where the program stands is in the state, so it goes on from every state to the same end."""

from __future__ import annotations

from hypothesis import HealthCheck, example, given, settings, strategies as st

from fnrun.checkpoint import Checkpoints
from fnrun.core import tree
from fnrun.testing import assert_resumable, assert_same, states_seen
from tests.programs import build, fresh, lengths, logs, programs

many = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
few = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))


@many
@given(programs, lengths)
@example(("wrapped", ("sequence", ("epoch",), ("wrapped", ("epoch",)))), [1] * 6)  # what stands in a wrapper's wrapper may be over already
def test_resumes_from_every_observed_state(program, lens):
    loop, data = build(program, lens, observers=logs)
    if states_seen(loop, fresh(), data)[0]:
        assert_resumable(loop, fresh(), data, limit=8, restored=lambda state, like: tree.snapshot(state))


@few
@given(programs, lengths)
def test_resumes_from_checkpoints_on_disk(program, lens):
    loop, data = build(program, lens)
    if states_seen(loop, fresh(), data)[0]:
        assert_resumable(loop, fresh(), data, limit=4)


@many
@given(programs, lengths, st.integers(1, 12))
def test_goes_on_from_a_stop_to_the_same_end(program, lens, step):
    """A stop unwinds all open loops; cleared, the program ends as if the hook had only taken note."""
    loop, data = build(program, lens, stop_at=step)
    state, metrics = loop(fresh(), data)
    while state.stop is not None:
        assert state.position.frames, "a stop leaves the frames standing"
        assert tree.equal(loop(state, data)[0], state), "a stopped state goes nowhere until its stop is cleared"
        state, metrics = loop(state.replace(stop=None), data)
    never, data = build(program, lens, stop_at=step, silent=True)
    assert_same(never(fresh(), data), (state, metrics), "stopped and continued, the program ends elsewhere")


@many
@given(programs, lengths, st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_goes_on_from_interrupts_to_the_same_end(program, lens, polls):
    loop, data = build(program, lens)
    end, end_metrics = loop(fresh(), data)
    state, metrics = fresh(), None
    for n in polls:
        left = iter(range(n))
        state, metrics = loop(state, data, interrupt=lambda left=left: "now" if next(left, None) is None else None)
        if not state.position.frames:
            break
    else:
        state, metrics = loop(state, data)
    assert_same(end, state, "interrupted and continued, the program ends in another state")
    assert_same(end_metrics, metrics, "interrupted and continued, the program ends with other metrics")


def test_two_checkpoints_at_one_step_in_the_middle_of_validation(tmp_path):
    program = ("repeat", ("sequence", ("epoch",), ("eval",)), 2)
    loop, data = build(program, [3, 2])
    seen, (end, _) = states_seen(loop, fresh(), data)
    validating = [s for s in seen if s.position.frames[-1].kind == "eval_loop"]
    with Checkpoints(tmp_path) as checkpoints:
        for state in validating[:2]:
            checkpoints.save(state)
        checkpoints.wait()
        assert checkpoints.steps() in ([validating[0].step], [validating[0].step, validating[1].step])
        restored = checkpoints.restore(like=fresh())
    assert_same(restored, validating[1], "the newest of two at one step")
    assert_same(loop(restored, data)[0], end, "the end")
