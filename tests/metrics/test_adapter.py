import functools
import subprocess
import sys
import warnings

import pytest
import torch
import torchmetrics
from hypothesis import given, settings, strategies as st
from torch import nn
from torchmetrics import classification, functional, regression, retrieval, text, wrappers

import fnrun
from fnrun import data, metrics, testing
from fnrun.core import tree
from fnrun.metrics.adapter import _adapted, _values  # pyright: ignore[reportPrivateUsage]
from tests.metrics.folds import agree, cut, generator, merged, scored

pytestmark = pytest.mark.filterwarnings("ignore:Metric .* will save all:UserWarning", "ignore:No positive samples:UserWarning")


def classes(seed, n=20):
    scores, labels = scored(seed, n)
    return scores, labels.clamp(min=0)


def numbers(seed, n=20):
    return torch.randn(n, generator=generator(seed)), torch.randn(n, generator=generator(seed + 1))


def two_columns(seed, n=20):
    return tuple(torch.stack(numbers(seed + i, n), 1) for i in (0, 5))


def one_column(seed, n=20):
    return (torch.rand(n, generator=generator(seed)),)


def queries(seed, n=20):
    relevant = torch.randint(0, 2, (n,), generator=generator(seed))
    return torch.rand(n, generator=generator(seed + 1)), relevant, torch.randint(0, 4, (n,), generator=generator(seed + 2))


def probabilities(seed, n=20):
    return torch.rand(n, generator=generator(seed)), torch.randint(0, 2, (n,), generator=generator(seed + 1))


def tokens(seed, n=20):
    return torch.randn(n, 3, 7, generator=generator(seed)), torch.randint(0, 7, (n, 3), generator=generator(seed + 1))


def sentences(seed, n=20):
    return tokens(seed, n)[1], tokens(seed + 3, n)[1]


