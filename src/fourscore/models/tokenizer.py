"""A tokenizer that pads without lying: the pad token is never EOS and, where it can be, never outside the embedding."""

import copy
import logging
import re
from collections.abc import Iterable
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fourscore.errors import FourscoreError

logger = logging.getLogger(__name__)

PAD = "[PAD]"
_SPARE_NAMES = ("pad", "reserved", "unused", "placeholder", "dummy", "extra", "fim")


def load_tokenizer(
    name_or_path: str, revision: str = "main", trust_remote_code: bool = False, flag: str = "--model_name_or_path"
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a checkpoint, padding on the left as generation needs.

    Raises:
        FourscoreError: there is none; the message names `flag`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code, padding_side="left"
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FourscoreError(f"{flag} {name_or_path}: no tokenizer could be loaded from it ({reason})") from error
    return tokenizer


def ensure_pad_token(
    tokenizer: PreTrainedTokenizerBase, embedding_rows: int, stop_ids: Iterable[int] = ()
) -> PreTrainedTokenizerBase:
    """Gives `tokenizer`, in place, a pad token distinct from EOS.

    In this order: its own, if it is not EOS; else a special token with a row in the embedding that nothing uses (see
    `spare_special_token`); else an added `[PAD]`, whose id may lie beyond the embedding (`saved_tokenizer` deals with
    that). Embeddings are never resized.

    Args:
        tokenizer: changed in place and returned.
        embedding_rows: rows of the policy's input embedding.
        stop_ids: ids at which generation stops, besides EOS; they are not spare.
    """
    own = tokenizer.pad_token_id
    if own is not None and own != tokenizer.eos_token_id:
        return tokenizer
    spare = spare_special_token(tokenizer, embedding_rows, stop_ids)
    if spare is not None:
        tokenizer.pad_token = spare
        logger.info("pad token: %s, a special token that nothing uses", spare)
    else:
        tokenizer.add_special_tokens({"pad_token": PAD})
        logger.info("pad token: %s, added at id %d", PAD, tokenizer.pad_token_id)
    return tokenizer


def spare_special_token(
    tokenizer: PreTrainedTokenizerBase, embedding_rows: int, stop_ids: Iterable[int] = ()
) -> str | None:
    """A special token that can serve as padding, or None.

    It has a row in the embedding; it is none of the tokens with a role (BOS, EOS, UNK, SEP, CLS, MASK); the tokenizer
    does not add it to a text by itself; the chat template does not name it; generation does not stop at it. Names
    made for the purpose come first (`<|padding|>`, then reserved, unused, placeholder, dummy, extra, fim), then the
    lowest id.
    """
    roles = {getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "sep", "cls", "mask")} - {
        None
    }
    taken = roles | set(stop_ids) | set(tokenizer("").input_ids)
    template = str(tokenizer.chat_template or "")
    # A template may build its names from pieces ('<|' + role + '|>'): then any token shaped so may be in use.
    pieces = re.findall(r"""['"]([^'"\s]{1,4})['"]\s*[+~]""", template)
    candidates = []
    for index, token in tokenizer.added_tokens_decoder.items():
        name = token.content
        if not token.special or index >= embedding_rows or index in taken or name in template:
            continue
        rank = next((i for i, word in enumerate(_SPARE_NAMES) if word in name.lower()), len(_SPARE_NAMES))
        if rank == len(_SPARE_NAMES) and any(name.startswith(piece) for piece in pieces):
            continue
        candidates.append((rank, index, name))
    return min(candidates)[2] if candidates else None


def first_conflict(mine: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> int | None:
    """The lowest id that is another token in `other`; names of added tokens (a pad, a reserved one) may differ."""
    added = mine.added_tokens_decoder.keys() | other.added_tokens_decoder.keys()
    theirs = {index: token for token, index in other.get_vocab().items()}
    conflicts = [
        index
        for token, index in mine.get_vocab().items()
        if index not in added and theirs.get(index, token if index >= len(theirs) else None) != token
    ]
    return min(conflicts, default=None)


def saved_tokenizer(tokenizer: PreTrainedTokenizerBase, embedding_rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer to save beside a trained policy.

    It is `tokenizer` itself when its pad id has a row in the embedding. An added `[PAD]` beyond it would crash plain
    transformers on the first padded batch: then it is the original tokenizer, padding with its own pad or EOS.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < embedding_rows:
        return tokenizer
    original = _original(tokenizer)
    if original.pad_token_id is None or original.pad_token_id >= embedding_rows:
        original.pad_token = original.eos_token if original.eos_token is not None else original.convert_ids_to_tokens(0)
    return original


def ensure_safe_pad(config: Any, tokenizer: PreTrainedTokenizerBase, embedding_rows: int | None = None) -> None:
    """Makes `config.pad_token_id` one that can be saved, in place.

    A checkpoint's own pad id stays: it decides which token its head was trained on (transformers scores the last token
    that is not pad). An id outside the embedding crashes the loading of most models: it becomes None. None becomes
    the tokenizer's pad id if that has a row and is not EOS (an EOS pad would make the head look at the token before).

    Args:
        config: a model's config.
        tokenizer: one that went through `ensure_pad_token`.
        embedding_rows: rows of that model's input embedding; None is the config's `vocab_size`.
    """
    text = config.get_text_config()
    rows = text.vocab_size if embedding_rows is None else embedding_rows
    for part in {id(config): config, id(text): text}.values():
        pad = getattr(part, "pad_token_id", None)
        if pad is not None and not 0 <= pad < rows:
            pad = None
        if pad is None:
            candidate = tokenizer.pad_token_id
            usable = candidate is not None and candidate < rows and candidate != tokenizer.eos_token_id
            pad = candidate if usable else None
        part.pad_token_id = pad


def _original(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as its checkpoint has it, or a copy where the checkpoint cannot be read again."""
    try:
        original = AutoTokenizer.from_pretrained(
            tokenizer.name_or_path, padding_side=tokenizer.padding_side, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return copy.deepcopy(tokenizer)
    original.chat_template = tokenizer.chat_template
    return original
