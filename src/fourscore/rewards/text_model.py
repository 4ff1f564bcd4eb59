"""A reward model that reads text: with another tokenizer than the policy's, or an encoder."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fourscore.errors import FourscoreError
from fourscore.models.forward import sample_scores, scatter_back, without_peft
from fourscore.models.fused import fused
from fourscore.models.products import fast_products
from fourscore.models.tokenizer import first_conflict
from fourscore.parallel import forward_passes
from fourscore.rewards.samples import Notes, Samples

logger = logging.getLogger(__name__)

_NO_LIMIT = 10**9


class TextModel:
    """A sequence classifier with one label as a source of rewards, on text that its own tokenizer reads."""

    kind = "reward"
    is_async = may_abstain = False

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, name: str = "reward_model") -> None:
        """Make a source.

        Args:
            model: frozen, on its device.
            tokenizer: its own.
            batch_size: samples a forward pass.
            name: under which it is logged.
        """
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._limit = longest_input(model, tokenizer)
        self._cut = False

    def rate(self, samples: Samples, notes: Notes) -> Any:
        """The scores `[n]`, fp32."""
        return text_scores(self._model, self._tokens(samples), self._batch_size, self._tokenizer)

    def _tokens(self, samples: Samples) -> list[dict[str, list[int]]]:
        """What the tokenizer makes of each sample; of one that is too long the end is kept."""
        tokenizer = self._tokenizer
        rendered = samples.conversational and tokenizer.chat_template is not None
        texts = samples.texts
        if rendered:
            conversations = [p + a for p, a in zip(samples.prompts, samples.answers, strict=True)]
            # Parquet gives every message every key that any message has; templates take a null for a value.
            plain = [[{k: v for k, v in message.items() if v is not None} for message in c] for c in conversations]
            texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in plain]
        # A template has the special tokens in it.
        encoded = tokenizer(texts, add_special_tokens=not rendered)
        long = [i for i, ids in enumerate(encoded["input_ids"]) if self._limit is not None and len(ids) > self._limit]
        if long:
            if not self._cut:
                self._cut = True
                logger.warning(
                    "%s: %d of %d texts are longer than the %d tokens it reads: it gets their ends",
                    self.name,
                    len(long),
                    len(texts),
                    self._limit,
                )
            side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
            encoded = tokenizer(texts, add_special_tokens=not rendered, truncation=True, max_length=self._limit)
            tokenizer.truncation_side = side
        return [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]


@torch.no_grad()
def text_scores(
    model: Any, encoded: list[dict[str, list[int]]], batch_size: int, tokenizer: Any | None = None
) -> Tensor:
    """Score texts with a sequence classifier, in batches of similar length.

    Args:
        model: a sequence classifier with one label.
        encoded: what its tokenizer makes of each text.
        batch_size: texts of the greatest length a forward pass; more where they are short.
        tokenizer: for the id that pads.

    Returns:
        `[n]`, fp32 or wider.
    """
    device = next(model.parameters()).device
    # A text of nothing but what is left out of it still needs a token to be read.
    ids = [torch.tensor(each["input_ids"] or [0], device=device) for each in encoded]
    lens = torch.tensor([len(each) for each in ids], device=device)
    reads_last = _reads_last_token(model)
    order = forward_passes(model, lens, batch_size, padded=not reads_last)
    scores = []
    for group in order:
        some = group.tolist()
        if reads_last:
            scores.append(sample_scores(model, [ids[i] for i in some]))
            continue
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        inputs = {"input_ids": _padded([ids[i] for i in some], pad)}
        inputs["attention_mask"] = _padded([torch.ones_like(ids[i]) for i in some], 0)
        if "token_type_ids" in encoded[some[0]]:
            kinds = [torch.tensor(encoded[i]["token_type_ids"], device=device) for i in some]
            inputs["token_type_ids"] = _padded(kinds, 0)
        with fast_products(model), fused(model):
            logits = model(**inputs).logits[:, 0]
        scores.append(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    return scatter_back(scores, order)


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _reads_last_token(model: Any) -> bool:
    """Whether it is a decoder, whose `score` head reads the last token: those need no mask."""
    return isinstance(getattr(without_peft(model), "score", None), nn.Linear)


def longest_input(model: Any, tokenizer: Any | None) -> int | None:
    """The most tokens that a model reads; None where nothing says so.

    Args:
        model: a sequence classifier.
        tokenizer: its own, which may know, too.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    found = [int(limit) for limit in limits if limit is not None and 0 < limit < _NO_LIMIT]
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding index.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            found.append(module.num_embeddings - module.padding_idx - 1)
    return min(found, default=None)


def tokenizer_of_text_model(model: Any, policy_tokenizer: Any, vocabulary: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a reward model that cannot read the policy's tokens; None where it can.

    Args:
        model: a sequence classifier.
        policy_tokenizer: the policy's.
        vocabulary: ids that the policy knows.

    Raises:
        FourscoreError: it is an encoder, and no tokenizer is with its checkpoint.
    """
    config = without_peft(model).config
    place, revision = str(getattr(config, "_name_or_path", "") or ""), getattr(config, "_commit_hash", None)
    own = None
    if place and place != getattr(policy_tokenizer, "name_or_path", None):
        try:
            own = AutoTokenizer.from_pretrained(place, revision=revision or "main")
        except (OSError, ValueError, KeyError, TypeError, ImportError):
            own = None
    decoder = _reads_last_token(model)
    same_size = config.get_text_config().vocab_size == vocabulary
    if own is None:
        if not decoder:
            raise FourscoreError(
                f"reward_model: {type(without_peft(model)).__name__} reads text, and there is no tokenizer in "
                f"{place!r}, where it came from: pass reward_processing_class"
            )
        return None  # of another size: what the roles are checked for says so
    if decoder and same_size and first_conflict(policy_tokenizer, own) is None:
        return None
    return own
