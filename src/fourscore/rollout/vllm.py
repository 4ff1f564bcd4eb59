"""Rollout by a vLLM server, which is given the policy's weights, or its adapter, whenever they have changed."""

import json
import logging
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fourscore.errors import FourscoreError, RolloutError
from fourscore.models.checkpoint import INDEX, WEIGHTS
from fourscore.models.support import Support
from fourscore.parallel import Parallel
from fourscore.ppo.experience import Experience
from fourscore.rollout.engine import gathered
from fourscore.rollout.sampling import Sampling, has_ended
from fourscore.rollout.vllm_process import OwnServer
from fourscore.rollout.vllm_server import FRESH, Served, Server

logger = logging.getLogger(__name__)

_OUTPUT = "output.safetensors"
_ROUNDS = 3
"""Times that a rollout asks for its samples; before each but the first the server had lost the weights."""
_SEEDS = 2**62
_ENDS_S = 10.0
"""That a server may take to end when its engine has died."""


class VLLM:
    """A server as rollout engine.

    Every process asks for its own samples; the main one hands over the weights, as files that the server reads, too.
    Each answer names the weights that drew it. What a server that was started again has drawn from other ones is thrown
    away, the weights are handed over once more, and the samples that are missing are asked for again.
    """

    def __init__(
        self,
        server: Server,
        save: Callable[[Path], Path],
        folder: Path,
        parallel: Parallel,
        *,
        adapter: bool,
        vocabulary: int,
        tied: tuple[str, str] | None = None,
        own: bool = False,
        process: OwnServer | None = None,
    ) -> None:
        """Take the server; nothing is sent yet.

        Args:
            server: where completions come from.
            save: writes the policy's weights, or its adapter, into a folder and returns where they are; every process
                calls it.
            folder: for these files, at the same path for the server; emptied whenever there are new ones.
            parallel: the processes.
            adapter: `save` writes an adapter of the model that is served.
            vocabulary: ids that the policy knows.
            tied: names of the weights of the embedding and of an output layer that is tied to it.
            own: the server is the run's: it is started for the first rollout, once more if it dies, and ended.
            process: that server, on the main process.
        """
        self._server, self._save, self._parallel = server, save, parallel
        self._folder = folder.absolute()
        self._adapter, self._vocabulary, self._tied = adapter, vocabulary, tied
        self._own, self._process = own, process
        self._run = secrets.token_hex(4)
        self._pushes = 0
        self._name = ""  # of the weights that the server should have
        self._loaded: Path | None = None  # where they are
        self._checked = self._changed = False
        self._threads: ThreadPoolExecutor | None = None

    def weights_changed(self) -> None:
        """The next completions must come from other weights."""
        self._changed = True

    def close(self) -> None:
        """Delete the files, and end a server of the run's own."""
        if self._process is not None:
            self._process.stop()
        if self._parallel.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._loaded = None

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, keep_support: bool = True) -> Experience:
        """Complete each prompt once; see `Engine`."""
        if keep_support and sampling.truncates:
            raise FourscoreError("a vLLM server does not say what top-k and top-p left to draw from: use neither")
        if self._start() or self._changed or not self._name:
            self._push()
        # From this process's random numbers, so that a resumed run asks for what the uninterrupted one did.
        seeds = torch.randint(_SEEDS, (len(prompts),)).tolist()
        found: dict[int, _Completion] = {}
        for rounds_left in reversed(range(_ROUNDS)):
            missing = [i for i in range(len(prompts)) if i not in found]
            answered, failure = self._ask(missing, prompts, sampling, seeds)
            found |= answered
            if not (rounds_left and self._died(failure)):
                self._together(failure)
            if not any(self._parallel.gather([len(found) < len(prompts)])):
                break
            if not rounds_left:
                raise self._server.error(f"lost the policy's weights {_ROUNDS} times in one rollout; is it shared?")
            new = self._start()
            if self._parallel.is_main:
                what = "was started again, as it had died" if new else "has other weights than it was given"
                logger.warning("%s: the server %s: it gets them again", self._server.name, what)
            self._checked = False
            self._push()
        return self._experience(prompts, [found[i] for i in range(len(prompts))], sampling, keep_support)

    def _start(self) -> bool:
        """See to it that a server of the run's own is there; whether it is a new one, without the policy's weights."""
        if not self._own:
            return False
        new, url, failure = False, "", ""
        if self._process is not None:
            new = not self._process.runs
            failure = _failure_of(self._process.start)
            url = self._process.url
        self._together(failure)
        [(new, self._server.url), *_] = self._parallel.gather([(new, url)])
        self._checked &= not new
        return new

    def _died(self, failure: str) -> bool:
        """Whether a request failed as a server of the run's own has ended: what is missing is for the next one then."""
        if not self._own or not any(self._parallel.gather([bool(failure)])):
            return False
        return any(self._parallel.gather([self._process is not None and self._process.ends(_ENDS_S)]))

    def _push(self) -> None:
        """Hand over the weights; they are written only where they are not in a file yet."""
        if self._changed or self._loaded is None:
            self._pushes += 1
            [self._run, *_] = self._parallel.gather([self._run])
            name = f"fourscore-{self._run}-{self._pushes}"
            if self._parallel.is_main:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._parallel.barrier()
            folder = self._save(self._folder / name)
            if self._tied is not None and not self._adapter and self._parallel.is_main:
                write_tied_output(folder, *self._tied)
        else:
            name, folder = self._name, self._loaded
        failure = _failure_of(self._hand_over, folder, name) if self._parallel.is_main else ""
        if self._died(failure):
            self._start()
            failure = _failure_of(self._hand_over, folder, name) if self._parallel.is_main else ""
        self._together(failure)
        self._name, self._loaded, self._changed, self._checked = name, folder, False, True

    def _hand_over(self, folder: Path, name: str) -> None:
        if not self._checked:
            found = unfit(self._server.describe(), adapter=self._adapter)
            if found:
                raise self._server.error("; ".join(found))
        if not self._adapter:
            self._server.load_weights(folder, name)
            return
        if self._name and self._name != name:
            self._server.unload_adapter(self._name)
        self._server.load_adapter(folder, name)

    def _together(self, failure: str) -> None:
        """Stop all processes if one of them has failed."""
        failures = [each for each in self._parallel.gather([failure]) if each]
        if failures:
            raise RolloutError(failures[0])

    def _ask(
        self, samples: list[int], prompts: list[list[int]], sampling: Sampling, seeds: list[int]
    ) -> tuple[dict[int, "_Completion"], str]:
        """The completions of some samples, but for those that came from other weights; and why some did not come."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(sampling.batch_size, thread_name_prefix="vllm")
        futures = {i: self._threads.submit(self._complete, prompts[i], sampling, seeds[i]) for i in samples}
        found: dict[int, _Completion] = {}
        failure = ""
        try:
            for i, future in futures.items():
                try:
                    completion = future.result()
                except CancelledError:
                    continue
                except RolloutError as error:
                    failure = failure or str(error)
                    for each in futures.values():  # but for those that are under way
                        each.cancel()
                    continue
                if completion is not None:
                    found[i] = completion
        finally:
            for future in futures.values():
                future.cancel()
        return found, failure

    def _complete(self, prompt: list[int], sampling: Sampling, seed: int) -> "_Completion | None":
        """One completion; None if other weights than the policy's drew some of it."""
        tokens: list[int] = []
        logprobs: list[float] = []
        weights = FRESH if self._adapter else self._name
        while len(tokens) < sampling.max_new_tokens:
            known = len(tokens)
            asked = parameters(sampling, known, seed + known)
            answer = self._server.complete(prompt + tokens, asked, self._name if self._adapter else None)
            if answer is None or answer.reason == "abort" or answer.versions != {weights}:
                return None
            tokens += answer.tokens
            logprobs += answer.logprobs
            if sampling.temperature > 0 and len(logprobs) != len(tokens):
                raise self._server.error(f"gave {len(logprobs)} logprobs for {len(tokens)} tokens")
            for end in range(known + 1, len(tokens) + 1):
                if has_ended(tokens[:end], sampling):
                    return tokens[:end], logprobs[:end], True
            if answer.reason == "length" and len(tokens) < sampling.max_new_tokens:
                raise self._server.error(
                    f"ends completions at {len(prompt) + len(tokens)} tokens; start it with a larger --max-model-len"
                )
            # Else it found a text of --stop_strings that begins in the prompt, or has a space more than ours: go on.
        return tokens, logprobs, False

    def _experience(
        self, prompts: list[list[int]], found: list["_Completion"], sampling: Sampling, keep_support: bool
    ) -> Experience:
        device = self._parallel.device
        completions = [tokens for tokens, _, _ in found]
        experience = gathered(prompts, completions, [ended for _, _, ended in found], sampling, device)
        if sampling.temperature > 0:
            drawn = [logprob for _, logprobs, _ in found for logprob in logprobs]
            experience.engine_logprobs = torch.tensor(drawn, dtype=torch.float32, device=device)
        if keep_support and sampling.restricted:  # only stop ids, and only before the shortest completion
            places = torch.cat([torch.arange(1, len(tokens) + 1, device=device) for tokens in completions])
            early = places < sampling.min_new_tokens
            experience.support = Support.without(sampling.stop_ids, early, self._vocabulary)
        return experience


