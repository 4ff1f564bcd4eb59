import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig
from tiny import ARCHITECTURES, make_checkpoint, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from fourscore.models.adapters import add_policy_adapter, add_value_adapter, freeze
from fourscore.models.quantized import stay_trainable
from fourscore.models.sharing import clone_owning, clone_sharing, share_parameters

IDS = torch.arange(3, 21).reshape(2, 9)


def _pointers(model):
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_two_trees_over_one_set_of_parameters(arch):
    reward = make_model(arch, make_tokenizer(), "reward").eval()
    freeze(reward)
    before = reward(IDS).logits
    twin = clone_sharing(reward)
    assert all(mine is theirs for mine, theirs in zip(twin.parameters(), reward.parameters(), strict=True))
    assert torch.equal(twin(IDS).logits, before)

    value = add_value_adapter(twin, LoraConfig(target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in value.parameters() if p.requires_grad], lr=0.05)
    value(IDS).logits.sum().backward()
    optimizer.step()
    assert not torch.equal(value(IDS).logits, before)
    assert torch.equal(reward(IDS).logits, before)
    assert not any(p.requires_grad for p in reward.parameters())
    owned = {n for n, p in value.named_parameters() if p.untyped_storage().data_ptr() not in _pointers(reward)}
    assert owned == {n for n, p in value.named_parameters() if p.requires_grad}


def test_tree_copies_config_hooks_and_ties():
    class Double(ModelHook):
        def post_forward(self, module, output):
            output.logits = 2 * output.logits
            return output

    model = make_model("llama", make_tokenizer(), tie_word_embeddings=True)
    add_hook_to_module(model, Double())
    twin = clone_sharing(model)
    twin.config.pad_token_id = 7
    assert model.config.pad_token_id != 7 and twin.model.config is twin.config
    assert twin.lm_head.weight is model.model.embed_tokens.weight
    # The hooked forward of the copy runs the copy's modules.
    twin.model.norm = torch.nn.Identity()
    assert not torch.equal(twin(IDS).logits, model(IDS).logits)


def test_tree_copies_what_modules_hold_besides():
    class Counted(torch.nn.Linear):
        copies = 0

        def __deepcopy__(self, memo):
            Counted.copies += 1
            twin = memo[id(self)] = Counted(self.in_features, self.out_features)
            return twin

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.counted = torch.nn.Linear(2, 2), Counted(2, 2)
            self.by_name, self.names, self.seen = {"inner": self.inner}, ["inner"], {}
            self.inner.seen = self.seen
            self.register_buffer("steps", torch.zeros(1), persistent=False)

    model = Holder()
    twin = clone_sharing(model)
    assert twin.by_name["inner"] is twin.inner is not model.inner
    assert twin.inner.weight is model.inner.weight and twin.steps is model.steps
    assert twin.counted is not model.counted and Counted.copies == 1
    assert list(twin.state_dict()) == list(model.state_dict())  # neither has the buffer
    twin.names.append("counted")
    twin.inner.seen["inner"] = 1
    assert twin.seen == twin.inner.seen
    twin.inner.register_forward_hook(lambda module, args, output: 0 * output)
    assert model.names == ["inner"] and not model.seen
    assert model.inner(torch.ones(1, 2)).any() and not twin.inner(torch.ones(1, 2)).any()


def test_moving_one_tree_moves_the_shared_parameters_once():
    model = make_model("llama", make_tokenizer())
    twin = clone_sharing(model)
    model.to(torch.float64)
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert _pointers(model) == _pointers(twin)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_owning_copy(arch):
    model = make_model(arch, make_tokenizer(), tie_word_embeddings=True).to(torch.bfloat16).eval()
    copy = clone_owning(model, torch.float32)
    assert not _pointers(model) & _pointers(copy)
    assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight
    assert {p.dtype for p in copy.parameters()} == {torch.float32} and copy.config.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(copy(IDS).logits, model.float()(IDS).logits)


