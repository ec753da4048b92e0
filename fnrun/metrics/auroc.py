"""The area under the receiver operating characteristic (ROC) curve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fnrun.core.tree import static, struct
from fnrun.metrics.base import Additive, averaged, check_choice, check_labels, check_scores, is_class, to_accumulator_dtype
from fnrun.metrics.bins import Bins
from fnrun.metrics.collect import Chunks, collect

BINS = Bins(low=-10, high=10, per_octave=64)
AVERAGES = ("macro", "weighted", None)


@struct(name="fnrun.metrics.AUROC")
class AUROC(Additive):
    """The counts of positives and negatives in each bin of scores: int64 `[bins]`, or `[classes, bins]` for each class against the rest."""

    positives: Tensor
    negatives: Tensor
    average: str | None = static()

    def compute(self) -> Tensor:
        """The area; a positive and a negative in one bin count as half a pair in order."""
        return self._of_pairs(lambda positives, negatives: positives * (negatives.cumsum(-1) - negatives / 2))

    def bound(self) -> Tensor:
        """The largest error of `compute()`: half the share of pairs in one bin."""
        return self._of_pairs(lambda positives, negatives: positives * negatives / 2)

    def _of_pairs(self, pairs: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        positives, negatives = to_accumulator_dtype(self.positives), to_accumulator_dtype(self.negatives)
        both = positives.sum(-1) * negatives.sum(-1)
        areas = pairs(positives, negatives).sum(-1) / both.clamp(min=1)
        unknown = self.positives[..., -1] + self.negatives[..., -1] > 0
        return _over_classes(torch.where(unknown, torch.nan, areas), positives.sum(-1), negatives.sum(-1), self.average)


@struct(name="fnrun.metrics.ExactAUROC")
class ExactAUROC(Additive):
    """All scores, with their labels."""

    seen: Chunks
    average: str | None = static()

    def compute(self) -> Tensor:
        """The area by ranks (Mann-Whitney); a positive and a negative of one score count as half a pair in order."""
        rows = self.seen.compute()
        scores, positive, valid = _against_the_rest(rows["score"], rows["label"])
        positives, negatives = to_accumulator_dtype((positive & valid).sum(-1)), to_accumulator_dtype((~positive & valid).sum(-1))
        place = torch.where(valid, scores, torch.inf)  # an invalid NaN would disturb the search
        place, order = place.sort(-1)
        negative = to_accumulator_dtype((~positive & valid).gather(-1, order).long())
        before = torch.nn.functional.pad(negative.cumsum(-1), (1, 0))
        lower, upper = (torch.searchsorted(place, place, right=right) for right in (False, True))
        pairs = (before.gather(-1, lower) + before.gather(-1, upper)) / 2
        areas = torch.where((positive & valid).gather(-1, order), pairs, 0).sum(-1) / (positives * negatives).clamp(min=1)
        areas = torch.where((scores.isnan() & valid).any(-1), torch.nan, areas)
        return _over_classes(areas, positives, negatives, self.average)


def _over_classes(areas: Tensor, positives: Tensor, negatives: Tensor, average: str | None) -> Tensor:
    seen = (positives > 0) & (negatives > 0)
    if average == "binary":
        return torch.where(seen, areas, torch.nan)
    return averaged(areas, seen, positives, average)


def auroc(scores: Tensor, labels: Tensor, *, average: str | None = "macro", exact: bool = False) -> AUROC | ExactAUROC:
    """The probability that a positive scores higher than a negative (ties count half): the area under the ROC curve.

    - `scores`: for two classes floats of the shape of `labels`, higher for label 1; only their order matters. For more classes logits
      `[N, C, ...]`, or logs of probabilities: each class against the rest, in the order of its log odds, as of the softmax.
    - `labels`: class numbers, or booleans for two classes. A label outside the classes omits its example.
    - `average="macro"`: the mean over the classes that have both positives and negatives; `"weighted"` by their labels; None for all
      `[C]`, NaN for the others. Without effect for two classes.
    - `exact=False`: count the scores in bins, 41 kB a class, each 1/64 of an octave wide between magnitudes of 2^-10 and 2^10. The value is
      within `bound()` of the exact one, half the share of pairs in one bin. Probabilities near 0 or 1 share bins: pass logits, or
      `torch.logit(p)`. True collects all scores, and the fold grows with the data.

    The value is NaN if a score is NaN, or without positives or negatives.

    Raises ValueError for other shapes and types, and for an unknown `average`.

    >>> scores, labels = torch.tensor([2.0, 0.5, -1.0, -3.0]), torch.tensor([1, 0, 1, 0])
    >>> folded = auroc(scores, labels)
    >>> folded.compute(), folded.bound(), auroc(scores, labels, exact=True).compute()
    (tensor(0.7500, dtype=torch.float64), tensor(0., dtype=torch.float64), tensor(0.7500, dtype=torch.float64))
    """
    check_choice("auroc", "average", average, AVERAGES)
    scores, labels = scores.detach(), labels.detach()
    if scores.shape == labels.shape:
        check_labels("auroc", labels, booleans=True)
        if not scores.is_floating_point():
            raise ValueError(f"auroc: scores are floats, not {scores.dtype}")
        scores, labels, average = scores.reshape(-1), labels.reshape(-1), "binary"
    else:
        classes = check_scores("auroc", scores, labels)
        if classes == 1:
            raise ValueError(f"auroc: scores of one class have the shape of the labels, {tuple(labels.shape)}, not {tuple(scores.shape)}")
        scores, labels = scores.movedim(1, -1).reshape(-1, classes), labels.reshape(-1)
    if exact:
        return ExactAUROC(collect({"score": scores, "label": labels}), average)
    scores, positive, valid = _against_the_rest(scores, labels)
    index = BINS.index(scores)
    return AUROC(BINS.count(index, positive & valid), BINS.count(index, ~positive & valid), average)


def _against_the_rest(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, whether they belong to positives, and whether they count: each `[N]`, or `[C, N]` for rows of logits."""
    if scores.ndim == 1:
        return scores, labels == 1, (labels == 0) | (labels == 1)
    labels, classes = labels.long(), scores.shape[1]
    valid = is_class(labels, classes)
    numbers = torch.arange(classes, device=labels.device).unsqueeze(1)
    return _log_odds(scores).T.contiguous(), labels == numbers, valid.expand(classes, -1)