def quietly(build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build()


#: Every kind of state and of reduction that torchmetrics has: sums, means, extremes, tensors and lists that are joined, states without
#: a reduction, wrappers, collections; tensors, tuples and dicts computed.
METRICS = {
    "sum": (lambda: classification.MulticlassF1Score(4), classes),
    "per class": (lambda: classification.MulticlassPrecision(4, average=None), classes),
    "samplewise": (lambda: classification.MulticlassAccuracy(7, multidim_average="samplewise"), sentences),
    "confusion": (lambda: classification.MulticlassConfusionMatrix(4), classes),
    "cat": (lambda: classification.MulticlassAUROC(4), classes),
    "binned": (lambda: classification.MulticlassAUROC(4, thresholds=20), classes),
    "tuple": (lambda: classification.BinaryROC(thresholds=5), probabilities),
    "mean": (torchmetrics.MeanMetric, one_column),
    "max": (torchmetrics.MaxMetric, one_column),
    "min": (torchmetrics.MinMetric, one_column),
    "cat tensor": (torchmetrics.CatMetric, one_column),
    "no reduction": (regression.PearsonCorrCoef, numbers),
    "no reduction, several": (lambda: regression.PearsonCorrCoef(num_outputs=2), two_columns),
    "ranks": (regression.SpearmanCorrCoef, numbers),
    "r2": (regression.R2Score, numbers),
    "several outputs": (lambda: wrappers.MultioutputWrapper(regression.MeanSquaredError(), 2), two_columns),
    "class by class": (lambda: wrappers.ClasswiseWrapper(classification.MulticlassRecall(4, average=None)), classes),
    "lists without reduction": (retrieval.RetrievalMAP, queries),
    "perplexity": (text.Perplexity, tokens),
    "collection": (
        lambda: torchmetrics.MetricCollection(
            {
                "acc": classification.MulticlassAccuracy(4),
                "prec": classification.MulticlassPrecision(4),
                "each": wrappers.ClasswiseWrapper(classification.MulticlassRecall(4, average=None)),
            },
            prefix="a_",
            postfix="_z",
        ),
        classes,
    ),
}
each = pytest.mark.parametrize("name", METRICS)


@each
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_merged_folds_are_torchmetrics_own_updates(name, seed):
    make, rows = METRICS[name]
    own = quietly(make)
    adapted = metrics.from_torchmetrics(own)
    whole = rows(seed)
    parts = [part for part in cut(whole, seed) if len(part[0]) > 1]
    for part in parts or [whole]:
        own.update(*part)
    ordered = name in ("samplewise", "cat tensor")
    folds = [adapted(*part) for part in parts or [whole]]
    fold = functools.reduce(lambda one, other: one.merge(other), folds) if ordered else merged(folds, seed)
    torch.testing.assert_close(fold.compute(), _values(own.compute()), rtol=1e-4, atol=1e-5, equal_nan=True)


@each
def test_the_users_metric_and_the_folds_stay_as_they_are(name):
    make, rows = METRICS[name]
    own = quietly(make)
    own.update(*rows(0))
    parts = dict(own.items(keep_base=True)) if isinstance(own, torchmetrics.MetricCollection) else {"": own}
    states = {key: tree.snapshot(part.metric_state) for key, part in parts.items()}
    adapted = metrics.from_torchmetrics(own)
    one, other = adapted(*rows(1)), adapted(*rows(2))
    kept = tree.snapshot((one, other))
    one.merge(other).compute()
    agree(one.compute(), one.compute())
    assert tree.equal((one, other), kept)
    for key, part in parts.items():
        assert tree.equal(part.metric_state, states[key])


@each
def test_a_fold_is_restored_by_a_process_that_makes_the_same_metric(name, monkeypatch):
    make, rows = METRICS[name]
    fold = metrics.from_torchmetrics(quietly(make))(*rows(0))
    expected = fold.merge(fold).compute()
    state = fnrun.TrainState.create(nn.Linear(1, 1))
    restored = testing.through_a_checkpoint(state.replace(memory={"fold": fold}), state).memory["fold"]
    assert tree.equal(restored, fold)
    monkeypatch.setattr("fnrun.metrics.adapter._adapted", {})
    with pytest.raises(LookupError, match=rf"{fold.metric.split()[0]}.*make the same one with metrics.from_torchmetrics"):
        restored.compute()
    metrics.from_torchmetrics(quietly(make))
    agree(restored.merge(restored).compute(), expected)


def test_the_name_is_the_same_in_another_process_and_another_for_other_settings():
    code = (
        "from torchmetrics.classification import *; from fnrun import metrics; print(metrics.from_torchmetrics(MulticlassF1Score(4)).name)"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert elsewhere == metrics.from_torchmetrics(classification.MulticlassF1Score(4)).name
    others = [
        classification.MulticlassF1Score(5),
        classification.MulticlassF1Score(4, average="micro"),
        classification.MulticlassAccuracy(4),
        wrappers.ClasswiseWrapper(classification.MulticlassF1Score(4)),
        wrappers.ClasswiseWrapper(classification.MulticlassF1Score(5)),
        torchmetrics.MetricCollection([classification.MulticlassF1Score(4)]),
        torchmetrics.MetricCollection([classification.MulticlassF1Score(4)], prefix="x"),
        classification.BinaryAUROC(thresholds=5),
        classification.BinaryAUROC(thresholds=[0.1, 0.2, 0.3, 0.4, 0.5]),
    ]
    names = {metrics.from_torchmetrics(other).name for other in others}
    assert len(names | {elsewhere}) == len(others) + 1
    assert set(_adapted) >= names


def test_sizes_are_fixed_where_the_metric_reduces():
    adapted = metrics.from_torchmetrics(METRICS["collection"][0]())
    fold = first = adapted(*classes(0))
    for seed in range(20):
        fold = fold.merge(adapted(*classes(seed, 3)))
    assert [leaf.nbytes for leaf in tree.leaves(fold.states)] == [leaf.nbytes for leaf in tree.leaves(first.states)]
    pearson = metrics.from_torchmetrics(regression.PearsonCorrCoef())
    fold = functools.reduce(lambda one, other: one.merge(other), [pearson(*numbers(seed)) for seed in range(100)])
    assert len(tree.leaves(fold.states)) < 8 * 8  # a hundred batches, in a few tensors


def test_members_of_a_collection_that_begin_alike_stay_apart():
    """torchmetrics takes two that have equal states after the first batch for one."""
    members = {"all": classification.MulticlassAccuracy(3), "some": classification.MulticlassAccuracy(3, ignore_index=0)}
    adapted = metrics.from_torchmetrics(torchmetrics.MetricCollection(members))
    batches = [(torch.tensor([1, 2]), torch.tensor([1, 2])), (torch.tensor([1, 1]), torch.tensor([0, 1]))]
    found = adapted(*batches[0]).merge(adapted(*batches[1])).compute()
    for name, member in members.items():
        for batch in batches:
            member.update(*batch)
        agree(found[name], member.compute())


def test_folds_are_merged_by_those_who_have_them():
    """A metric does not gather over ranks by itself when a fold is computed."""

    def refuse(*args, **kwargs):
        raise AssertionError

    own = torchmetrics.MeanSquaredError(distributed_available_fn=lambda: True, dist_sync_fn=refuse, dist_sync_on_step=True)
    assert float(metrics.from_torchmetrics(own)(torch.ones(2), torch.zeros(2)).compute()) == 1
    with pytest.raises(AssertionError):
        own(torch.ones(2), torch.zeros(2))


def test_functions_are_called_once_with_all():
    spearman = metrics.from_torchmetrics(functional.spearman_corrcoef)
    f1 = metrics.from_torchmetrics(functools.partial(functional.f1_score, task="multiclass", num_classes=4))
    whole = numbers(0)
    fold = spearman(whole[0][:5], target=whole[1][:5]).merge(spearman(whole[0][5:], target=whole[1][5:]))
    agree(fold.compute(), functional.spearman_corrcoef(*whole))
    assert float(f1(*classes(0)).compute()) == float(functional.f1_score(*classes(0), task="multiclass", num_classes=4))
    assert spearman.name != f1.name
    state = fnrun.TrainState.create(nn.Linear(1, 1))
    assert tree.equal(testing.through_a_checkpoint(state.replace(memory={"fold": fold}), state).memory["fold"], fold)
    with pytest.raises(TypeError, match=r"argument task is a str: only tensors are collected, options go into functools.partial"):
        metrics.from_torchmetrics(functional.f1_score)(*classes(0), task="multiclass")


class Random(torchmetrics.Metric):
    """One that draws when it computes, as KernelInceptionDistance does."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", torch.zeros(2), dist_reduce_fx=functools.partial(torch.amax, dim=0))

    def update(self, value):
        self.seen[0] = value

    def compute(self):
        self.seen += torch.rand(2)
        return self.seen


def test_a_metric_that_draws_and_writes_is_pure_and_a_reduction_may_be_a_function():
    adapted = metrics.from_torchmetrics(Random(), name="random")
    fold = adapted(torch.tensor(1.0)).merge(adapted(torch.tensor(3.0)))
    before, kept = torch.get_rng_state(), tree.snapshot(fold)
    agree(fold.compute(), fold.compute())
    assert float(fold.compute()[0]) > 2.9
    assert torch.equal(before, torch.get_rng_state())
    assert tree.equal(fold, kept)


class Kinds(torchmetrics.Metric):
    """States that few metrics have: a mean over updates, and one that is gathered and not reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rate", torch.tensor(0.0), dist_reduce_fx="mean")
        self.add_state("each", torch.zeros(2), dist_reduce_fx=None)

    def update(self, value):
        self.rate, self.each = value, torch.stack([value, value])

    def compute(self):
        return {"rate": self.rate, "each": self.each}


def test_means_weigh_updates_and_what_is_not_reduced_is_stacked():
    adapted = metrics.from_torchmetrics(Kinds())
    one, *others = [adapted(torch.tensor(value)) for value in (1.0, 2.0, 6.0)]
    agree(one.compute(), {"rate": torch.tensor(1.0), "each": torch.tensor([1.0, 1.0])})
    for fold in (one.merge(others[0]).merge(others[1]), one.merge(others[0].merge(others[1]))):
        agree(fold.compute(), {"rate": torch.tensor(3.0), "each": torch.tensor([[1.0, 1.0], [2.0, 2.0], [6.0, 6.0]])})


def test_an_evaluation_resumes_anywhere():
    model = nn.Linear(3, 4)
    adapted = {name: metrics.from_torchmetrics(quietly(METRICS[name][0])) for name in ("sum", "cat", "collection")}
    exact = metrics.from_torchmetrics(functools.partial(functional.auroc, task="multiclass", num_classes=4))

    def metric_fn(model, batch):
        logits = model(batch["x"])
        return {name: fold(logits, batch["y"]) for name, fold in adapted.items()} | {"exact": exact(logits, batch["y"])}

    rows = {"x": torch.randn(11, 3, generator=generator(0)), "y": classes(0, 11)[1]}
    evaluate = fnrun.repeat(fnrun.eval_loop(fnrun.make_eval_step(model, metric_fn)), 2)
    state = fnrun.TrainState.create(model)
    testing.assert_resumable(evaluate, state, data.arrays(rows, 4))
    _, found = evaluate(state, data.arrays(rows, 4))
    assert float(found["cat"]) == pytest.approx(float(found["exact"]))
    assert "collection/a_acc_z" in found
    assert tree.equal(found, evaluate(state, data.arrays(rows, 11))[1])


def test_what_cannot_be_adapted():
    for wrapper in (wrappers.Running(torchmetrics.SumMetric()), wrappers.MinMaxMetric(torchmetrics.SumMetric())):
        with pytest.raises(ValueError, match=f"the value of {type(wrapper).__name__} depends on the order of updates"):
            metrics.from_torchmetrics(wrapper)
    with pytest.raises(TypeError, match=r"not the class MeanMetric: give an object, MeanMetric\(...\)"):
        metrics.from_torchmetrics(torchmetrics.MeanMetric)
    for other in (3, nn.Linear(1, 1), None):
        with pytest.raises(TypeError, match=r"wanted a torchmetrics.Metric, a MetricCollection or a function, not "):
            metrics.from_torchmetrics(other)
    with pytest.raises(ValueError, match=r"<lambda>: it is <function.*give the function a name, from_torchmetrics\(..., name=...\)"):
        metrics.from_torchmetrics(lambda p: p.mean())
    assert float(metrics.from_torchmetrics(lambda p: p.mean(), name="mine")(torch.ones(3)).compute()) == 1


def test_without_torchmetrics_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r"pip install 'fnrun\[torchmetrics\]'"):
        metrics.from_torchmetrics(len)


def test_torchmetrics_is_imported_only_where_it_is_used():
    code = "import sys, fnrun; fnrun.metrics.accuracy; assert 'torchmetrics' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