def test_equal_copies_are_shared_across_peft_names():
    policy = make_model("llama", make_tokenizer())
    ref = make_model("llama", make_tokenizer())
    freeze(ref)
    size = sum(p.nbytes for p in ref.parameters())
    before = ref(IDS).logits
    policy = add_policy_adapter(policy, LoraConfig(target_modules="all-linear"))
    assert share_parameters(ref, policy) >= size
    assert _pointers(ref) <= _pointers(policy)
    assert torch.equal(ref(IDS).logits, before)
    assert share_parameters(ref, policy) == 0


def test_value_adapter_finds_the_reward_models_base():
    reward, value = (make_model("llama", make_tokenizer(), "reward") for _ in range(2))
    freeze(reward)
    value = add_value_adapter(value, LoraConfig())
    assert share_parameters(value, reward) > 0
    owned = {n for n, p in value.named_parameters() if p.untyped_storage().data_ptr() not in _pointers(reward)}
    assert owned == {n for n, p in value.named_parameters() if p.requires_grad}


def test_only_frozen_equal_weights_are_shared():
    target, source = make_model("llama", make_tokenizer()), make_model("llama", make_tokenizer())
    share_parameters(target, source)
    assert not _pointers(target) & _pointers(source), "both train"
    freeze(target)
    share_parameters(target, source)
    assert not _pointers(target) & _pointers(source), "the source trains: the target would change with it"
    freeze(source)
    with torch.no_grad():
        source.model.norm.weight[0] = -0.0
        target.model.norm.weight[0] = 0.0
    assert share_parameters(target, source) > 0
    assert target.model.norm.weight is not source.model.norm.weight, "equal numbers, other bytes"
    assert target.lm_head.weight is source.lm_head.weight


@pytest.mark.parametrize(
    "quantization", [{"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}]
)
def test_quantized_copies_are_shared_scales_and_all(quantization, llama_reward, tmp_path):
    config = BitsAndBytesConfig(**quantization, llm_int8_skip_modules=["score"])
    other = make_checkpoint("llama", tmp_path, "reward", seed=5)
    reward, value, stranger = (
        AutoModelForSequenceClassification.from_pretrained(path, quantization_config=config)
        for path in (llama_reward, llama_reward, other)
    )
    for model in (reward, value, stranger):
        stay_trainable(model)
    freeze(reward)
    expected = reward(IDS).logits.clone()
    value = add_value_adapter(value, LoraConfig(target_modules="all-linear"))
    size = sum(p.nbytes for p in reward.parameters())
    assert share_parameters(value, reward) >= size
    assert torch.equal(value.eval()(IDS).logits, expected)
    value.train()(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in value.parameters() if p.requires_grad)
    assert torch.equal(reward(IDS).logits, expected)

    mine = stranger(IDS).logits.clone()
    freeze(stranger)
    share_parameters(stranger, reward)
    assert torch.equal(stranger(IDS).logits, mine)


@pytest.mark.parametrize("before", [True, False], ids=["packed before", "never packed"])
def test_4bit_layers_pass_gradients_after_a_rollout(before, llama_policy):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["lm_head"]
    )
    model = AutoModelForCausalLM.from_pretrained(llama_policy, quantization_config=config)
    model = add_policy_adapter(model, LoraConfig(target_modules="all-linear"))

    @torch.no_grad()
    def rollout():
        return model.eval()(IDS).logits

    if before:
        rollout()  # on some CPUs bitsandbytes now has them in a form without a gradient
    stay_trainable(model)
    once = rollout()
    assert torch.equal(rollout(), once)
    model.train()(IDS).logits.square().sum().backward()
    lowest = [p.grad for name, p in model.named_parameters() if ".layers.0." in name and "lora_B" in name]
    assert lowest and all(grad is not None and grad.abs().sum() > 0 for grad in lowest)


def test_other_dtype_is_not_shared():
    target, source = make_model("llama", make_tokenizer()), make_model("llama", make_tokenizer()).to(torch.bfloat16)
    freeze(target), freeze(source)
    assert not any(p is q for p, q in zip(target.parameters(), source.parameters(), strict=True))
    share_parameters(target, source)
    assert {p.dtype for p in target.parameters()} == {torch.float32}
