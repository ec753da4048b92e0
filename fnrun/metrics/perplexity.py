"""The perplexity of language models."""

from __future__ import annotations

import torch
from torch import Tensor

from fnrun.core.tree import struct
from fnrun.metrics.base import Additive, check_scores, is_class, to_accumulator_dtype


@struct(name="fnrun.metrics.Perplexity")
class Perplexity(Additive):
    """The summed negative log likelihood of `tokens` tokens, both float64."""

    nll: Tensor
    tokens: Tensor

    def compute(self) -> Tensor:
        return (self.nll / self.tokens).exp()


def perplexity(logits: Tensor, labels: Tensor) -> Perplexity:
    """The exponential of the mean cross entropy over all tokens of all batches: not the mean of the batches' perplexities.

    - `logits`: float scores `[N, C, ...]`, as in `cross_entropy`; `logits.transpose(1, 2)` of `[batch, time, vocabulary]`.
    - `labels`: ints of that shape without `C`. A label outside the classes (`ignore_index`, as -100 or 255) omits its token.

    NaN without tokens. Raises ValueError for other shapes and types.

    >>> round(float(perplexity(torch.zeros(2, 5), torch.tensor([0, 3])).compute()), 4)
    5.0
    """
    classes = check_scores("perplexity", logits, labels)
    logits, labels = logits.detach() if logits.dtype == torch.float64 else logits.detach().float(), labels.long()
    # not cross_entropy, which ends the process on a GPU for a label outside the classes
    chosen = logits.gather(1, labels.clamp(0, classes - 1).unsqueeze(1)).squeeze(1)
    nll = logits.logsumexp(1) - chosen
    counted = is_class(labels, classes)
    return Perplexity(torch.where(counted, to_accumulator_dtype(nll), 0).sum(), to_accumulator_dtype(counted.sum()))
