import pytest
import torch
from tiny import CHAT_TEMPLATE, EOS, PAD, SPARE, make_checkpoint, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from fourscore.errors import FourscoreError
from fourscore.models.tokenizer import (
    ensure_pad_token,
    ensure_safe_pad,
    load_tokenizer,
    saved_tokenizer,
    spare_special_token,
)


def test_loads_padding_left(llama_policy):
    assert load_tokenizer(str(llama_policy)).padding_side == "left"


def test_no_tokenizer_names_the_flag(tmp_path):
    with pytest.raises(FourscoreError, match=r"--sft_model_path .*no tokenizer"):
        load_tokenizer(str(tmp_path), flag="--sft_model_path")


def test_own_pad_stays():
    tokenizer = make_tokenizer("own")
    size = len(tokenizer)
    assert ensure_pad_token(tokenizer, size).pad_token == PAD
    assert len(tokenizer) == size


@pytest.mark.parametrize("eos_is_pad", [False, True])
def test_unused_special_token_comes_next(eos_is_pad):
    tokenizer = make_tokenizer("spare")
    if eos_is_pad:
        tokenizer.pad_token = EOS
    size = len(tokenizer)
    assert ensure_pad_token(tokenizer, size).pad_token == SPARE
    assert len(tokenizer) == size


def test_added_pad_last():
    tokenizer = make_tokenizer("none")
    size = len(tokenizer)
    ensure_pad_token(tokenizer, size)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", size)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_tokens_in_use_are_not_spare():
    def spare(template=None, rows=1000, stop=(), names=("<|im_end|>", "<|fim_pad|>", "<|reserved_7|>", "<tool>")):
        tokenizer = make_tokenizer("none", template)
        tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
        return spare_special_token(tokenizer, rows, stop)

    size = len(make_tokenizer("none"))
    assert spare() == "<|fim_pad|>"
    assert spare(names=("<tool>", "<|reserved_7|>")) == "<|reserved_7|>"
    assert spare(names=("<tool>",)) == "<tool>"
    assert spare(names=("<tool>",), template="{{ '<tool>' }}") is None
    assert spare(names=("<tool>",), stop=[size]) is None
    assert spare(names=("<tool>",), rows=size) is None
    # '<|' + role + '|>' builds names that are nowhere written out.
    assert spare(names=("<|user|>",), template="{{ '<|' + message['role'] + '|>' }}") is None
    assert spare_special_token(make_tokenizer("none", CHAT_TEMPLATE), 1000) is None


def test_saved_tokenizer_is_the_same_when_its_pad_has_a_row():
    for pad, rows in (("own", 300), ("spare", 300), ("none", 320)):
        tokenizer = make_tokenizer(pad)
        ensure_pad_token(tokenizer, rows)
        assert saved_tokenizer(tokenizer, rows) is tokenizer


@pytest.mark.parametrize("from_disk", [True, False])
@pytest.mark.parametrize(("pad", "rows"), [("own", None), ("spare", None), ("none", 320), ("none", None)])
def test_saved_run_pads_a_batch_in_plain_transformers(tmp_path, pad, rows, from_disk):
    sizes = {} if rows is None else {"vocab_size": rows}
    path = make_checkpoint("llama", tmp_path / "sft", "policy", pad=pad, chat_template=CHAT_TEMPLATE, **sizes)
    policy = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = load_tokenizer(str(path)) if from_disk else make_tokenizer(pad, CHAT_TEMPLATE)
    tokenizer.padding_side = "left"
    ensure_pad_token(tokenizer, policy.config.vocab_size)
    ensure_safe_pad(policy.config, tokenizer)
    policy.save_pretrained(tmp_path / "run")
    saved_tokenizer(tokenizer, policy.config.vocab_size).save_pretrained(tmp_path / "run")

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    # transformers saves the padding side that a tokenizer was loaded with, not one set later.
    assert tokenizer.padding_side == "left" or not from_disk
    tokenizer.padding_side = "left"
    batch = tokenizer(["the film", "a warm and funny comedy"], padding=True, return_tensors="pt")
    assert batch.input_ids.max() < policy.config.vocab_size and (batch.attention_mask == 0).any()
    assert tokenizer.chat_template == CHAT_TEMPLATE
    out = policy.generate(**batch, max_new_tokens=3, do_sample=False)
    alone = tokenizer("the film", return_tensors="pt")
    expected = policy.generate(**alone, max_new_tokens=3, do_sample=False)
    width = alone.input_ids.shape[1]
    assert torch.equal(out[0, batch.input_ids.shape[1] :], expected[0, width:])


@pytest.mark.parametrize(
    ("own", "pad", "expected"),
    [(0, "own", 0), (None, "own", 1), (None, "none", None), (400, "none", None), (-1, "own", 1), (2, "none", 2)],
)
def test_config_pad_is_kept_or_safe(own, pad, expected):
    tokenizer = ensure_pad_token(make_tokenizer(pad), 300)
    config = LlamaConfig(vocab_size=300)
    config.pad_token_id = own
    ensure_safe_pad(config, tokenizer)
    assert config.pad_token_id == expected
