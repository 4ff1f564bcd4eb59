"""Measures saved policies on held-out prompts, whichever system trained them: started by `training.py`.

Nothing of either system is used here, only torch and transformers. Its argument is JSON: `policies` (the path of each,
and completions a prompt), `reference`, `reward`, `prompts` (a .jsonl file), `temperature`, `response_length`, `seed`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

PROMPTS_AT_ONCE = 64
SAMPLES_AT_ONCE = 128
Sample = tuple[Tensor, Tensor]
"""Token ids of a prompt and of its completion, the end token included where there is one."""


@torch.no_grad()
def complete(policy: Any, prompts: list[Tensor], copies: int, eos: int, job: dict[str, Any]) -> list[Sample]:
    """`copies` completions of each prompt, sampled from the whole distribution."""
    config = GenerationConfig(
        do_sample=True,
        temperature=job["temperature"],
        top_k=0,
        top_p=1.0,
        max_new_tokens=job["response_length"],
        num_return_sequences=copies,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    new = policy.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
    ended = (new == eos).long()
    lengths = (ended.cumsum(1) - ended == 0).sum(1)  # up to the first end token, and with it
    return [(prompts[i // copies], row[:n]) for i, (row, n) in enumerate(zip(new, lengths.tolist(), strict=True))]


@torch.no_grad()
def measure(policy: Any, reference: Any, reward_model: Any, samples: list[Sample], temperature: float) -> Tensor:
    """Score, KL and entropy of each sample, `[n, 3]`; `evaluate` says what they are."""
    lengths = torch.tensor([len(prompt) + len(completion) for prompt, completion in samples])
    ids = pad_sequence([torch.cat(sample) for sample in samples], batch_first=True)
    at = torch.arange(ids.shape[1])
    mask = (at < lengths[:, None]).long()
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in samples])
    chosen = (at >= prompt_lengths[:, None]) & mask.bool()
    ours, theirs = (_distributions(model, ids, mask, chosen, temperature) for model in (policy, reference))
    kl, entropy = (ours.exp() * (ours - theirs)).sum(-1), -(ours.exp() * ours).sum(-1)
    sums = [torch.zeros(chosen.shape).masked_scatter(chosen, terms).sum(1) for terms in (kl, entropy)]
    # The head is read where the sample ends, not where transformers finds the first pad: it compares ids.
    states = reward_model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    scores = reward_model.score(states[torch.arange(len(samples)), lengths - 1])[:, 0]
    return torch.stack([scores, *sums], 1)


def _distributions(model: Any, ids: Tensor, mask: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """What each token at `chosen` `[n, L]` was drawn from: log-probabilities `[C, vocabulary]`."""
    states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return torch.log_softmax(model.get_output_embeddings()(states[:, :-1][chosen[:, 1:]]) / temperature, dim=-1)


def evaluate(policy: Any, reference: Any, reward_model: Any, copies: int, job: dict[str, Any]) -> dict[str, float]:
    """Means over `copies` completions of every prompt.

    Returns:
        `score` (the reward model's, without penalties) and its standard deviation `score_std` over samples; `kl`, nats
        a completion: at every token of a sample the divergence of the two whole distributions over the vocabulary,
        which has the mean of the log ratio of the sampled tokens and less noise; `entropy`, nats a completion;
        `length`, tokens with the end token; `ended`, share that ended by itself; `samples`, their number.
    """
    tokenizer = AutoTokenizer.from_pretrained(job["reference"])
    eos = tokenizer.eos_token_id
    texts = [json.loads(line)["prompt"] for line in Path(job["prompts"]).read_text(encoding="utf-8").splitlines()]
    prompts = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    torch.manual_seed(job["seed"])
    samples: list[Sample] = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        samples += complete(policy, prompts[start : start + PROMPTS_AT_ONCE], copies, eos, job)
    samples.sort(key=lambda sample: sum(map(len, sample)))  # little is padded then
    parts = [
        measure(policy, reference, reward_model, samples[start : start + SAMPLES_AT_ONCE], job["temperature"])
        for start in range(0, len(samples), SAMPLES_AT_ONCE)
    ]
    scores, kl, entropy = torch.cat(parts).double().unbind(1)
    figures = {
        "score": scores.mean(),
        "score_std": scores.std(),
        "kl": kl.mean(),
        "entropy": entropy.mean(),
        "length": sum(len(completion) for _, completion in samples) / len(samples),
        "ended": sum(int(completion[-1] == eos) for _, completion in samples) / len(samples),
    }
    return {name: round(float(value), 5) for name, value in figures.items()} | {"samples": len(samples)}


def main() -> None:
    """Measure, print."""
    job = json.loads(sys.argv[1])
    reference = AutoModelForCausalLM.from_pretrained(job["reference"], dtype="float32").eval()
    reward_model = AutoModelForSequenceClassification.from_pretrained(job["reward"], dtype="float32").eval()
    figures = []
    for path, copies in job["policies"]:
        policy = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
        figures.append(evaluate(policy, reference, reward_model, copies, job))
    print("\n" + json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