def _failure_of(act: Callable[..., None], *arguments: Any) -> str:
    """What it raised as a `RolloutError`, or nothing."""
    try:
        act(*arguments)
    except RolloutError as error:
        return str(error)
    return ""


_Completion = tuple[list[int], list[float], bool]
"""Tokens, their logprobs, and whether it ended by itself."""


def parameters(sampling: Sampling, known: int, seed: int) -> dict[str, Any]:
    """A `Sampling` as vLLM's `SamplingParams`.

    Args:
        sampling: how to draw.
        known: tokens of the completion that are there already.
        seed: of this sample alone.
    """
    texts = sampling.stop_strings
    return {
        "max_tokens": sampling.max_new_tokens - known,
        # vLLM does not count the token that ends a completion.
        "min_tokens": max(0, sampling.min_new_tokens - 1 - known),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": seed,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,  # if EOS ends completions it is among the stop ids
        "stop": [] if texts is None else list(texts.texts),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # for texts: ours are looked for with special tokens in them, too
        "logprobs": 0 if sampling.temperature > 0 else None,
    }


def unfit(served: Served, *, adapter: bool, rank: int | None = None, length: int | None = None) -> list[str]:
    """Why a server cannot do what is asked of it, a sentence each with the way out.

    Args:
        served: what it says of itself.
        adapter: it is to take adapters.
        rank: of the adapter, where it is known.
        length: most tokens of prompt and completion together, where it is known.
    """
    found = []
    if served.logprobs_mode != "processed_logprobs":
        found.append(
            f"its logprobs are {served.logprobs_mode}, which are not those of the tokens it draws; start it with "
            "--logprobs-mode processed_logprobs"
        )
    if adapter and (served.lora_rank == 0 or not served.runtime_loras):
        found.append(
            "takes no adapters, which --use_peft needs; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, "
            f"--enable-lora and --max-lora-rank {rank or 'R'}"
        )
    elif adapter and rank is not None and rank > served.lora_rank:
        found.append(
            f"takes adapters up to rank {served.lora_rank}, this one has {rank}; start it with a larger --max-lora-rank"
        )
    if adapter and served.weights != FRESH:
        found.append(f"has the weights of another run ({served.weights}), no base for an adapter; start it again")
    if length is not None and length > served.max_length:
        found.append(
            f"takes {served.max_length} tokens, the longest prompt and --response_length are {length}; start it with a "
            "larger --max-model-len, or lower --max_prompt_length or --response_length"
        )
    return found


def write_tied_output(folder: Path, embedding: str, output: str) -> None:
    """Put an output layer that is tied to the embedding into a checkpoint, which `save_pretrained` has left out.

    On a CPU, vLLM 0.32 packs the output layer when it loads one, and goes on with what it packed if there is none.

    Args:
        folder: of the checkpoint.
        embedding: name of the weight that is there.
        output: name of the weight that is not.
    """
    index = folder / INDEX
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else None
    with safe_open(str(folder / (weight_map[embedding] if weight_map else WEIGHTS)), "pt") as file:
        save_file({output: file.get_tensor(embedding)}, folder / _OUTPUT, metadata={"format": "pt"})
    if weight_map is not None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map | {output: _OUTPUT}}), encoding="utf-8")
