"""A table of bad inputs with the message each one gives; it is also `docs/bad-inputs.md`.

`python tests/test_bad_inputs.py` writes the page.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors
import torch
import transformers
import vllm_server
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from tiny import CHAT_TEMPLATE, make_checkpoint, make_encoder, make_model, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fourscore import cli
from fourscore.models import checks
from fourscore.models.checks import is_emulated

PAGE = Path(__file__).parents[1] / "docs" / "bad-inputs.md"
SFT, REWARD = Path("sft"), Path("reward")
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Row:
    """One bad input, given to a run that is sound but for it.

    Attributes:
        title: what is wrong.
        flags: of `fourscore ppo`, after those of the sound run; a list in place of a string is the whole command.
        messages: the error lines, all of them; `...` stands for what differs from machine to machine.
        prepare: makes the input, in the directory with `sft`, `reward` and `prompts.jsonl`.
    """

    title: str
    flags: str | list[str]
    messages: tuple[str, ...]
    prepare: Callable[[], Any] = lambda: None


def row(title: str, flags: str | list[str], *messages: str, prepare: Callable[[], Any] = lambda: None) -> Row:
    return Row(title, flags, messages, prepare)


# ------------------------------------------------------------------------------------------------- how inputs are made


def config(folder: Path, **values: Any) -> Callable[[], Any]:
    """Sets values in a checkpoint's config."""

    def edit() -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def write(path: str | Path, text: str) -> Callable[[], Any]:
    return lambda: Path(path).write_text(text)


def remove(*paths: str | Path) -> Callable[[], Any]:
    return lambda: [Path(path).unlink() for path in paths]


def cut(file: Path, by: int) -> Callable[[], Any]:
    return lambda: os.truncate(file, file.stat().st_size - by)


def shards(last: bool = True, move: bool = False) -> Callable[[], Any]:
    """Splits the SFT checkpoint in two; `last`: the second file is there; `move`: the index has a name wrong."""

    def split() -> None:
        model = make_model("llama", make_tokenizer())
        model.save_pretrained(SFT, max_shard_size="200KB")
        (SFT / WEIGHTS).unlink()
        index = SFT / "model.safetensors.index.json"
        names = json.loads(index.read_text())
        if move:
            names["weight_map"]["model.norm.weight"] = sorted(names["weight_map"].values())[0]
            index.write_text(json.dumps(names))
        if not last:
            (SFT / sorted(names["weight_map"].values())[-1]).unlink()

    return split


def pickled(folder: Path) -> Callable[[], Any]:
    kind: Any = "policy" if folder == SFT else "reward"
    return lambda: make_checkpoint("llama", folder, kind, safe_serialization=False)


def adapter(
    folder: str, base: str | None = "base", kind: Any = "policy", peft: Any = None, **cfg: Any
) -> Callable[[], Any]:
    """An adapter in a new folder, beside its base."""

    def make() -> None:
        model = make_model("llama", make_tokenizer(), kind, **cfg)
        peft_config = peft or LoraConfig(
            task_type=TaskType.CAUSAL_LM if kind == "policy" else TaskType.SEQ_CLS, target_modules=["q_proj"]
        )
        adapted = get_peft_model(model, peft_config)
        adapted.peft_config["default"].base_model_name_or_path = base
        adapted.save_pretrained(folder)
        make_checkpoint("llama", "base", "policy")

    return make


