"""Schedules against torch's and optax's, and what holds for each: closed form, ints and tensors, the last value for ever."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optax
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fnrun import schedules

#: Every schedule, and the step after which it stays as it is (None: it goes on for ever).
ALL: dict[str, tuple[schedules.Schedule, int | None]] = {
    "constant": (schedules.constant(0.1), 0),
    "linear": (schedules.linear(1.0, 0.1, 20), 20),
    "linear of no steps": (schedules.linear(1.0, 0.1, 0), 0),
    "polynomial": (schedules.polynomial(1.0, 0.1, 20, 2.0), 20),
    "exponential": (schedules.exponential(1.0, 0.9, every=3), None),
    "step": (schedules.step(1.0, 7, 0.5), None),
    "multistep": (schedules.multistep(1.0, [12, 5, 5], 0.1), 12),
    "inverse_sqrt": (schedules.inverse_sqrt(1.0, 5), None),
    "inverse_time": (schedules.inverse_time(1.0, 0.5, every=2, power=2.0), None),
    "cosine": (schedules.cosine(1.0, 20, floor=0.1), 20),
    "cosine_restarts": (schedules.cosine_restarts(1.0, [5, 10, 7], [1.0, 0.5, 0.2], floor=0.1), 22),
    "flat_cosine": (schedules.flat_cosine(1.0, 10, 20, floor=0.1), 20),
    "cyclic": (schedules.cyclic(0.1, 1.0, 4, 6), None),
    "cyclic triangular2": (schedules.cyclic(0.1, 1.0, 4, mode="triangular2"), None),
    "one_cycle": (schedules.one_cycle(1.0, 20), 19),
    "one_cycle three phases": (schedules.one_cycle(1.0, 30, kind="linear", three_phase=True), 29),
    "trapezoid": (schedules.trapezoid(1.0, 5, 30, 10, floor=0.1, start=0.2), 30),
    "warmup_cosine": (schedules.warmup_cosine(1.0, 5, 30, floor=0.1), 30),
    "warmup_cosine without warmup": (schedules.warmup_cosine(1.0, 0, 30), 30),
    "piecewise": (schedules.piecewise([0.1, 0.5, 0.2], [3, 9]), 9),
    "join": (schedules.join([schedules.linear(0.0, 1.0, 5), schedules.cosine(1.0, 10)], [5]), 15),
    "multiply": (schedules.multiply(schedules.linear(0.0, 1.0, 5), schedules.cosine(1.0, 10), 2.0), 10),
    "warmup": (schedules.warmup(schedules.cosine(1.0, 20), 5, "exponential", ratio=0.01), 20),
    "warmup constant": (schedules.warmup(0.5, 5, "constant"), 5),
}
every = pytest.mark.parametrize("name", ALL)


@every
def test_past_its_end_a_schedule_stays_at_its_last_value(name: str) -> None:
    schedule, end = ALL[name]
    if end is not None:
        assert all(schedule(end + more) == schedule(end) for more in (1, 10, 10_000))


@every
def test_ints_and_tensors_give_the_same_values(name: str) -> None:
    schedule, _ = ALL[name]
    steps = [*range(60), 1_000]
    values = schedule(torch.tensor(steps))
    assert values.dtype == torch.float64
    assert values.shape == (61,)
    assert torch.allclose(values, torch.tensor([schedule(step) for step in steps], dtype=torch.float64), rtol=1e-12, atol=1e-15)
    assert schedule(torch.tensor(3)).shape == ()


@every
@settings(deadline=None)
@given(steps=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_value_depends_on_the_argument_alone(name: str, steps: list[int]) -> None:
    schedule, _ = ALL[name]
    first = {step: schedule(step) for step in steps}
    assert all(schedule(step) == first[step] for step in reversed(steps))
    assert all(isinstance(value, float) and math.isfinite(value) for value in first.values())


@every
def test_works_under_vmap(name: str) -> None:
    schedule, _ = ALL[name]
    steps = torch.arange(30)
    assert torch.allclose(torch.func.vmap(schedule)(steps), schedule(steps))


def torch_curve(make: Callable[[Any], Any], lr: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, values = make(optimizer), []
    for _ in range(steps):
        values.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return values


T = torch.optim.lr_scheduler
TORCH: dict[str, tuple[schedules.Schedule, Callable[[Any], Any], float, int]] = {
    "ConstantLR": (schedules.warmup(0.3, 5, "constant", ratio=0.5), lambda o: T.ConstantLR(o, 0.5, 5), 0.3, 12),
    "LinearLR": (schedules.linear(0.1, 0.3, 8), lambda o: T.LinearLR(o, 1 / 3, 1.0, 8), 0.3, 15),
    "LinearLR as warmup": (schedules.warmup(0.3, 8, "linear", ratio=0.25), lambda o: T.LinearLR(o, 0.25, 1.0, 8), 0.3, 15),
    "ExponentialLR": (schedules.exponential(0.3, 0.9), lambda o: T.ExponentialLR(o, 0.9), 0.3, 30),
    "StepLR": (schedules.step(0.3, 7, 0.5), lambda o: T.StepLR(o, 7, 0.5), 0.3, 30),
    "MultiStepLR": (schedules.multistep(0.3, [5, 5, 12], 0.1), lambda o: T.MultiStepLR(o, [5, 5, 12], 0.1), 0.3, 30),
    "PolynomialLR": (schedules.polynomial(0.3, 0.0, 20, 2.0), lambda o: T.PolynomialLR(o, 20, 2.0), 0.3, 30),
    "CosineAnnealingLR": (schedules.cosine(0.3, 20, 0.01), lambda o: T.CosineAnnealingLR(o, 20, 0.01), 0.3, 21),  # torch climbs again
    "CosineAnnealingWarmRestarts": (
        schedules.cosine_restarts(0.3, [5, 10, 20], floor=0.01),
        lambda o: T.CosineAnnealingWarmRestarts(o, 5, 2, 0.01),
        0.3,
        35,
    ),
    "CyclicLR": (schedules.cyclic(0.1, 0.5, 4, 6), lambda o: T.CyclicLR(o, 0.1, 0.5, 4, 6, cycle_momentum=False), 0.1, 40),
    "CyclicLR triangular2": (
        schedules.cyclic(0.1, 0.5, 4, mode="triangular2"),
        lambda o: T.CyclicLR(o, 0.1, 0.5, 4, mode="triangular2", cycle_momentum=False),
        0.1,
        40,
    ),
    "CyclicLR exp_range": (
        schedules.cyclic(0.1, 0.5, 4, mode="exp_range", gamma=0.95),
        lambda o: T.CyclicLR(o, 0.1, 0.5, 4, mode="exp_range", gamma=0.95, cycle_momentum=False),
        0.1,
        40,
    ),
    "OneCycleLR": (schedules.one_cycle(0.3, 30), lambda o: T.OneCycleLR(o, 0.3, 30, cycle_momentum=False), 0.3, 30),
    "OneCycleLR linear": (
        schedules.one_cycle(0.3, 30, rise=0.4, kind="linear"),
        lambda o: T.OneCycleLR(o, 0.3, 30, pct_start=0.4, anneal_strategy="linear", cycle_momentum=False),
        0.3,
        30,
    ),
    "OneCycleLR three phases": (
        schedules.one_cycle(0.3, 40, three_phase=True),
        lambda o: T.OneCycleLR(o, 0.3, 40, three_phase=True, cycle_momentum=False),
        0.3,
        40,
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_agrees_with_torchs_schedulers(name: str) -> None:
    schedule, make, lr, steps = TORCH[name]
    expected = torch_curve(make, lr, steps)
    assert [schedule(step) for step in range(steps)] == pytest.approx(expected, rel=1e-9, abs=1e-12)


OPTAX: dict[str, tuple[schedules.Schedule, Any]] = {
    "constant": (schedules.constant(0.3), optax.constant_schedule(0.3)),
    "linear": (schedules.linear(0.3, 0.1, 20), optax.linear_schedule(0.3, 0.1, 20)),
    "polynomial": (schedules.polynomial(0.3, 0.1, 20, 3.0), optax.polynomial_schedule(0.3, 0.1, 3.0, 20)),
    "exponential": (schedules.exponential(0.3, 0.9, every=5), optax.exponential_decay(0.3, 5, 0.9)),
    "step": (schedules.step(0.3, 5, 0.5), optax.exponential_decay(0.3, 5, 0.5, staircase=True)),
    "multistep": (schedules.multistep(0.3, [5, 9], 0.1), optax.piecewise_constant_schedule(0.3, {5: 0.1, 9: 0.1})),
    "cosine": (schedules.cosine(0.3, 20, 0.03), optax.cosine_decay_schedule(0.3, 20, 0.1)),
    "warmup_cosine": (schedules.warmup_cosine(0.3, 5, 30, 0.01, 0.1), optax.warmup_cosine_decay_schedule(0.1, 0.3, 5, 30, 0.01)),
    "join": (
        schedules.join([schedules.linear(0.1, 0.3, 5), schedules.cosine(0.3, 10)], [5]),
        optax.join_schedules([optax.linear_schedule(0.1, 0.3, 5), optax.cosine_decay_schedule(0.3, 10)], [5]),
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_agrees_with_optax(name: str) -> None:
    schedule, reference = OPTAX[name]
    assert [schedule(step) for step in range(50)] == pytest.approx([float(reference(step)) for step in range(50)], rel=1e-5, abs=1e-7)


def test_inverse_sqrt_is_the_transformers_schedule() -> None:
    width, warmup = 512, 4_000
    schedule = schedules.inverse_sqrt((width * warmup) ** -0.5, warmup)
    for step in (1, 100, 3_999, 4_000, 4_001, 100_000):
        assert schedule(step) == pytest.approx(width**-0.5 * min(step**-0.5, step * warmup**-1.5))


def test_trapezoid_holds_between_warmup_and_decay() -> None:
    schedule = schedules.trapezoid(1.0, warmup=10, total=100, decay=20)
    assert [schedule(s) for s in (0, 5, 10, 50, 80, 90, 100)] == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_join_starts_each_member_at_its_own_step_0() -> None:
    identity: schedules.Schedule = lambda step: step  # noqa: E731
    assert [schedules.join([identity, identity, identity], [3, 5])(step) for step in range(8)] == [0, 1, 2, 0, 1, 0, 1, 2]


def test_warmup_multiplies_and_does_not_shift() -> None:
    base = schedules.cosine(1.0, 100)
    warm = schedules.warmup(base, 10, "linear", ratio=0.0)
    assert [warm(step) for step in (0, 5, 10, 60)] == pytest.approx([0.0, 0.5 * base(5), base(10), base(60)])


def test_epochs_and_batch_size() -> None:
    assert schedules.epochs(2.5, steps_per_epoch=10) == 25
    assert schedules.scale_by_batch_size(schedules.linear(0.0, 1.0, 10), batch=512)(5) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.cosine_restarts(1.0, [5, 5], [1.0]), "as many weights as periods, at least one; got 1 and 2"),
        (lambda: schedules.warmup_cosine(1.0, 20, 10), "warmup_cosine: 0 <= warmup <= total; got warmup=20, total=10"),
        (lambda: schedules.join([schedules.constant(1.0)], [3]), "join: one member more than boundaries, and boundaries that rise; got 1"),
        (lambda: schedules.piecewise([1.0, 2.0, 3.0], [5, 5]), "boundaries that rise"),
        (lambda: schedules.warmup(1.0, 5, "exp"), "kind is one of linear, constant, exponential, not 'exp'"),
        (lambda: schedules.warmup(1.0, 5, "exponential", ratio=0.0), "begins above 0"),
        (lambda: schedules.cyclic(0.0, 1.0, 4, mode="square"), "mode is one of triangular, triangular2, exp_range, not 'square'"),
        (lambda: schedules.linear(0.0, 1.0, -1), "steps is a number of steps, at least 0, not -1"),
    ],
)
def test_what_makes_no_schedule_is_refused_in_words(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_a_power_beyond_all_floats_is_infinite_for_ints_too() -> None:
    assert schedules.exponential(1.0, 1.1)(10_000) == math.inf


def test_members_of_somebody_elses_give_tensors_of_values_too() -> None:
    steps = torch.arange(5)
    for schedule, expected in (
        (schedules.join([lambda t: 0.1, lambda t: 0.3], [2]), [0.1, 0.1, 0.3, 0.3, 0.3]),
        (schedules.multiply(2.0, 3.0), [6.0] * 5),
    ):
        values = schedule(steps)
        assert values.dtype == torch.float64
        assert values.tolist() == expected
    assert type(schedules.constant(1)(3)) is float