def _log_odds(scores: Tensor) -> Tensor:
    """log p / (1 - p) of the softmax p of each row `[N, C]`, in the order of p, without rounding p to 1.

    Equal probabilities have equal log odds, bit for bit. In rows of logs of probabilities they are a function of the class's entry. In
    other rows they are a function of its place in the sorted row: the order of the other classes and a shift of all have no effect.
    """
    logits, classes = to_accumulator_dtype(scores), scores.shape[1]
    pad, infinity = torch.nn.functional.pad, torch.inf
    tolerance = min(1e-3, 4 * (classes + 4) * torch.finfo(scores.dtype).eps)
    sums = logits.logsumexp(1)
    probabilities = ((sums.abs() <= tolerance) | sums.isnan()).all()
    logits = logits - logits.amax(1, keepdim=True).nan_to_num(neginf=0.0, posinf=0.0, nan=0.0) * ~probabilities
    ascending = logits.sort(1).values
    before = pad(ascending.logcumsumexp(1), (1, 0), value=-infinity)[:, :-1]
    behind = pad(ascending.flip(1).logcumsumexp(1).flip(1), (0, 1), value=-infinity)[:, 1:]
    place = torch.searchsorted(ascending, logits).clamp(max=classes - 1)  # the first of equal classes
    others = torch.logaddexp(before, behind).gather(1, place)
    logs = logits.clamp(max=0.0)  # the log of a probability may be rounded up
    return torch.where(probabilities, logs - (-logs.expm1()).log(), logits - others)
