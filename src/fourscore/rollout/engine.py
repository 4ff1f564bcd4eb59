"""What a rollout engine is: something that completes prompts with the policy as it is now."""

from typing import Protocol

import torch

from fourscore.ppo.experience import Experience
from fourscore.rollout.sampling import Sampling


class Engine(Protocol):
    """Completes prompts. Every process calls each method, equally often."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, keep_support: bool = True) -> Experience:
        """Complete each prompt once.

        Args:
            prompts: token ids, each at least one; of this process.
            sampling: how to draw.
            keep_support: keep what every token was drawn from, where that is not the whole vocabulary; logprobs need
                it.

        Returns:
            experience with ids, lengths and support filled in, samples in the order of `prompts`; and `logprobs`, if
            they are as good as those of another forward pass of the policy, or `engine_logprobs`, if it computes with
            weights of its own.

        Raises:
            RolloutError: the completions cannot be had.
        """
        ...

    def weights_changed(self) -> None:
        """The policy's weights are others now: the next completions must come from them."""
        ...

    def close(self) -> None:
        """Give back what completions needed, files among it; another `generate` may follow all the same."""
        ...


def gathered(
    prompts: list[list[int]],
    completions: list[list[int]],
    ended: list[bool],
    sampling: Sampling,
    device: torch.device,
) -> Experience:
    """Put prompts and completions together.

    Args:
        prompts: token ids.
        completions: token ids, one list a prompt, with the token that ended them.
        ended: whether a stop id or a text ended them; where there is neither, an EOS anywhere counts.
        sampling: how they were drawn.
        device: of the tensors.
    """
    if not sampling.stop_ids and sampling.stop_strings is None:
        ended = [sampling.eos_id in completion for completion in completions]
    return Experience(
        input_ids=torch.tensor(
            [t for prompt, completion in zip(prompts, completions, strict=True) for t in prompt + completion],
            device=device,
        ),
        prompt_lens=torch.tensor([len(p) for p in prompts], device=device),
        completion_lens=torch.tensor([len(c) for c in completions], device=device),
        has_eos=torch.tensor(ended, device=device),
    )
