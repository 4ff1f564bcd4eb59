"""Texts that end a completion."""

from typing import Any

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class StopStrings:
    """Tells whether the last token of a completion completes one of some texts.

    What counts is the text of the completion alone, special tokens included: a text may begin and end inside of tokens,
    but not in the prompt.
    """

    def __init__(self, texts: list[str], tokenizer: Any) -> None:
        """Take the texts.

        Args:
            texts: none of them empty.
            tokenizer: the policy's.
        """
        self._texts = tuple(texts)
        self._tokenizer = tokenizer
        # Each token has at least a byte. One more in front: decoders treat the first token of a text in ways of their
        # own, and it may begin in the middle of a character.
        self.reach = max(len(text.encode()) for text in texts) + 1

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts."""
        return self._texts

    def completed_by_last(self, ids: list[int]) -> bool:
        """Whether a text ends in the last token.

        Args:
            ids: a completion, or its last `reach` tokens.
        """
        ids = ids[-self.reach :]
        text = self._decoded(ids)
        if not any(stop in text for stop in self._texts):
            return False
        # A character whose last byte is yet to come must not count as text that was there before.
        before = len(self._decoded(ids[:-1]).rstrip(_BROKEN))
        return any(text.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in self._texts)

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
