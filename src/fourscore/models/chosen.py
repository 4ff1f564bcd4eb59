"""Logprobs of chosen tokens by a kernel, once over the logits: torch has a tensor of their size for each operation.

What it is worth: `benchmarks/fused.py`.
"""

import torch
from torch import Tensor

from fourscore.models import kernels
from fourscore.models.fused import are_plain
from fourscore.models.support import Support


def fits(logits: Tensor) -> bool:
    """Whether the kernel can take these: fp32 on a CPU."""
    return are_plain(logits) and kernels.are_there()


def logprobs_of(
    logits: Tensor, chosen: Tensor, temperature: float, support: Support | None, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logprobs `[c]` in nats, entropies `[c]`, and the gradients of the logprobs with respect to the logits `[c, V]`.

    Args:
        logits: `[c, V]`; they must fit.
        chosen: `[c]` tokens.
        temperature: logits are divided by it.
        support: the ids that each token was drawn from; None: all of them.
        given: `[c]`, what the gradients are multiplied with; None: there are none.
    """
    rows, vocabulary = logits.shape
    logits = logits.contiguous() if support is None else logits.masked_fill(support.barred(vocabulary), -torch.inf)
    logprobs, entropies = logits.new_empty(rows), logits.new_empty(rows)
    slopes = scratch = None
    if given is None:
        scratch = logits.new_empty(torch.get_num_threads() * vocabulary)
    else:
        slopes, given = torch.empty_like(logits), given.contiguous()
    made = slopes, logprobs, entropies, scratch
    kernels.call("logprobs", logits, chosen.contiguous(), given, *made, rows, vocabulary, temperature)
    return logprobs, entropies, slopes
