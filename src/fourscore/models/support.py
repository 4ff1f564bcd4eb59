"""Which ids tokens were drawn from, where top-k, top-p or a minimal length leave only some of the vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

ALLOWED, BARRED, PACKED = 0, 1, 2
"""What the words of a token are: the ids it was drawn from, the ids it was not drawn from, or a bit for each id."""


@dataclass
class Support:
    """For each of `C` tokens the set of ids that it was drawn from; outside of it its distribution is zero.

    A token takes a word of 4 bytes for each id of its set, or for each id outside of it, or one bit for each id of the
    vocabulary: whichever is least, so never more than an eighth of a byte an id.

    Attributes:
        words: `[S]` int32, those of token 0, then those of token 1, ...
        lens: `[C]` words of each token.
        kinds: `[C]` uint8, what its words are.
        vocabulary: ids that there were to draw from.
    """

    words: Tensor
    lens: Tensor
    kinds: Tensor
    vocabulary: int

    @classmethod
    def of(cls, allowed: Tensor) -> Self:
        """The support of tokens.

        Args:
            allowed: `[C, vocabulary]` bool.
        """
        vocabulary = allowed.shape[1]
        packed_size = packed_words(vocabulary)
        counts = allowed.sum(1)
        kinds = torch.full_like(counts, PACKED, dtype=torch.uint8)
        kinds[vocabulary - counts <= packed_size] = BARRED
        kinds[counts <= packed_size] = ALLOWED
        packed = kinds == PACKED
        named = (allowed ^ (kinds == BARRED)[:, None])[~packed]
        ids = named.nonzero()[:, 1].int()
        if not packed.any():
            return cls(ids, named.sum(1), kinds, vocabulary)
        bits = _pack(allowed[packed])
        order = torch.cat([(~packed).nonzero()[:, 0], packed.nonzero()[:, 0]])
        lens = torch.cat([named.sum(1), torch.full_like(order[len(named) :], packed_size)])
        return cls(torch.cat([ids, bits.flatten()]), lens, kinds[order], vocabulary).select(order.argsort())

    @classmethod
    def without(cls, ids: Sequence[int], where: Tensor, vocabulary: int) -> Self:
        """The support of tokens that are drawn from the whole vocabulary, or from all but a few ids.

        Args:
            ids: that some of the tokens are not drawn from.
            where: `[C]` bool, which of them.
            vocabulary: ids that there are to draw from.
        """
        words = torch.tensor(sorted(set(ids)), dtype=torch.int32, device=where.device)
        kinds = torch.full_like(where, BARRED, dtype=torch.uint8)
        return cls(words.repeat(int(where.sum())), where * len(words), kinds, vocabulary)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The tokens of several, one after the other."""
        words, lens, kinds = (torch.cat([getattr(p, name) for p in parts]) for name in ("words", "lens", "kinds"))
        return cls(words, lens, kinds, parts[0].vocabulary)

    def __len__(self) -> int:
        return len(self.lens)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(t.numel() * t.element_size() for t in (self.words, self.lens, self.kinds))

    def select(self, indices: Tensor) -> Self:
        """The tokens at `indices` `[m]`, in that order."""
        words = self.words[ragged_indices(self.lens, indices)]
        return type(self)(words, self.lens[indices], self.kinds[indices], self.vocabulary)

    def split(self, size: int) -> list[Self]:
        """Pieces of `size` tokens, the last one smaller, that hold views of the same words."""
        lens = self.lens.split(size)
        words = self.words.split([int(some.sum()) for some in lens])
        pieces = zip(words, lens, self.kinds.split(size), strict=True)
        return [type(self)(*piece, self.vocabulary) for piece in pieces]

    def barred(self, vocabulary: int) -> Tensor:
        """The ids that the tokens were not drawn from.

        Args:
            vocabulary: width of the logits that it is for; ids that the policy did not know are barred.

        Returns:
            `[C, vocabulary]` bool.
        """
        known = self.vocabulary
        out = (self.kinds != BARRED)[:, None].repeat(1, max(known, vocabulary))
        out[:, known:] = True
        owner = torch.repeat_interleave(torch.arange(len(self), device=self.lens.device), self.lens)
        kinds = self.kinds[owner]
        # Numbers, not masks, as indices: words without data have none that a shape could follow from.
        named, bits = (kinds != PACKED).nonzero()[:, 0], (kinds == PACKED).nonzero()[:, 0]
        out[owner[named], self.words[named].long()] = kinds[named] == BARRED
        if len(bits):
            packed = self.words[bits].view(-1, packed_words(known))
            out[(self.kinds == PACKED).nonzero()[:, 0], :known] = ~_unpack(packed, known)
        return out[:, :vocabulary]


def packed_words(vocabulary: int) -> int:
    """Words that hold a bit for each id."""
    return -(-vocabulary // 32)


def ragged_indices(lens: Tensor, picks: Tensor) -> Tensor:
    """Where the items of chosen groups lie, when groups lie one after the other.

    Args:
        lens: `[n]` items of each group.
        picks: `[m]` groups.

    Returns:
        positions of the items of `picks[0]`, then of `picks[1]`, ...
    """
    chosen = lens[picks]
    shift = (lens.cumsum(0) - lens)[picks] - (chosen.cumsum(0) - chosen)
    return torch.arange(int(chosen.sum()), device=lens.device) + torch.repeat_interleave(shift, chosen)


def _pack(rows: Tensor) -> Tensor:
    """Bool `[r, v]` to int32 `[r, packed_words(v)]`."""
    size = packed_words(rows.shape[1])
    bits = torch.nn.functional.pad(rows.byte(), (0, 32 * size - rows.shape[1])).view(len(rows), -1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=rows.device)
    return (bits * weights).sum(2, dtype=torch.uint8).view(torch.int32)


def _unpack(words: Tensor, width: int) -> Tensor:
    """Int32 `[r, packed_words(width)]` to bool `[r, width]`."""
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    bits = words.contiguous().view(torch.uint8)[:, :, None] >> places & 1
    return bits.view(len(words), -1)[:, :width].bool()
