"""What may be asked of a step goes together: every pair of options trains the numbers of the plain composition, or is refused when it is made.

The plain composition is written out in torch: modules that are called, `backward`, `torch.optim.SGD`, the same keys. Graphs are recorded, and
run as they are: whether inductor keeps the numbers is its own matter, and takes seconds each time.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fnrun
from fnrun import data, hooks, optim
from fnrun.testing import assert_same

ROWS = 8
G = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(ROWS, 6, generator=G), torch.randint(0, 3, (ROWS,), generator=G)) for _ in range(4)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(torch.tanh(self.norm(self.layer(x))))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Block(), Block(), nn.Linear(8, 3))


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x).float(), y)


# --- the options, and the same by hand ----------------------------------------------------------------------------------

#: Those that train something else than the plain step; the others change how it is done.
OTHER_NUMBERS = {"microbatches", "precision", "accumulate"}
OPTIONS = (
    "microbatches", "compile", "fused steps", "donate", "skip_nonfinite", "precision", "loss scaling", "accumulate", "partition", "EMA",
    "checkpointed activations",
)  # fmt: skip
#: What is refused when it is made, and in which words.
REFUSED = {frozenset({"fused steps", "EMA"}): "acts every 1 steps"}


def steps(chosen: set[str]) -> int:
    return 4 if "EMA" in chosen else 2


def made(chosen: set[str], every: int = 1) -> tuple[Any, Any]:
    """The loop and the state to begin with."""
    model, optimizer = network(), optim.sgd(0.1, momentum=0.9)
    if "partition" in chosen:
        optimizer = optim.partition(optim.decay_labels, {"decay": optimizer, "no_decay": optim.sgd(0.1, momentum=0.9)})
    if "accumulate" in chosen:
        optimizer = optim.accumulate(2, optimizer)
    if "loss scaling" in chosen:
        optimizer = optim.dynamic_loss_scale(optimizer)
    step: Any = fnrun.make_train_step(
        model,
        loss_fn,
        optimizer,
        microbatches=2 if "microbatches" in chosen else 1,
        precision="bf16" if "precision" in chosen else None,
        checkpoint_activations="blocks" if "checkpointed activations" in chosen else None,
        compile=bool(chosen & {"compile", "fused steps"}),
    )
    if "skip_nonfinite" in chosen:
        step = fnrun.skip_nonfinite(step)
    loop = fnrun.step_loop(
        step,
        steps(chosen),
        hooks=[hooks.ema(0.9, every=every)] if "EMA" in chosen else [],
        donate="donate" in chosen,
        fused_steps=2 if "fused steps" in chosen else 1,
    )
    return loop, fnrun.TrainState.create(model, optimizer, seed=3)


def by_hand(chosen: set[str], steps: int, every: int = 1) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Parameters, buffers, and their average."""
    model, key, n = network(), fnrun.Key(3), 2 if "microbatches" in chosen else 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    within = (lambda: torch.autocast("cpu", torch.bfloat16)) if "precision" in chosen else contextlib.nullcontext
    average: dict[str, Any] = {}
    for count, batch in enumerate(BATCHES[:steps]):
        before, after = {name: b.clone() for name, b in model.named_buffers()}, []
        for i in range(n):
            x, y = (part[ROWS * i // n : ROWS * (i + 1) // n] for part in batch)
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
            with key.fold_in("train", count, *([i] if n > 1 else [])).scope(), within():
                loss = loss_fn(model, (x, y))
            (loss / n / (2 if "accumulate" in chosen else 1)).backward()
            after.append({name: b.clone() for name, b in model.named_buffers()})
        for name, buffer in model.named_buffers():
            buffer.copy_(sum(each[name] for each in after) / n)
        if "accumulate" not in chosen or count % 2:
            optimizer.step()
            optimizer.zero_grad()
        if (count + 1) % every == 0:
            for name, p in model.named_parameters():
                average[name] = p.detach().clone() if name not in average else 0.9 * average[name] + 0.1 * p.detach()
    return {name: p.detach() for name, p in model.named_parameters()}, dict(model.named_buffers()), average


@pytest.mark.parametrize("pair", list(itertools.combinations(OPTIONS, 2)), ids=" and ".join)
def test_two_options_train_what_they_say_together(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, every = set(pair), 1
    graphs: list[Any] = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *args: graphs.append(graph) or graph)
    if words := REFUSED.get(frozenset(pair)):
        with pytest.raises(ValueError, match=words):
            made(chosen)
        every = 2  # and so it is not
    undonated = (
        pytest.warns(UserWarning, match="donate=True: .* cannot write the new state over the old one")
        if chosen == {"donate", "skip_nonfinite"}
        else contextlib.nullcontext()
    )
    with undonated:
        loop, state = made(chosen, every)
    end, _ = loop(state, data.batches(BATCHES))
    assert bool(graphs) == bool(chosen & {"compile", "fused steps"})
    params, buffers, average = by_hand(chosen & OTHER_NUMBERS, steps(chosen), every)
    torch.testing.assert_close(dict(end.params), params, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(end.buffers), buffers, rtol=1e-4, atol=1e-6)
    if "EMA" in chosen:
        torch.testing.assert_close(dict(end.memory["ema"]["params"]), average, rtol=1e-4, atol=1e-6)
    assert end.step == steps(chosen)


@pytest.mark.parametrize("option", ["donate", "skip_nonfinite", "checkpointed activations"])
def test_what_only_changes_how_it_is_done_keeps_the_bits(option: str) -> None:
    ends: list[Any] = []
    for chosen in (set[str](), {option}):
        loop, state = made(chosen)
        ends.append(loop(state, data.batches(BATCHES))[0])
    assert_same(ends[0].params, ends[1].params, option)
    assert_same(ends[0].buffers, ends[1].buffers, option)


def test_a_graph_is_that_of_the_step_which_keeps_its_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """So its bits are, whatever inductor makes of it."""
    graphs: list[Any] = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *args: graphs.append(graph) or graph)
    for chosen in ({"compile"}, {"compile", "checkpointed activations"}):
        loop, state = made(chosen)
        loop(state, data.batches(BATCHES))
    assert graphs[0].code == graphs[1].code