def then(*steps: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: [step() for step in steps]


def pickle_adapter() -> None:
    adapter("adapter")()
    torch.save({}, "adapter/adapter_model.bin")
    Path("adapter/adapter_model.safetensors").unlink()


def other_tokens() -> None:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1").save_pretrained(REWARD)


def no_eos() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(SFT)


def reward_of(model_type: str, **sizes: Any) -> Callable[[], Any]:
    """Another model type in the reward checkpoint's config; the header of its weights is made to fit."""

    def make() -> None:
        shutil.rmtree(REWARD)
        make_checkpoint(model_type, REWARD, "reward", **sizes)

    return make


def without_tokenizer() -> None:
    for file in REWARD.glob("*token*"):
        file.unlink()


def without_head() -> None:
    model = make_model("bert", make_tokenizer(), "reward", **BERT)
    model.save_pretrained(
        REWARD, state_dict={k: v for k, v in model.state_dict().items() if not k.startswith("classifier")}
    )


def reward_file() -> None:
    code = "LIMIT = 5\ndef short(completions): return []\ndef right(completions, solution): return []\n"
    Path("mine.py").write_text(code)


def prompts(*rows: Any) -> Callable[[], Any]:
    return write("prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def gpt2() -> None:
    for folder, kind in ((SFT, "policy"), (REWARD, "reward")):
        shutil.rmtree(folder)
        make_checkpoint("gpt2", folder, kind)  # type: ignore[arg-type]


def weights_only_run() -> None:
    Path("runs/a/checkpoint-3").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text("")


def run_of_other_models() -> None:
    weights_only_run()
    Path("runs/a/config.yaml").write_text("sft_model_path: ./before\nreward_model_path: reward\n")
    for name in ("trainer_state.json", "optimizers.pt", "rng.pt"):
        Path("runs/a/checkpoint-3", name).touch()


def run_just_begun() -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("")


SERVERS: list[vllm_server.Server] = []
VLLM_PORT = 8000
"""In the rows; the server of a test listens where there is room."""


def vllm(**facts: Any) -> Callable[[], Any]:
    """A server that says this of itself."""

    def serve() -> None:
        said = vllm_server.Facts(**facts)

        def answer(method: str, path: str, body: Any) -> vllm_server.Answered:
            return vllm_server.described(method, path, said) or (400, {})

        server = vllm_server.Server(("127.0.0.1", 0), vllm_server.handler(answer))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        SERVERS.append(server)

    return serve


BERT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA_LAYERS = "(its linear layers are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj)"
CONVERT = (
    "--{flag} ./{folder}: pytorch_model.bin is a pickle, which can run code when it is read; convert it to "
    'safetensors: python -c "from transformers import {auto} as M, AutoTokenizer as T; '
    "a, b = './{folder}', './{folder}-safetensors'; M.from_pretrained(a, dtype='auto').save_pretrained(b); "
    'T.from_pretrained(a).save_pretrained(b)" (or trust it: --allow_pickle)'
)
AT = f"--vllm_server_url http://127.0.0.1:{VLLM_PORT}"
VLLM = f"--rollout_engine vllm {AT}"
WAY_OUT = "fetch it again"

ROWS = {
    "Flags and their values": [
        row(
            "flags that do not exist",
            "--max_step 3 --learningrate 1e-5 -lr 2",
            "there is no flag --max_step: did you mean --max_steps?",
            "there is no flag --learningrate: did you mean --learning_rate?",
            "there is no flag -lr",
        ),
        row(
            "flags of other trainers",
            "--torch_dtype bfloat16 --use_vllm --max_new_tokens 8",
            "there is no flag --torch_dtype: here that is --dtype",
            "there is no flag --use_vllm: here that is --rollout_engine vllm",
            "there is no flag --max_new_tokens: here that is --response_length",
        ),
        row(
            "a word without a flag",
            "prompts.jsonl --kl_coeff 1",
            "'prompts.jsonl' belongs to no flag; see fourscore ppo --help",
            "there is no flag --kl_coeff: did you mean --kl_coef?",
        ),
        row("text for a number", "--response_length long", "--response_length: invalid int value: 'long'"),
        row(
            "something of everything",
            "--response_length long --top_k --kl_coeff 1 --gamma 2 --min_response_length 60 --temperature -1e",
            "--response_length: invalid int value: 'long'",
            "--top_k: expected one argument",
            "--temperature: expected one argument",
            "there is no flag --kl_coeff: did you mean --kl_coef?",
            "--gamma 2.0: must be from 0 to 1",
        ),
        row(
            "completions of no length",
            "--response_length -1",
            "--response_length -1: must be at least 1",
        ),
        row(
            "completions that cannot be",
            ["--top_k", "1", "--top_p", "0", "--stop_strings", "Human:", "", "--min_response_length", "99"],
            "--top_p 0.0: must be above 0 and at most 1",
            "--top_k 1: leaves one token to draw, of which nothing is learned; give more, or 0 for all",
            "--stop_strings: one of the texts is empty; leave it out",
            "--min_response_length 99: is above --response_length 32; lower it",
        ),
        row("a choice there is not", "--kl_estimator k2", "--kl_estimator: invalid choice: 'k2' (choose from ...)"),
        row(
            "numbers out of range, in three groups of flags",
            "--gamma 2 --num_ppo_epochs 0 --lora_r 0 --dataset_streaming",
            "--dataset_streaming is not supported, the number of prompts sets the length of a run: drop it, or save "
            "the prompts you want to a .jsonl file",
            "--num_ppo_epochs 0: must be at least 1",
            "--gamma 2.0: must be from 0 to 1",
            "--lora_r 0: must be at least 1",
        ),
        row(
            "a flag that is refused",
            "--fp16 true",
            "--fp16 True: Loss scaling is not supported: use --bf16, or neither.",
        ),
        row(
            "a schedule that PPO cannot follow",
            "--lr_scheduler_type reduce_lr_on_plateau --eval_strategy steps",
            "--lr_scheduler_type reduce_lr_on_plateau: follows an evaluation loss, which PPO lacks: try linear",
        ),
        row(
            "a schedule of the value model that does not exist",
            "--value_lr_scheduler_type falling",
            "--value_lr_scheduler_type falling: must be one of linear, cosine, ...",
        ),
        row(
            "a target for a KL coefficient of 0",
            "--kl_target 6 --kl_coef 0",
            "--kl_target 6.0: a --kl_coef of 0 cannot adapt; give one above 0, or drop it",
        ),
        row(
            "a KL coefficient that would jump",
            "--kl_target 6 --kl_horizon 2",
            "--kl_horizon 2: is below the 4 samples of an update, so that kl_coef would jump; raise it",
        ),
        row(
            "a run in which the policy would never learn",
            "--value_warmup_updates 5 --max_steps 5",
            "--value_warmup_updates 5: the run has 5 updates, so the policy would never learn; lower it (0 is none), "
            "or make the run longer",
        ),
        row(
            "updates for a value model that does not learn",
            "--value_warmup_updates 2 --vf_coef 0",
            "--value_warmup_updates 2: with --vf_coef 0 nothing learns in them; raise it, or drop them (0)",
        ),
        row(
            "arguments that a schedule does not take",
            '--lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":2}',
            "--lr_scheduler_kwargs {'cycles': 2}: ... unexpected keyword argument 'cycles'",
        ),
        row(
            "an optimizer whose package is missing",
            "--optim adamw_torch_npu_fused",
            "--optim adamw_torch_npu_fused: ...",
        ),
        row("a tracker that does not exist", "--report_to paper", "--report_to paper: paper is not supported, ..."),
        row(
            "a push to the hub while offline",
            "--push_to_hub",
            "--push_to_hub true: HF_HUB_OFFLINE is set; unset it, or leave the flag out",
        ),
        row(
            "sharding with one process",
            "--fsdp full_shard",
            "--fsdp needs more than one process: start with `accelerate launch --num_processes N`, or leave it out",
        ),
        row(
            "a configuration file that is missing",
            "--config none.yaml",
            "--config none.yaml: No such file or directory",
        ),
        row(
            "a configuration file that is not YAML",
            "--config run.yaml",
            "--config run.yaml: is not YAML (...)",
            prepare=write("run.yaml", "a: ["),
        ),
        row(
            "an unknown key in it",
            "--config run.yaml",
            "--config run.yaml: there is no flag kl_coeff: did you mean kl_coef?",
            prepare=write("run.yaml", "kl_coeff: 0.1"),
        ),
        row(
            "more than one thing wrong in it",
            "--config run.yaml",
            "--config run.yaml: there is no flag max_new_tokens: here that is --response_length",
            "--config run.yaml: gamma: 'high' is not a number",
            "--config run.yaml: use_peft: 'maybe' is not true or false",
            prepare=write("run.yaml", "gamma: high\nuse_peft: maybe\nmax_new_tokens: 9"),
        ),
        row(
            "an SFT model alone",
            ["--sft_model_path", "./sft", "--dataset_name", "prompts.jsonl"],
            "--reward_model_path (or --reward_funcs, or --reward_url) must be named too: --sft_model_path is named",
        ),
        row(
            "models without prompts",
            ["--sft_model_path", "./sft", "--reward_model_path", "./reward"],
            "--dataset_name must be named too: the prompts for your models",
        ),
    ],
    "Checkpoints: paths and files": [
        row(
            "a folder that is missing",
            "--sft_model_path ./none",
            "--sft_model_path ./none: no such folder; give a checkpoint folder or a hub id (owner/name)",
        ),
        row(
            "a file",
            "--sft_model_path ./sft/config.json",
            "--sft_model_path ./sft/config.json: is a file; give the folder with config.json in it",
        ),
        row(
            "a hub id while offline",
            "--reward_model_path owner/name",
            "--reward_model_path owner/name: no such folder, not in the hub cache, and HF_HUB_OFFLINE is set; give a "
            "local checkpoint folder, or unset it",
        ),
        row(
            "neither folder nor hub id",
            ["--sft_model_path", "my model!", "--reward_model_path", "./reward", "--dataset_name", "prompts.jsonl"],
            "--sft_model_path my model!: no such folder, and not a hub id (owner/name) either",
        ),
        row(
            "a folder without a config",
            "",
            "--sft_model_path ./sft: no config.json in that folder; give a folder that save_pretrained wrote",
            prepare=remove(SFT / "config.json"),
        ),
        row(
            "a folder without weights",
            "",
            "--reward_model_path ./reward: no weights in that folder (*.safetensors); give a folder with them",
            prepare=remove(REWARD / WEIGHTS),
        ),
        row(
            "a config that is not JSON",
            "",
            "--sft_model_path ./sft: config.json cannot be used (...); mend it, or fetch it again",
            prepare=write(SFT / "config.json", "{"),
        ),
        row(
            "a model type that transformers does not know",
            "",
            "--sft_model_path ./sft: transformers ... does not know its model type 'llama9'; upgrade transformers, or "
            "give another model",
            prepare=config(SFT, model_type="llama9"),
        ),
        row(
            "a model with its own code",
            "",
            "--sft_model_path ./sft: comes with its own code; if you trust it, add --trust_remote_code",
            prepare=config(SFT, model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        ),
        row(
            "a config that makes no model",
            "",
            "--sft_model_path ./sft: no model can be built from its config.json (...); mend it",
            prepare=config(SFT, hidden_act="none such"),
        ),
        row(
            "a download that was cut off",
            "",
            "--sft_model_path ./sft: sft/model.safetensors: has ... bytes, its header says ...: the download was cut "
            "off; fetch it again",
            prepare=cut(SFT / WEIGHTS, 100),
        ),
        row(
            "more bytes than the header says",
            "",
            "--reward_model_path ./reward: reward/model.safetensors: has ... bytes, its header says ...: something "
            "was added to it; fetch it again",
            prepare=cut(REWARD / WEIGHTS, -100),
        ),
        row(
            "a file that is not safetensors",
            "",
            "--sft_model_path ./sft: sft/model.safetensors: is damaged, it has no safetensors header; fetch it again",
            prepare=write(SFT / WEIGHTS, "<html>503</html>"),
        ),
        row(
            "a pointer in place of the weights",
            "",
            "--sft_model_path ./sft: sft/model.safetensors: is a pointer of git-lfs, not the weights; fetch them "
            "with: git lfs pull",
            prepare=write(SFT / WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ),
        row(
            "a shard that is missing",
            "",
            "--sft_model_path ./sft: model.safetensors.index.json names model-...-of-....safetensors, which is not "
            "there (1 of ... files are missing); fetch the whole checkpoint",
            prepare=shards(last=False),
        ),
        row(
            "an index that is damaged",
            "",
            "--sft_model_path ./sft: sft/model.safetensors.index.json: is damaged (...); fetch it again",
            prepare=then(shards(), write(SFT / "model.safetensors.index.json", "{}")),
        ),
        row(
            "a tensor that is not in its shard",
            "",
            "--sft_model_path ./sft: sft/model.safetensors.index.json: says that model.norm.weight is in "
            "model-00001-of-....safetensors, which lacks it; fetch both files again",
            prepare=shards(move=True),
        ),
        row(
            "a policy in pickle files",
            "",
            CONVERT.format(flag="sft_model_path", folder="sft", auto="AutoModelForCausalLM"),
            prepare=pickled(SFT),
        ),
        row(
            "a reward model in pickle files",
            "",
            CONVERT.format(flag="reward_model_path", folder="reward", auto="AutoModelForSequenceClassification"),
            prepare=pickled(REWARD),
        ),
    ],
    "Checkpoints: adapters": [
        row(
            "an adapter without weights",
            "--sft_model_path ./adapter",
            "--sft_model_path ./adapter: has an adapter_config.json, but no adapter_model.safetensors; copy it there, "
            "too",
            prepare=then(adapter("adapter"), remove("adapter/adapter_model.safetensors")),
        ),
        row(
            "an adapter in a pickle",
            "--sft_model_path ./adapter",
            "--sft_model_path ./adapter: adapter_model.bin is a pickle, which can run code when it is read; convert it "
            'to safetensors: python -c "import torch; from safetensors.torch import save_file; w = '
            "torch.load('./adapter/adapter_model.bin', weights_only=True); save_file({k: t.contiguous().clone() for "
            "k, t in w.items()}, './adapter/adapter_model.safetensors')\" (or trust it: --allow_pickle)",
            prepare=pickle_adapter,
        ),
        row(
            "an adapter that names no base model",
            "--sft_model_path ./adapter",
            "--sft_model_path ./adapter: its adapter_config.json names no base_model_name_or_path; add it",
            prepare=adapter("adapter", base=None),
        ),
        row(
            "an adapter whose base model is missing",
            "--sft_model_path ./adapter",
            "--sft_model_path ./adapter: its base model ./lost: no such folder; give a checkpoint folder or a hub id "
            "(owner/name)",
            prepare=adapter("adapter", base="./lost"),
        ),
        row(
            "prompt tuning",
            "--sft_model_path ./adapter",
            "--sft_model_path ./adapter: is an adapter of PEFT type PROMPT_TUNING, which changes the prompt, so that "
            "old and new logprobs would not be of the same text; give a LoRA adapter or a whole model",
            prepare=adapter("adapter", peft=PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)),
        ),
        row(
            "an adapter of another base model",
            "--sft_model_path ./adapter",
            "--sft_model_path ./adapter: has weights for model.layers.0.self_attn.q_proj of width 128, which is (64, "
            "64) there; name the model it was trained on, in place of base, as base_model_name_or_path in its "
            "adapter_config.json",
            prepare=adapter("adapter", hidden_size=128),
        ),
        row(
            "an adapter with more layers than its base",
            "--sft_model_path ./adapter",
            "--sft_model_path ./adapter: has weights for model.layers.2.self_attn.q_proj, which LlamaForCausalLM "
            "lacks; name the model it was trained on, in place of base, as base_model_name_or_path in its "
            "adapter_config.json",
            prepare=adapter("adapter", num_hidden_layers=3),
        ),
        row(
            "a classifier's adapter as the SFT model",
            "--sft_model_path ./adapter",
            "--sft_model_path ./adapter: is an adapter of a sequence classifier; give the SFT checkpoint",
            prepare=adapter("adapter", kind="reward"),
        ),
        row(
            "an adapter without a head as the reward model",
            "--reward_model_path ./adapter",
            "--reward_model_path ./adapter: has no trained `score` head, its scores would be noise; give a trained "
            "reward model, or pass --allow_untrained_reward_head true",
            prepare=adapter("adapter"),
        ),
    ],
    "Models that do not fit": [
        row(
            "a reward model as the SFT model",
            "--sft_model_path ./reward",
            "--sft_model_path ./reward: is a LlamaForSequenceClassification, not a causal LM; give the SFT checkpoint",
        ),
        row(
            "an encoder-decoder as the SFT model",
            "",
            "--sft_model_path ./sft: model type 't5' is not a causal LM; give one",
            prepare=write(
                SFT / "config.json",
                json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 300}),
            ),
        ),
        row(
            "a causal LM as the reward model",
            "--reward_model_path ./sft",
            "--reward_model_path ./sft: has no trained `score` head, its scores would be noise; give a trained reward "
            "model, or pass --allow_untrained_reward_head true",
        ),
        row(
            "a reward model of three labels",
            "",
            "--reward_model_path ./reward: has num_labels=3, a reward model has 1; give one that was trained so",
            prepare=reward_of("llama", num_labels=3),
        ),
        row(
            "an encoder of two labels as the reward model",
            "",
            "--reward_model_path ./reward: has num_labels=2, a reward model has 1; give one that was trained so",
            prepare=reward_of("bert", **BERT, num_labels=2),
        ),
        row(
            "an encoder without a head",
            "",
            "--reward_model_path ./reward: has no trained `classifier` head, its scores would be noise; give a trained "
            "reward model, or pass --allow_untrained_reward_head true",
            prepare=then(reward_of("bert", **BERT), without_head),
        ),
        row(
            "an encoder without a tokenizer",
            "",
            "--reward_model_path ./reward: BertForSequenceClassification has no linear head named 'score', as decoders "
            "have, so it has to read text, but no tokenizer of its own is with it; copy that there, or give a reward "
            "model with the policy's tokenizer",
            prepare=then(reward_of("bert", **BERT), without_tokenizer),
        ),
        row(
            "a reward model of a type without a classifier",
            "",
            "--reward_model_path ./reward: model type 'mamba' has no sequence classifier in transformers; give a "
            "reward model that AutoModelForSequenceClassification loads",
            prepare=config(REWARD, model_type="mamba"),
        ),
        row(
            "vocabularies of two sizes and no tokenizer to read text with",
            "",
            "--reward_model_path ./reward: it has a vocabulary of 320, and --sft_model_path ./sft one of 300, so it "
            "has to read text, but no tokenizer of its own is with it; copy that there, or give a reward model with "
            "the policy's tokenizer",
            prepare=then(reward_of("llama", vocab_size=320), without_tokenizer),
        ),
        row(
            "a value model with another tokenizer",
            "--value_model_path ./reward",
            "--value_model_path ./reward: id 2 is 'w2' there and ... in ./sft; give a value model with the policy's "
            "tokenizer",
            prepare=other_tokens,
        ),
        row(
            "an encoder as the value model",
            "--value_model_path ./bert",
            "--value_model_path ./bert: BertForSequenceClassification has no linear head named 'score', as decoders "
            "have, and a value model reads the policy's tokens one by one; name another with --value_model_path",
            prepare=lambda: make_encoder("bert"),
        ),
        row(
            "a tokenizer that is larger than the embedding",
            "",
            "--sft_model_path ./sft: 10 tokens of the tokenizer ./sft (..., ...) are beyond its 290 embedding rows; "
            "give the tokenizer it was trained with (--model_name_or_path)",
            prepare=config(SFT, vocab_size=290),
        ),
        row(
            "no tokenizer",
            "",
            "--sft_model_path ./sft: no tokenizer could be loaded from it (...)",
            prepare=remove(SFT / "tokenizer.json", SFT / "tokenizer_config.json"),
        ),
        row(
            "a tokenizer without EOS",
            "",
            "--stop_token eos: the tokenizer has no EOS token; use --stop_token none, or --stop_token_id",
            prepare=no_eos,
        ),
        row(
            "a stop token beyond the vocabulary",
            "--stop_token_id 300",
            "--stop_token_id 300: the policy knows no such id; give one below 300",
        ),
        row(
            "more tokens to draw from than there are",
            "--top_k 301 --stop_token_id 5 300",
            "--stop_token_id 300: the policy knows no such id; give one below 300",
            "--top_k 301: the policy knows 300 tokens; give fewer, or 0 for all",
        ),
    ],
    "Rewards": [
        row(
            "a file that is missing",
            "--reward_funcs mine.py:short",
            "--reward_funcs mine.py:short: there is no such file",
        ),
        row(
            "a module that is missing",
            "--reward_funcs no_such.rewards:short",
            "--reward_funcs no_such.rewards:short: no_such.rewards cannot be imported (ModuleNotFoundError: No module "
            "named 'no_such')",
        ),
        row(
            "a file without a function's name",
            "--reward_funcs mine.py",
            "--reward_funcs mine.py: names no function; give mine.py:NAME",
        ),
        row(
            "a function that is not in the file",
            "--reward_funcs mine.py:shrt",
            "--reward_funcs mine.py:shrt: mine.py has no 'shrt': did you mean short?",
            prepare=reward_file,
        ),
        row(
            "a file that breaks",
            "--reward_funcs mine.py:short",
            "--reward_funcs mine.py:short: mine.py cannot be imported (NameError: name 'np' is not defined, in line 2 "
            "of ./mine.py)",
            prepare=write("mine.py", "LIMIT = 5\nHALF = np.divide(LIMIT, 2)\n"),
        ),
        row(
            "something that is not a function",
            "--reward_funcs mine.py:LIMIT",
            "--reward_funcs mine.py:LIMIT: LIMIT is a int, not a function",
            prepare=reward_file,
        ),
        row(
            "a function that asks for a column there is not",
            "--reward_funcs mine.py:right",
            "--reward_funcs mine.py:right: asks for 'solution', which is neither a column of the prompts (they have no "
            "other) nor one of prompts, completions, completion_ids, trainer_state, log_extra, log_metric",
            prepare=reward_file,
        ),
        row(
            "a checkpoint that is missing",
            "--reward_funcs ./none",
            "--reward_funcs ./none: no such folder; give a checkpoint folder or a hub id (owner/name)",
        ),
        row(
            "a causal LM as a further reward model",
            "--reward_funcs ./sft",
            "--reward_funcs ./sft: has no trained `score` head, its scores would be noise; give a trained reward "
            "model, or pass --allow_untrained_reward_head true",
        ),
        row(
            "two weights for three rewards",
            "--reward_funcs mine.py:short mine.py:short --reward_weights 1 2",
            "--reward_weights 1 2: there are 3 rewards (reward model, reward_funcs, reward_url, in this order); give a "
            "weight for each",
            prepare=reward_file,
        ),
        row(
            "a server that does not run",
            "--reward_url http://127.0.0.1:9/",
            "--reward_url http://127.0.0.1:9/: nobody answers there (...); start the server first",
        ),
        row(
            "an address of another kind",
            "--reward_url localhost:5000",
            "--reward_url localhost:5000: must start with http:// or https://",
        ),
        row(
            "a buffer that is longer than a completion",
            "--overlong_buffer 6",
            "--overlong_buffer 6: is above --response_length 5; lower it",
        ),
        row(
            "bounds that are none",
            "--score_clip 0 --missing_eos_penalty -1 --reward_timeout 0 --center_scores -1",
            "--missing_eos_penalty -1.0: must be above 0",
            "--reward_timeout 0.0: must be above 0",
            "--score_clip 0.0: must be above 0",
            "--center_scores -1: must not be negative",
        ),
    ],
    "Adapters, quantization, attention, dtype": [
        row(
            "4 bits without adapters",
            "--load_in_4bit",
            "--load_in_4bit: quantized weights cannot train, add --use_peft",
        ),
        row(
            "4 and 8 bits",
            "--use_peft --load_in_4bit --load_in_8bit",
            "--load_in_8bit and --load_in_4bit exclude each other: drop one",
        ),
        row(
            "a whole value model in 8 bits",
            "--use_peft --load_in_8bit --value_training full",
            "--value_training full with --load_in_8bit: quantized weights cannot be trained; use adapter",
        ),
        row(
            "a type that 4-bit weights cannot be stored as",
            "--use_peft --load_in_4bit --bnb_4bit_quant_storage int3",
            "--bnb_4bit_quant_storage int3: ...; use uint8, or leave it out",
        ),
        row(
            "a quantized checkpoint without adapters",
            "",
            "--sft_model_path ./sft: is quantized, so that adapters alone can train; add --use_peft",
            prepare=config(SFT, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ),
        row(
            "names of modules that match nothing",
            "--use_peft --lora_target_modules q_proj v_prj --lora_modules_to_save head "
            "--lora_target_parameters experts",
            f"--lora_target_modules v_prj: matches nothing in LlamaForCausalLM: did you mean v_proj? {LLAMA_LAYERS}",
            f"--lora_modules_to_save head: matches nothing in LlamaForCausalLM: did you mean lm_head? {LLAMA_LAYERS}",
            f"--lora_target_parameters experts: matches nothing in LlamaForCausalLM {LLAMA_LAYERS}",
        ),
        row(
            "a pattern that is broken",
            "--use_peft --lora_target_modules .*[",
            "--lora_target_modules .*[: is not a regular expression (...)",
        ),
        row(
            "a module that takes no adapter",
            "--use_peft --lora_target_modules act_fn",
            "--lora_target_modules act_fn: model.layers.0.mlp.act_fn of LlamaForCausalLM is a SiLU..., which takes no "
            "adapter; its linear layers are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        row(
            "a model type that PEFT has no targets for",
            "--use_peft",
            "--lora_target_modules is not given, and PEFT has no default for the model type 'olmo2' of "
            "--sft_model_path ./sft; use all-linear, or some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, "
            "v_proj",
            prepare=config(SFT, model_type="olmo2", architectures=["Olmo2ForCausalLM"]),
        ),
        row(
            "a task type that PEFT does not have",
            "--use_peft --lora_task_type LM",
            "--lora_task_type LM: must be one of ...; leave it out",
        ),
        row(
            "flash attention on a CPU",
            "--attn_implementation flash_attention_2",
            "--attn_implementation flash_attention_2: needs an accelerator, and this runs on a CPU; use sdpa or eager",
        ),
        row(
            "an attention that does not exist",
            "--attn_implementation fast",
            "--attn_implementation fast: LlamaForCausalLM cannot use it here (...); use sdpa or eager",
            "--attn_implementation fast: LlamaForSequenceClassification cannot use it here (...); use sdpa or eager",
        ),
        row(
            "an attention that the model lacks",
            "--attn_implementation sdpa",
            "--attn_implementation sdpa: BloomForCausalLM cannot use it here (...); use eager",
            prepare=config(
                SFT, model_type="bloom", architectures=["BloomForCausalLM"], hidden_size=64, n_layer=1, n_head=4
            ),
        ),
        row(
            "adapters on float16 weights",
            "--use_peft --dtype float16",
            "--dtype float16: adapters on float16 weights would need loss scaling; use --dtype bfloat16 or float32",
        ),
    ],
    "Prompts, lengths and batches": [
        row(
            "a file that is missing",
            "--dataset_name none.jsonl",
            "--dataset_name none.jsonl: no such file or folder; . holds prompts.jsonl, reward/, sft/",
        ),
        row(
            "a file of another type",
            "--dataset_name prompts.txt",
            "--dataset_name prompts.txt: prompts.txt: not a file type that holds prompts; those are .jsonl, .json, "
            ".parquet, .csv",
            prepare=write("prompts.txt", "a prompt\n"),
        ),
        row(
            "an empty file",
            "",
            "--dataset_name prompts.jsonl: prompts.jsonl is empty",
            prepare=write("prompts.jsonl", ""),
        ),
        row(
            "a file that is damaged",
            "",
            "--dataset_name prompts.jsonl: prompts.jsonl cannot be read as .jsonl: ...",
            prepare=write("prompts.jsonl", '{"prompt": '),
        ),
        row(
            "no such column",
            "",
            "--dataset_name prompts.jsonl: the prompt dataset has no column 'prompt'; its columns are question: name "
            "the one with the prompts with --prompt_column",
            prepare=prompts({"question": "a film"}),
        ),
        row(
            "an empty prompt",
            "",
            "--dataset_name prompts.jsonl: prompt 1 (column 'prompt') is empty",
            prepare=prompts({"prompt": "a film"}, {"prompt": ""}),
        ),
        row(
            "a row that holds all prompts",
            "--dataset_name all.json",
            "--dataset_name all.json: the prompt dataset has no column 'prompt'; its columns are data: it is one row "
            "that holds a list: write its items a row each",
            prepare=write("all.json", '{"data": [{"prompt": "a film"}, {"prompt": "a play"}]}'),
        ),
        row(
            "a row of several prompts",
            "--dataset_name all.json",
            "--dataset_name all.json: prompt 0 (column 'prompt') is a list of 2 texts: write each as a row",
            prepare=write("all.json", '{"prompt": ["a film", "a play"]}'),
        ),
        row(
            "conversations without a chat template",
            "",
            "--dataset_name prompts.jsonl: prompt 0 (column 'prompt') is a conversation, and the tokenizer has no chat "
            "template: use prompts of text, or a tokenizer with a chat template",
            prepare=prompts({"prompt": [{"role": "user", "content": "a film"}]}),
        ),
        row(
            "no split to evaluate on",
            "--eval_strategy steps",
            "--dataset_name prompts.jsonl: has no split test of prompts that were not trained on, only train; name "
            "some with --eval_dataset_name, or --eval_strategy no",
        ),
        row(
            "prompts that are all too long",
            "--max_prompt_length 1",
            "--dataset_name prompts.jsonl: all 8 prompts are longer than --max_prompt_length 1 (the shortest has ... "
            "tokens): raise it, or pass --max_prompt_length_action truncate",
        ),
        row(
            "more tokens than learned positions",
            "--response_length 128",
            "--response_length 128: with the longest prompt (... tokens) that makes ... tokens, but --sft_model_path "
            "./sft was made for 128; lower --max_prompt_length or --response_length",
            "--response_length 128: with the longest prompt (... tokens) that makes ... tokens, but "
            "--reward_model_path ./reward was made for 128; lower --max_prompt_length or --response_length",
            prepare=gpt2,
        ),
        row(
            "minibatches that do not divide the batch",
            "--num_mini_batches 3",
            "--num_mini_batches 3 does not divide the 4 samples of an update per process "
            "(--per_device_train_batch_size 4 x --gradient_accumulation_steps 1): change one of the three",
        ),
        row(
            "more completions of a prompt than samples in a batch",
            "--num_generations 8",
            "--num_generations 8 does not divide the 4 samples of an update (--per_device_train_batch_size 4 x "
            "--gradient_accumulation_steps 1): change one of them",
        ),
        row(
            "less than one sample",
            "--max_steps -1 --num_train_epochs 0.1",
            "--num_train_epochs 0.1 of 8 prompts is not one sample: raise it",
        ),
    ],
    "Output": [
        row(
            "a directory with something in it",
            "--output_dir reward",
            "--output_dir reward is not empty (config.json, model.safetensors, tokenizer.json, "
            "tokenizer_config.json): pass --resume_from_checkpoint true to go on with the run in it, or another "
            "--output_dir",
        ),
        row(
            "a run that was stopped before it had done anything",
            "",
            "--output_dir run holds a run that has not finished an update yet (config.yaml is all there is): pass "
            "--resume_from_checkpoint true to start it over, or another --output_dir",
            prepare=run_just_begun,
        ),
        row("a file", "--output_dir prompts.jsonl", "--output_dir prompts.jsonl is a file: give another --output_dir"),
        row(
            "a directory below a file",
            "--output_dir prompts.jsonl/run",
            "--output_dir prompts.jsonl/run: ./prompts.jsonl is a file; give another --output_dir",
        ),
        row(
            "nothing to resume",
            "--resume_from_checkpoint true",
            "--output_dir run holds no run to resume: leave --resume_from_checkpoint out",
        ),
        row(
            "a checkpoint without optimizer state",
            "--output_dir runs/a --resume_from_checkpoint runs/a/checkpoint-3",
            "--resume_from_checkpoint runs/a/checkpoint-3: trainer_state.json is missing, so it cannot be resumed "
            "(--save_only_model leaves it out); weights alone can be passed as --sft_model_path",
            prepare=weights_only_run,
        ),
        row(
            "a run in place of a checkpoint",
            "--output_dir runs/a --resume_from_checkpoint runs/a",
            "--resume_from_checkpoint runs/a: is a run; name a checkpoint in it, such as runs/a/checkpoint-3, or true "
            "for the last of --output_dir",
            prepare=weights_only_run,
        ),
        row(
            "a run to go on with other models",
            "--output_dir runs/a --resume_from_checkpoint",
            "--sft_model_path ./sft: the run in runs/a began with ./before, and would go on with another reference or "
            "other rewards; name that one, or write where it is now into runs/a/config.yaml",
            prepare=run_of_other_models,
        ),
        row(
            "a disk that is too small",
            "",
            "--output_dir run: the disk has ... GiB left, and a checkpoint takes ... GiB; free some space, use "
            "--use_peft, or give another --output_dir",
            prepare=config(SFT, intermediate_size=10**12),
        ),
    ],
    "The vLLM server": [
        row(
            "a server without the engine",
            "--vllm_server_url http://127.0.0.1:8000",
            "--vllm_server_url http://127.0.0.1:8000: does nothing without --rollout_engine vllm; add it or drop this",
        ),
        row(
            "a Python that is none, to start a server with",
            "--rollout_engine vllm --vllm_python /nowhere/python",
            "--vllm_python /nowhere/python: is no Python that runs ([Errno 2] No such file or directory: "
            "'/nowhere/python'); install vllm there, name another Python with --vllm_python, or a server with "
            "--vllm_server_url",
        ),
        row(
            "a server to be started, and another one",
            f"{VLLM} --vllm_python python --vllm_gpu_memory_utilization 30",
            "--vllm_gpu_memory_utilization 30.0: must be between 0 and 1",
            "--vllm_python python: starts a server, and --vllm_server_url names one; drop one of the two",
        ),
        row(
            "sampling that it cannot do",
            f"{VLLM} --top_k 50 --top_p 0.9 --temperature 3",
            "--top_k 50 and --top_p 0.9 with --rollout_engine vllm: the server does not say which tokens that leaves, "
            "and logprobs need it; drop it, or use --rollout_engine transformers",
            "--temperature 3.0 with --rollout_engine vllm: vLLM draws at 0.01 to 2.0; change it, or use "
            "--rollout_engine transformers",
        ),
        row(
            "an address of another kind",
            "--rollout_engine vllm --vllm_server_url localhost:8000",
            "--vllm_server_url localhost:8000: must start with http:// or https://",
        ),
        row(
            "a server that does not run",
            "--rollout_engine vllm --vllm_server_url http://127.0.0.1:9",
            "--vllm_server_url http://127.0.0.1:9: no answer (...); start the server, docs/rollout.md says how",
        ),
        row(
            "a server that was started without what it needs",
            VLLM,
            f"{AT}: is not in development mode; start it with VLLM_SERVER_DEV_MODE=1",
            prepare=vllm(dev=False),
        ),
        row(
            "one that takes no tokens",
            VLLM,
            f"{AT}: takes no token ids; start it with --enable-scale-out",
            prepare=vllm(scale_out=False),
        ),
        row(
            "one with other logprobs, and too short",
            VLLM,
            f"{AT}: its logprobs are raw_logprobs, which are not those of the tokens it draws; start it with "
            "--logprobs-mode processed_logprobs",
            f"{AT}: takes 8 tokens, the longest prompt and --response_length are ...; start it with a larger "
            "--max-model-len, or lower --max_prompt_length or --response_length",
            prepare=vllm(logprobs_mode="raw_logprobs", max_model_len=8),
        ),
        row(
            "one that takes no adapters",
            f"{VLLM} --use_peft",
            f"{AT}: takes no adapters, which --use_peft needs; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, "
            "--enable-lora and --max-lora-rank 16",
            prepare=vllm(max_lora_rank=0),
        ),
        row(
            "an adapter that is too large for it, on weights of another run",
            f"{VLLM} --use_peft --lora_r 32",
            f"{AT}: takes adapters up to rank 16, this one has 32; start it with a larger --max-lora-rank",
            f"{AT}: has the weights of another run (fourscore-1234-5), no base for an adapter; start it again",
            prepare=vllm(weights="fourscore-1234-5"),
        ),
        row(
            "an adapter that vLLM has not",
            f"{VLLM} --use_peft --use_dora",
            "--use_dora with --rollout_engine vllm: vLLM cannot take such an adapter; leave out one of the two",
            prepare=vllm(),
        ),
        row(
            "a server of another model",
            VLLM,
            f"{AT}: serves ./reward, whose vocab_size is 299, but --sft_model_path ./sft has ...; start it with that "
            "one",
            prepare=then(config(REWARD, vocab_size=299), vllm(path="./reward")),
        ),
    ],
    "Several at once": [
        row(
            "one thing wrong in each of six flags",
            "--sft_model_path ./none --use_peft --lora_target_modules q_prj --num_mini_batches 3 --output_dir sft "
            "--dataset_name none.jsonl",
            "--sft_model_path ./none: no such folder; give a checkpoint folder or a hub id (owner/name)",
            "--reward_model_path ./reward: has num_labels=3, a reward model has 1; give one that was trained so",
            "--lora_target_modules q_prj: matches nothing in LlamaForSequenceClassification: did you mean q_proj? "
            + LLAMA_LAYERS,
            "--dataset_name none.jsonl: no such file or folder; . holds prompts.jsonl, reward/, sft/",
            "--num_mini_batches 3 does not divide the 4 samples of an update per process "
            "(--per_device_train_batch_size 4 x --gradient_accumulation_steps 1): change one of the three",
            "--output_dir sft is not empty (...): pass --resume_from_checkpoint true to go on with the run in it, or "
            "another --output_dir",
            prepare=reward_of("llama", num_labels=3),
        ),
        row(
            "files, labels and lengths of one model",
            "",
            "--reward_model_path ./reward: reward/model.safetensors: has ... bytes, its header says ...: the "
            "download was cut off; fetch it again",
            "--reward_model_path ./reward: has num_labels=3, a reward model has 1; give one that was trained so",
            "--reward_model_path ./reward: is quantized, so that adapters alone can train; add --use_peft",
            prepare=then(
                reward_of("llama", num_labels=3),
                config(REWARD, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
                cut(REWARD / WEIGHTS, 1),
            ),
        ),
    ],
}


# ------------------------------------------------------------------------------------------------------------ the tests


SOUND = (
    "--sft_model_path ./sft --reward_model_path ./reward --dataset_name prompts.jsonl --output_dir run --use_cpu "
    "--per_device_train_batch_size 4 --response_length 5 --max_steps 2"
)


def command(flags: str | list[str]) -> list[str]:
    return ["ppo", *(flags if isinstance(flags, list) else f"{SOUND} {flags}".split())]


@pytest.fixture
def place(tmp_path, monkeypatch, llama_policy, llama_reward) -> Iterator[Path]:
    """A directory with all that a sound run needs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama_policy, "sft")
    shutil.copytree(llama_reward, "reward")
    prompts(*({"prompt": f"the film {word} was"} for word in "abcdefgh"))()
    yield tmp_path
    while SERVERS:
        server = SERVERS.pop()
        server.shutdown()
        server.server_close()


@pytest.fixture
def weights_read(monkeypatch) -> list[str]:
    """What has read weights: it stays empty, whatever code swallows the error."""
    reads: list[str] = []

    def refuse(name: str) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            reads.append(name)
            raise AssertionError(f"{name} was called")

        return read

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse("from_pretrained"))
    monkeypatch.setattr(torch, "load", refuse("torch.load"))
    for module in list(sys.modules.values()):
        for name in ("safe_open", "safe_load_file", "load_file"):
            if getattr(vars(module).get(name), "__module__", "").startswith(("safetensors", "builtins")):
                monkeypatch.setattr(module, name, refuse(name))
    return reads


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def pattern(message: str) -> str:
    return ".*".join(re.escape(part) for part in message.split("..."))


@pytest.mark.parametrize("case", [row for rows in ROWS.values() for row in rows], ids=lambda row: row.title)
def test_bad_input(case, place, weights_read, capsys):
    case.prepare()
    files = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    capsys.readouterr()
    port = f":{SERVERS[0].server_port if SERVERS else VLLM_PORT}"
    given = [word.replace(f":{VLLM_PORT}", port) for word in command(case.flags)]
    assert cli.main(given) == 2
    assert not weights_read
    lines = capsys.readouterr().err.replace(f"{place}/", "./").replace(port, f":{VLLM_PORT}").splitlines()
    assert [line for line in lines if not line.startswith(("error: ", "warning: "))] == []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    assert len(errors) == len(case.messages), errors
    for error, message in zip(errors, case.messages, strict=True):
        assert re.fullmatch(pattern(message), error), error
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == files, "something was written"


def test_the_sound_run_reads_weights(place, weights_read, capsys):
    """What the table's runs stop short of: otherwise their silence would show nothing."""
    with pytest.raises(AssertionError, match="from_pretrained was called"):
        cli.main(command(""))
    assert weights_read == ["from_pretrained"]
    assert safetensors.safe_open.__name__ == "read"


def test_docs_have_the_table():
    assert PAGE.read_text(encoding="utf-8") == render(), "run python tests/test_bad_inputs.py"


def test_no_traceback_of_a_process(place):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    flags = command("--sft_model_path ./none --num_mini_batches 3")
    done = subprocess.run([sys.executable, "-m", "fourscore", *flags], capture_output=True, text=True, env=env)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert [line.split()[:2] for line in done.stderr.splitlines()] == [
        ["error:", "--sft_model_path"],
        ["error:", "--num_mini_batches"],
    ]


@pytest.mark.parametrize("folder", ["sft", "reward", "adapter"])
def test_printed_command_converts(folder, place, capsys):
    flag = "--reward_model_path" if folder == "reward" else "--sft_model_path"
    if folder == "adapter":
        adapter("adapter")()
        torch.save(safetensors.torch.load_file("adapter/adapter_model.safetensors"), "adapter/adapter_model.bin")
        Path("adapter/adapter_model.safetensors").unlink()
    else:
        pickled(Path(folder))()
    assert cli.main(command(f"{flag} ./{folder} --num_mini_batches 3")) == 2
    shell = re.search(r"safetensors: (python -c .*) \(or trust it", capsys.readouterr().err)
    assert shell is not None
    if folder == "sft":
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(shell[1], shell=True, check=True, env=os.environ | {"PATH": path})
    else:  # the same without the seconds that a process takes to import torch
        python, option, code = shlex.split(shell[1])
        assert (python, option) == ("python", "-c")
        exec(code, {})
    # The other mistake is the only one that is left.
    converted = folder if folder == "adapter" else f"{folder}-safetensors"
    assert cli.main(command(f"{flag} ./{converted} --num_mini_batches 3")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --num_mini_batches") and said.count("\n") == 1


def test_pickles_that_are_trusted(place, capsys):
    pickled(SFT)()
    pickled(REWARD)()
    assert cli.main(command("--allow_pickle --num_mini_batches 3")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_conversations_with_a_template_are_fine(place, capsys):
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(SFT)
    prompts({"prompt": [{"role": "user", "content": "a film"}]})()
    assert cli.main(command("--num_mini_batches 3")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_warnings_are_lines_too(place, capsys):
    assert cli.main(command("--bf16 --num_mini_batches 3")) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: --bf16 on a CPU is emulated")
    assert second.startswith("error: --num_mini_batches 3")


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ("--use_kl_loss --kl_coef 0", "--use_kl_loss has no effect with --kl_coef 0"),
        ("--kl_estimator k3", "--kl_estimator k3 in the reward hardly holds the policy near its reference"),
        ("--early_stop_kl 0.1 --num_ppo_epochs 1", "--early_stop_kl 0.1 has no effect on updates of one step"),
        ("--positive_lm_threshold 1", "--positive_lm_threshold 1.0 has no effect without --positive_lm_coef"),
        ("--overlong_penalty 2", "--overlong_penalty 2.0 has no effect without --overlong_buffer"),
        ("--preset vapo --response_length 8", "--lam_alpha 0.05: completions of at most 20 tokens get a lambda of 0"),
    ],
)
def test_doubtful_combinations_are_warnings(flags, warned, place, capsys):
    assert cli.main([*command(flags), "--stop_token_id", "100000"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith(f"warning: {warned}")], said


@pytest.mark.parametrize("emulated", [True, False])
def test_dtype_that_is_emulated_is_a_warning(emulated, place, monkeypatch, capsys):
    monkeypatch.setattr(checks, "is_emulated", lambda dtype: emulated)
    assert cli.main(command("--dtype bfloat16 --num_mini_batches 3")) == 2
    warned = "warning: --dtype bfloat16: this CPU has no bfloat16 instructions" in capsys.readouterr().err
    assert warned == emulated


def test_emulation_is_read_from_the_processor(monkeypatch):
    for line, slow in (
        ("flags : fpu avx2", True),
        ("flags : fpu avx512_bf16", False),
        ("Features : asimd bf16", False),
    ):
        monkeypatch.setattr(checks, "cpu_info", lambda line=line: f"processor : 0\n{line}\n")
        assert is_emulated(torch.bfloat16) == slow


def test_lengths_beyond_rotary_positions_and_a_full_disk_are_warnings(place, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10 * 2**20))
    flags = "--response_length 200 --stop_token_id 300 --max_steps 400 --save_steps 2"
    assert cli.main(command(flags)) == 2
    lines = capsys.readouterr().err.splitlines()
    lengths = [line for line in lines if line.startswith("warning: --response_length 200: with the longest prompt")]
    assert len(lengths) == 2
    assert any(
        "the disk has 10.0 MiB left, and 200 checkpoints of 2.4 MiB" in line
        for line in lines
        if line.startswith("warning: ")
    )


def test_a_moving_average_takes_room_on_the_disk(place, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10 * 2**20))
    sizes = []
    for flags in ("", "--ema_decay 0.9"):
        assert cli.main(command(f"{flags} --stop_token_id 300 --max_steps 400 --save_steps 2")) == 2
        sizes.append(float(re.search(r"checkpoints of ([\d.]+) MiB", capsys.readouterr().err)[1]))
    assert sizes[0] == 2.4 and sizes[1] == pytest.approx(2.4 + 2.4 / 6, abs=0.1)  # policy and value, weights and state


# ------------------------------------------------------------------------------------------------------------- the page


def render() -> str:
    """The text of `docs/bad-inputs.md`."""
    count = sum(map(len, ROWS.values()))
    lines = [
        "# Bad inputs",
        "",
        "Written by `python tests/test_bad_inputs.py`; edit the table there, not this page.",
        "",
        "`fourscore ppo` checks everything that can be known without weights before it reads any: files and headers,",
        "configs, tokenizers, prompts, lengths, batches, adapters, attention, dtype, disk, output directory. It looks",
        "at the flags and, if they are sound, at what they name; all that is wrong with either is printed at once, a",
        "line of `error:` for each thing with the flag, its value and the way out; the exit status is 2. A line of",
        "`warning:` says what costs time or quality, and stops nothing. In Python, `load_models` checks its models in",
        "the same way and raises one `FourscoreError` with these lines.",
        "",
        f"These {count} inputs are a test: each prints just these lines, none reads weights, none leaves a traceback.",
        "The run is sound but for what the first column says; `...` stands for what differs from machine to machine.",
    ]
    for title, rows in ROWS.items():
        lines += ["", f"## {title}", "", "| input | message |", "| --- | --- |"]
        for each in rows:
            given = f"<br>`{each.flags}`" if isinstance(each.flags, str) and each.flags else ""
            messages = "<br>".join(_code(message) for message in each.messages)
            lines.append(f"| {each.title}{given} | {messages} |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
