"""PPOTrainer: rollout, scoring, advantages, update, and the run around them."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState
from transformers.trainer_utils import TrainOutput, enable_full_determinism

from fourscore.data import PromptOrder, longest_prompt, other_columns, prompt_ids, tokenize_prompts
from fourscore.errors import FourscoreError, RatioError, StoppedRun
from fourscore.models import pass_graphs
from fourscore.models.adapters import adapter_folder, trained_adapter
from fourscore.models.average import MovingAverage
from fourscore.models.checks import check_length, check_shipped_policy, check_stop_token, check_top_k
from fourscore.models.forward import without_peft
from fourscore.models.tokenizer import saved_tokenizer
from fourscore.parallel import Parallel
from fourscore.ppo.experience import Experience, sum_per_sample
from fourscore.ppo.first_ratio import ratio_bound, ratio_finding
from fourscore.ppo.kl_control import adapted_kl_coef
from fourscore.ppo.objective import mismatch_metrics, objective_metrics, value_metrics
from fourscore.ppo.optim import optimization, step_schedules
from fourscore.ppo.roles import prepare_roles
from fourscore.ppo.scoring import fill_in, kl_of_samples
from fourscore.ppo.targets import Targets, fill_in_rewards
from fourscore.ppo.update import UpdateSettings, makes_values, update
from fourscore.rewards.build import build_scorer
from fourscore.rewards.samples import Reward, Samples
from fourscore.rewards.scorer import Rated
from fourscore.rewards.server import Server
from fourscore.rewards.text_model import tokenizer_of_text_model
from fourscore.rollout.build import build_engine
from fourscore.rollout.sampling import Sampling
from fourscore.rollout.transformers import overridden_settings
from fourscore.runs import checkpoint, directory
from fourscore.runs.card import model_card
from fourscore.runs.clock import Clock
from fourscore.runs.hub import upload
from fourscore.runs.memory import give_back, keep_freed_memory, peak_gib, return_freed_memory
from fourscore.runs.metrics import JsonLines, write_json_atomic
from fourscore.runs.profile import Profile
from fourscore.runs.progress import PPOProgress
from fourscore.runs.samples import print_samples

logger = logging.getLogger(__name__)

SAMPLES_SHOWN = 5
MISMATCH = 0.1
"""Nats a token between engine and policy in the mean, more than rounding makes."""


@dataclass
class PPOState(TrainerState):
    """transformers' trainer state, with the number of samples drawn so far and what the next update starts from.

    Attributes:
        episode: samples drawn.
        kl_coef: the next update's.
        scorer: the numbers that shape scores.
    """

    episode: int = 0
    kl_coef: float = 0.0
    scorer: dict[str, Any] = field(default_factory=dict)


class PPOTrainer:
    """Trains a policy and a value model with PPO.

    The loop is that of "The N+ Implementation Details of RLHF with PPO" (Huang et al. 2024, arXiv 2403.17031); the
    arguments are those of TRL 1.12's `PPOTrainer`.

    Args:
        args: all settings.
        processing_class: the policy's tokenizer, with an explicit pad token.
        model: policy, a causal LM, plain or PEFT.
        ref_model: reference policy. None: with PEFT the policy with its adapter off, else a frozen copy.
        reward_model: sequence classifier with one label; None where `reward_funcs` or `args.reward_url` take its place.
            If its checkpoint has another tokenizer than the policy's, or it is an encoder, it is given text.
        train_dataset: rows with `input_ids`, or with a `prompt` that is text or a conversation.
        value_model: sequence classifier with one label. With `args.share_value_backbone` it is None (another one is
            ignored with a warning): its backbone is the policy's, and its head starts at zero.
        data_collator: called on a list of rows; its `input_ids` are the prompts, where its `attention_mask` is 1.
        eval_dataset: prompts for `evaluate` and `generate_completions`.
        optimizers: an optimizer over both policy and value model, and its schedule; built from `args` where None.
        callbacks: transformers callbacks, beside the ones that `args.report_to` names.
        peft_config: adapter for the policy and, unless `args.value_training` is "full", the value model.
        reward_funcs: more rewards, after those that `args.reward_funcs` names: functions with the signature of TRL's
            GRPO, sequence classifiers that read text, or strings as in that flag. `docs/rewards.md` says what a
            function is given and may return.
        reward_processing_class: tokenizer of a reward model that reads text; None: that of its checkpoint.
        checked: whether `preflight` has held prompts and completions against the positions that the models were made
            for, and a resumed run's settings against those that it had.

    Raises:
        FourscoreError: settings, models or data that do not fit together.

    Attributes:
        model: the policy.
        ref_model: the reference policy, or None.
        reward_model: frozen, or None. With FSDP and adapters it is the value model, its adapter off while it scores.
        value_model: trains.
        average: the moving average of the policy's weights, with `args.ema_decay`.
        engine: what draws completions.
        scorer: the reward model and all other rewards together.
        state: transformers' `TrainerState`, with `episode`.
        run_config: dataclasses that `config.yaml` records.
    """

    def __init__(
        self,
        args: Any,
        processing_class: Any,
        model: Any,
        ref_model: Any | None,
        reward_model: Any | None,
        train_dataset: Dataset,
        value_model: Any | None,
        data_collator: Any | None = None,
        eval_dataset: Dataset | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any | None] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        reward_funcs: Any | None = None,
        reward_processing_class: Any | None = None,
        checked: bool = False,
    ) -> None:
        models = {"model": model, "ref_model": ref_model, "reward_model": reward_model, "value_model": value_model}
        for name, given in models.items():
            if not isinstance(given, torch.nn.Module) and (given is not None or name == "model"):
                raise FourscoreError(f"{name} {given!r}: must be a loaded model; fourscore.load_models loads all roles")
        check_shipped_policy(getattr(model, "name_or_path", ""), processing_class)
        self.args = args
        self.processing_class = processing_class
        self._checked = checked
        self.parallel = Parallel.start(args)
        self._keeps_memory = False
        if self.parallel.device.type == "cpu":
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            if args.keep_freed_memory is False:
                return_freed_memory(weights)
            else:
                self._keeps_memory = keep_freed_memory(weights)
        self.run_config: list[Any] = [args]
        if train_dataset is None:
            raise FourscoreError("train_dataset is missing: pass a dataset of prompts.")
        self.train_dataset = self._tokenized(train_dataset)
        self.eval_dataset = None if eval_dataset is None else self._tokenized(eval_dataset)
        if args.eval_strategy != "no" and self.eval_dataset is None:
            raise FourscoreError(f"--eval_strategy {args.eval_strategy} needs an eval_dataset (or use 'no').")
        self.data_collator = data_collator
        vocabulary = model.config.get_text_config().vocab_size
        if reward_model is not None and reward_processing_class is None:
            reward_processing_class = tokenizer_of_text_model(reward_model, processing_class, vocabulary)
        reads_text = reward_model is not None and reward_processing_class is not None
        if reads_text:
            logger.info("the reward model reads text: its tokens are not the policy's")
        if not checked:
            reads_tokens = (model, None if reads_text else reward_model, value_model)
            self._check_lengths([m for m in reads_tokens if m is not None])
        args.resolve_batches(len(self.train_dataset), self.parallel.world_size)

        # Adapters and heads are drawn here: equal on every process, and the same for the same seed.
        (enable_full_determinism if args.full_determinism else set_seed)(args.seed)
        if overridden := overridden_settings(model):
            logger.warning(
                "the policy's generation config is not used for rollouts, which need plain sampling: %s", overridden
            )
        self.roles = prepare_roles(
            args, model, ref_model, reward_model, value_model, peft_config, self.parallel, reads_text
        )
        self.model = self.roles.policy
        self.ref_model = self.roles.ref_policy
        self.reward_model = self.roles.reward_model
        self.value_model = self.roles.value_model
        self.scorer = build_scorer(args, self.roles, reward_funcs, reward_processing_class, self.parallel)
        self._check_rewards()
        self.optimizers, self.schedules = optimization(self.roles.trained, args, optimizers)
        self.average = None if args.ema_decay is None else MovingAverage(self.model, args.ema_decay)
        folder = Path(args.output_dir) / directory.HANDED_OVER
        self.engine = build_engine(args, self.roles, self.parallel, self._hand_over, folder, self._longest_prompt)

        check_top_k(args, vocabulary)
        self.stop_ids = check_stop_token(args, processing_class, vocabulary)
        self.prompts = PromptOrder(len(self.train_dataset), args.seed if args.data_seed is None else args.data_seed)
        self.control = TrainerControl()
        self.progress = PPOProgress()
        handlers = [DefaultFlowCallback, *self._trackers(), *(callbacks or []), self.progress]
        self.callback_handler = CallbackHandler(
            handlers, self.model, processing_class, self._one(self.optimizers), self._one(self.schedules)
        )
        self.state = self._new_state()
        self._noted: dict[str, list[Any]] = {}  # by rewards, of the last batch's samples
        self.metrics_file = JsonLines(Path(args.output_dir) / "metrics.jsonl")
        self.samples_file = JsonLines(Path(args.output_dir) / "samples.jsonl")

    # ------------------------------------------------------------------ the loop

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train for `args.num_total_batches` updates.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last one in `args.output_dir`.

        Returns:
            the number of updates, the mean loss of the last one, and its metrics.

        Raises:
            FourscoreError: the output directory holds something else, or the checkpoint is not one of this run.
        """
        started = time.perf_counter()
        self._open_run(resume_from_checkpoint)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, TrainerControl())
        try:
            if self.args.center_scores and self.scorer.offset is None:
                self._center()
            if self.args.eval_on_start:
                self.evaluate()
            with pass_graphs.allowed(self._recorded_trunks(), gradients=self.args.cuda_graphs == "all"):
                metrics = self._updates(started)
        finally:
            self.progress.stop()
            self.engine.close()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        seconds = time.perf_counter() - started
        if self.parallel.is_main:
            done = {"updates": self.state.global_step, "episodes": self.state.episode, "train_seconds": seconds}
            path = Path(self.args.output_dir) / "summary.json"
            if metrics or not path.exists():  # a finished run that is resumed has nothing to add
                write_json_atomic(path, done | metrics)
        self.parallel.barrier()
        loss = metrics.get("loss/policy_avg", 0.0) + self.args.vf_coef * metrics.get("loss/value_avg", 0.0)
        return TrainOutput(self.state.global_step, loss, metrics | {"train_runtime": seconds})

    def _updates(self, started: float) -> dict[str, float]:
        """The loop; returns the metrics of the last update."""
        args, state, parallel = self.args, self.state, self.parallel
        metrics: dict[str, float] = {}
        earlier = state.episode  # what a resumed run had done before
        while state.global_step < state.max_steps and not self.control.should_training_stop:
            self.control = self.callback_handler.on_step_begin(args, state, self.control)
            clock = Clock()
            watch = self._profiled(state.episode - earlier)

            before = checkpoint.rng_state(), self.scorer.state()
            indices = self._next_indices()
            with self._resumable(before), watch("rollout"):
                experience = self._rollout(self._prompt_ids(self.train_dataset, indices))
            self._end_phase()
            clock.lap("time/rollout_s")
            with self._resumable(before), watch("scoring"):
                rewards = self._score(experience, indices)
            self._end_phase()
            clock.lap("time/scoring_s")
            value_only = state.global_step < args.value_warmup_updates
            fill_in_rewards(experience, args, state.kl_coef, parallel.sum)
            with self._resumable(before), watch("update"):
                metrics = self._update(experience, value_only)
            self._end_phase()
            clock.lap("time/update_s")

            state.global_step += 1
            state.episode += args.batch_size
            state.epoch = state.episode / (args.num_generations * len(self.train_dataset))
            metrics = objective_metrics(experience, state.kl_coef, parallel) | rewards | metrics | clock.laps
            metrics |= value_metrics(experience, args.gamma, parallel) | self._mismatch(experience)
            if args.kl_target is not None and not value_only:
                kl, size = metrics["objective/kl"], args.batch_size
                state.kl_coef = adapted_kl_coef(state.kl_coef, kl, args.kl_target, size, args.kl_horizon)
            metrics |= {"memory/peak_gib": parallel.max(peak_gib(parallel.device))}
            metrics |= {"eps": (state.episode - earlier) / (time.perf_counter() - started), "episode": state.episode}
            with self._resumable():
                self._record(experience, metrics)
        return metrics

    def _end_phase(self) -> None:
        """What a phase has freed is of little use to the next one, whose tensors have other sizes."""
        if self._keeps_memory:
            give_back()

    def _recorded_trunks(self) -> list[Any]:
        """Backbones whose passes may be CUDA graphs; none where two share layers of a pass, which a replay omits."""
        roles = self.roles
        if self.args.cuda_graphs == "none" or self.parallel.sharded or roles.replays_policy or roles.replays_value:
            return []
        models = (roles.policy, roles.ref_policy, roles.reward_model, roles.value_model)
        return [without_peft(model).base_model for model in models if model is not None]

    def _profiled(self, drawn: int) -> Callable[[str], AbstractContextManager]:
        """Makes the context of each phase of an update, before which so many samples were drawn by this process's run.

        With `--profile` it watches the second update, as the first one pays for what is set up once; or the only one.
        """
        args, state = self.args, self.state
        second = drawn == args.batch_size
        only = drawn == 0 and state.global_step + 1 >= state.max_steps
        if not (args.profile and self.parallel.is_main and (second or only)):
            return lambda phase: nullcontext()
        return Profile(Path(args.output_dir) / "profile", self.parallel.device).phase

    @torch.no_grad()
    def _rollout(
        self, prompts: list[list[int]], temperature: float | None = None, *, keep_support: bool = True
    ) -> Experience:
        args = self.args
        temperature = args.temperature if temperature is None else temperature
        sampling = Sampling.of(args, self.processing_class, self.stop_ids, temperature)
        return self.engine.generate(prompts, sampling, keep_support=keep_support)

    @torch.no_grad()
    def _score(self, experience: Experience, indices: list[int] | None = None) -> dict[str, float]:
        """Fill in what the roles and the rewards say of samples.

        Args:
            experience: the samples.
            indices: their rows of the training set, of which functions are given the columns; None: without any.

        Returns:
            metrics of the rewards.
        """
        args, size = self.args, self.args.local_rollout_forward_batch_size
        values = not makes_values(self.roles, args)
        model_scores = fill_in(self.roles, experience, args.temperature, size, values=values)
        rated = self._rated(experience, self.train_dataset, indices, model_scores)
        experience.scores, metrics = self.scorer.shape(rated, experience)
        experience.token_rewards = rated.token_rewards
        self._noted = rated.columns
        return rated.metrics | metrics

    def _rated(
        self,
        experience: Experience,
        dataset: Dataset,
        indices: list[int] | None,
        model_scores: torch.Tensor | None = None,
    ) -> Rated:
        """What the rewards say of samples of these rows, unshaped."""

        def rows() -> dict[str, list[Any]]:
            names = [name for name in dataset.column_names if name != "input_ids"]
            return dict(dataset.select_columns(names)[indices]) if names and indices is not None else {}

        return self.scorer.rate(Samples(experience, self.processing_class, rows, model_scores), self.state)

    def _update(self, experience: Experience, value_only: bool) -> dict[str, float]:
        args = self.args
        # A seed of its own for every update, so that a resumed run shuffles as the uninterrupted one did.
        generator = torch.Generator().manual_seed(args.seed + 1_000_003 * self.state.global_step + self.parallel.rank)
        metrics = update(
            self.roles.policy,
            self.roles.value_model,
            experience,
            UpdateSettings.of(args, kl_coef=self.state.kl_coef, value_only=value_only),
            self.optimizers,
            self.parallel,
            generator,
            self.roles.autocast,
            self._check_ratio,
            Targets.of(args, value_only=value_only),
        )
        if not value_only:
            self.engine.weights_changed()
        if self.average is not None:
            self.average.update()
        metrics |= step_schedules(self.schedules, value_only)
        every = args.torch_empty_cache_steps
        if every and self.state.global_step % every == 0 and self.parallel.device.type == "cuda":
            torch.cuda.empty_cache()
        return metrics

    def _check_ratio(self, mean: float, largest: float) -> None:
        """Warn, or with `--stop_on_ratio` stop, where the first ratios of an update are not 1."""
        bound = ratio_bound(self.roles, bool(self.args.tf32))
        finding = ratio_finding(mean, largest, bound, self.state.global_step + 1)
        if finding is not None and self.args.stop_on_ratio:
            raise RatioError(f"--stop_on_ratio: {finding}")
        if finding is not None and self.parallel.is_main:
            logger.warning("%s", finding)

    def _mismatch(self, experience: Experience) -> dict[str, float]:
        """How far the engine's logprobs are off, with a warning where that is more than rounding explains."""
        metrics = mismatch_metrics(experience, self.parallel)
        mean = metrics.get("rollout/logprob_mismatch_mean", 0.0)
        if mean > MISMATCH and self.parallel.is_main:
            logger.warning(
                "update %d: %s and the policy differ by %.2g nats a token in the mean: the server has another model or "
                "dtype",
                self.state.global_step,
                self.args.vllm_server_url or "the vLLM server",
                mean,
            )
        return metrics

    @torch.no_grad()
    def _center(self) -> None:
        """Take the mean score of samples of the policy, which is the SFT policy still, for the zero of all scores.

        Source: Huang et al. 2024 (arXiv 2403.17031), the detail on reward normalization.
        """
        args, parallel = self.args, self.parallel
        # As in evaluation, all processes work through the same number of batches, and what fills up is dropped.
        share = -(-args.center_scores // parallel.world_size)
        order = PromptOrder(len(self.train_dataset), args.seed + 7).batch(0, share * parallel.world_size)
        mine = order[parallel.rank * share : (parallel.rank + 1) * share]
        totals: list[float] = []
        with torch.random.fork_rng([parallel.device] if parallel.device.type == "cuda" else []):
            torch.manual_seed(args.seed + 100_003 * parallel.rank + 7)
            for start in range(0, share, args.local_rollout_forward_batch_size):
                indices = mine[start : start + args.local_rollout_forward_batch_size]
                e = self._rollout(self._prompt_ids(self.train_dataset, indices), keep_support=False)
                rated = self._rated(e, self.train_dataset, indices)
                totals += [s if a else math.nan for s, a in zip(rated.scores.tolist(), rated.whole, strict=True)]
        known = [s for s in parallel.gather(totals)[: args.center_scores] if not math.isnan(s)]
        self.scorer.offset = sum(known) / len(known) if known else 0.0
        logger.info(
            "--center_scores: %d samples of the SFT policy score %.4g in the mean", len(known), self.scorer.offset
        )

    # ------------------------------------------------------------------ evaluation and samples

    def evaluate(self) -> dict[str, float]:
        """Complete every prompt of the eval dataset once, at the training temperature and with a fixed seed.

        Returns:
            means over samples: `eval/scores`, `eval/kl` (nats a completion, k1), `eval/completion_length` (tokens),
            `eval/ended` (share that stopped by itself); logged, and in `metrics.jsonl` part of the update's object.
        """
        rows = self.complete_eval_prompts(self.args.temperature, with_kl=True)
        metrics = {
            f"eval/{name}": sum(row[name] for row in rows) / len(rows)
            for name in ("scores", "kl", "completion_length", "ended")
        }
        self._log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def generate_completions(self, sampling: bool = False) -> list[dict[str, Any]]:
        """Complete the eval prompts greedily, print a few beside their scores and append all to `samples.jsonl`.

        Args:
            sampling: only the first batch of `per_device_eval_batch_size`, as is done during training.

        Returns:
            a row a prompt: `prompt`, `completion`, `score`; empty without an eval dataset.
        """
        if self.eval_dataset is None:
            if not sampling:
                logger.warning("generate_completions: there is nothing to complete without an eval_dataset")
            return []
        limit = self.args.per_device_eval_batch_size * self.parallel.world_size if sampling else None
        rows = self.complete_eval_prompts(0.0, limit=limit)
        table = [{"prompt": r["prompt"], "completion": r["completion"], "score": r["scores"]} for r in rows]
        self._keep_samples("eval", table)
        if self.parallel.is_main:
            print_samples(table[:SAMPLES_SHOWN], f"greedy completions after {self.state.global_step} updates")
        return table

    @torch.no_grad()
    def complete_eval_prompts(
        self, temperature: float, *, limit: int | None = None, with_kl: bool = False
    ) -> list[dict[str, Any]]:
        """Complete the eval prompts once, with a fixed seed, and say what is known of each sample.

        Args:
            temperature: of the sampling; 0 is greedy.
            limit: only so many prompts, from the first on.
            with_kl: also compute the divergence from the reference.

        Returns:
            a row a prompt, in order and on every process: `prompt`, `completion` (text), `completion_ids`, `scores`
            (the weighted sum of all rewards, unshaped), `completion_length` (tokens), `ended` (1 if it stopped by
            itself), and `kl` (nats a completion, k1).

        Raises:
            FourscoreError: there is no eval dataset.
        """
        if self.eval_dataset is None:
            raise FourscoreError("there is nothing to evaluate on: pass eval_dataset.")
        args, parallel = self.args, self.parallel
        total = min(limit or len(self.eval_dataset), len(self.eval_dataset))
        # Every process works through the same number of batches; what was repeated to fill up is dropped below.
        share = -(-total // parallel.world_size)
        mine = [i % total for i in range(parallel.rank * share, (parallel.rank + 1) * share)]
        rows: list[dict[str, Any]] = []
        with torch.random.fork_rng([parallel.device] if parallel.device.type == "cuda" else []):
            torch.manual_seed(args.seed + parallel.rank)
            for start in range(0, share, args.per_device_eval_batch_size):
                indices = mine[start : start + args.per_device_eval_batch_size]
                e = self._rollout(self._prompt_ids(self.eval_dataset, indices), temperature, keep_support=with_kl)
                rated = self._rated(e, self.eval_dataset, indices)
                columns = {
                    "index": indices,
                    "scores": rated.totals.tolist(),
                    "completion_ids": e.completions(),
                    "completion_length": e.completion_lens.tolist(),
                    "ended": e.has_eos.float().tolist(),
                }
                if with_kl:
                    size = args.local_rollout_forward_batch_size
                    columns["kl"] = kl_of_samples(self.roles, e, args.temperature, size).tolist()
                texts = [{"prompt": prompt, "completion": completion} for prompt, completion in self._texts(e)]
                facts = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
                rows += [text | fact for text, fact in zip(texts, facts, strict=True)]
        unique = {row.pop("index"): row for row in parallel.gather(rows)}
        return [unique[i] for i in range(total)]

    def _texts(self, experience: Experience) -> list[tuple[str, str]]:
        decode = self.processing_class.batch_decode
        prompts = decode(experience.prompts(), skip_special_tokens=True)
        return list(zip(prompts, decode(experience.completions(), skip_special_tokens=True), strict=True))

    # ------------------------------------------------------------------ files

    def save_model(self, output_dir: str | None = None) -> None:
        """Write policy and tokenizer as `from_pretrained` reads them, and below them value model and moving average.

        Args:
            output_dir: a folder; `args.output_dir` if None. Under PEFT the adapters are written: one adapter of the
                base model, which holds that of the SFT checkpoint, too, where that was an adapter.

        Raises:
            FourscoreError: it could not be written.
        """
        folder = Path(output_dir or self.args.output_dir)
        with checkpoint.disk_errors_named(folder):
            self._checkpointed().save(folder, self._tokenizer_to_save(), self.parallel)
            if self.parallel.is_main:
                updates = [row for row in self.state.log_history if "objective/scores" in row]
                last = updates[-1] if updates else {}
                (folder / "README.md").write_text(model_card(self.args, self._card_info(), last), encoding="utf-8")
        self.parallel.barrier()

    def push_to_hub(self, commit_message: str = "PPO with fourscore", blocking: bool = True, **kwargs: Any) -> Any:
        """Upload what `save_model` wrote to `args.hub_model_id` (by default the output directory's name).

        Args:
            commit_message: of the upload.
            blocking: wait until it is done.
            **kwargs: `dataset_name` is accepted, as in TRL; anything else is refused.

        Returns:
            the commit, or a future of it; None on other processes than the main one.
        """
        kwargs.pop("dataset_name", None)
        if kwargs:
            raise TypeError(f"push_to_hub does not take {sorted(kwargs)}")
        self.save_model()
        return upload(self.args, commit_message, blocking) if self.parallel.is_main else None

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a transformers callback."""
        self.callback_handler.add_callback(callback)

    def _open_run(self, resume: str | bool | None) -> None:
        """Check the output directory, take up a checkpoint if asked to, and write what is known at the start."""
        args, folder = self.args, Path(self.args.output_dir)
        if self.parallel.is_main:
            directory.check(folder, resume)
        self.parallel.barrier()
        found = (directory.last_checkpoint(folder) if resume is True else Path(resume)) if resume else None
        self.state = self._new_state()
        torch.manual_seed(args.seed + 100_003 * self.parallel.rank)
        if found is not None:
            if not self._checked and (changed := directory.check_settings(found, *self.run_config)):
                logger.warning("%s", changed)
            self._load_checkpoint(found)
        elif resume:
            logger.warning("%s holds no whole checkpoint yet: starting from the beginning", folder)
        if self.parallel.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            self.metrics_file.truncate_after(self.state.global_step)
            self.samples_file.truncate_after(self.state.global_step)
            directory.write_config(folder / "config.yaml", *self.run_config)

    def _save_checkpoint(self, weights_only: bool | None = None) -> None:
        """Write a checkpoint of the updates done so far.

        Args:
            weights_only: leave out what only resuming needs; None: as `args.save_only_model` says.
        """
        args, state = self.args, self.state
        state.scorer = self.scorer.state()
        state.stateful_callbacks = {type(cb).__name__: cb.state() for cb in self._stateful()}
        checkpoint.save(
            Path(args.output_dir) / f"checkpoint-{state.global_step}",
            self._checkpointed(),
            state,
            self._tokenizer_to_save(),
            self.parallel,
            weights_only=args.save_only_model if weights_only is None else weights_only,
        )
        if self.parallel.is_main:
            checkpoint.prune(Path(args.output_dir), args.save_total_limit)
        self.control = self.callback_handler.on_save(args, state, self.control)

    @contextmanager
    def _resumable(self, before: tuple[dict[str, Any], dict[str, Any]] | None = None) -> Iterator[None]:
        """What stops the run in this context leaves a checkpoint of the last complete update, whatever flags say.

        Args:
            before: the states of random generators and scorer after that update; None: those of now.

        Raises:
            StoppedRun: the same, with the way to go on.
        """
        try:
            yield
        except StoppedRun as error:
            done = self.state.global_step
            if done == 0:
                raise type(error)(f"{error}; no update was done yet") from error
            folder = Path(self.args.output_dir) / f"checkpoint-{done}"
            if before is not None:
                rng, scorer = before
                checkpoint.set_rng_state(rng)
                self.scorer.load(scorer)
            self._save_checkpoint(weights_only=False)
            raise type(error)(
                f"{error}; the {done} updates before are in {folder}: mend it and go on with "
                "--resume_from_checkpoint true"
            ) from error

    def _load_checkpoint(self, folder: Path) -> None:
        saved = checkpoint.load(folder, self._checkpointed(), self.parallel)
        self.engine.weights_changed()
        fresh = self._new_state()
        # How long the run is and when it logs is for this run's flags to say; the rest goes on.
        for name in ("episode", "global_step", "epoch", "log_history", "best_metric", "best_global_step"):
            setattr(fresh, name, saved[name])
        if self.args.kl_target is not None:
            fresh.kl_coef = saved.get("kl_coef", fresh.kl_coef)
        self.scorer.load(saved.get("scorer", {}))
        self.state = fresh
        for callback in self._stateful():
            attributes = saved["stateful_callbacks"].get(type(callback).__name__, {}).get("attributes", {})
            for name, value in attributes.items():
                setattr(callback, name, value)
        logger.info("resumed from %s: %d updates are done", folder, self.state.global_step)

    def _hand_over(self, folder: Path) -> Path:
        """Write the policy for a rollout engine, under PEFT as one adapter of the base; returns where that is."""
        with checkpoint.disk_errors_named(folder):
            checkpoint.save_weights(self.model, folder, self.parallel)
        return adapter_folder(self.model, folder) if isinstance(self.model, PeftModel) else folder

    def _checkpointed(self) -> checkpoint.Training:
        return checkpoint.Training(self.roles.trained, self.optimizers, self.schedules, self.average)

    def _tokenizer_to_save(self) -> Any:
        return saved_tokenizer(self.processing_class, self.model.get_input_embeddings().weight.shape[0])

    # ------------------------------------------------------------------ small things

    def _record(self, experience: Experience, metrics: dict[str, float]) -> None:
        """After an update: log, sample, evaluate and save where their time has come."""
        args, state = self.args, self.state
        self.control = self.callback_handler.on_step_end(args, state, self.control)
        if self.control.should_log:
            self._log(metrics)
        every = max(1, args.num_total_batches // args.num_sample_generations) if args.num_sample_generations > 0 else 0
        try:
            if every and (state.global_step - 1) % every == 0:
                self._sample_table(experience)
            if self.control.should_evaluate:
                metrics |= self.evaluate()
        finally:  # a reward may fail: the update is done all the same
            if self.parallel.is_main:
                self.metrics_file.append({"step": state.global_step} | metrics)
        if self.control.should_save:
            self._save_checkpoint()

    def _sample_table(self, experience: Experience) -> None:
        e = experience
        assert e.scores is not None
        by_token = 0 if e.token_rewards is None else sum_per_sample(e.token_rewards, e.completion_lens)
        scores = (e.scores + by_token).tolist()
        noted = [dict(zip(self._noted, values, strict=True)) for values in zip(*self._noted.values(), strict=True)]
        rows = [
            {"prompt": p, "completion": c, "score": s} | note
            for (p, c), s, note in zip(self._texts(experience), scores, noted or [{}] * len(scores), strict=True)
        ]
        self._keep_samples("train", rows[:SAMPLES_SHOWN])
        self.generate_completions(sampling=True)

    def _keep_samples(self, split: str, rows: list[dict[str, Any]]) -> None:
        if self.parallel.is_main:
            for row in rows:
                self.samples_file.append({"step": self.state.global_step, "split": split} | row)

    def _log(self, metrics: dict[str, float]) -> None:
        self.state.log_history.append(metrics | {"step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, dict(metrics))

    def _next_indices(self) -> list[int]:
        """Rows of the training set, this process's share of the update; those of one prompt lie side by side."""
        args = self.args
        drawn = self.prompts.batch(self.state.global_step, args.batch_size // args.num_generations)
        indices = [i for i in drawn for _ in range(args.num_generations)]
        start = self.parallel.rank * args.local_batch_size
        return indices[start : start + args.local_batch_size]

    def _prompt_ids(self, dataset: Dataset, indices: list[int]) -> list[list[int]]:
        return prompt_ids(dataset, indices, self.data_collator)

    def _tokenized(self, dataset: Dataset) -> Dataset:
        args = self.args
        return tokenize_prompts(
            dataset,
            self.processing_class,
            max_prompt_length=args.max_prompt_length,
            action=args.max_prompt_length_action,
            num_proc=args.dataset_num_proc,
        )

    def _check_rewards(self) -> None:
        for dataset in (self.train_dataset, self.eval_dataset):
            if dataset is not None:
                self.scorer.check(other_columns(dataset))

    def _trackers(self) -> list[TrainerCallback]:
        """The callbacks that `--report_to` names."""
        try:
            return [tracker() for tracker in get_reporting_integration_callbacks(self.args.report_to)]
        except (ValueError, RuntimeError, ImportError) as error:
            raise FourscoreError(f"--report_to {self.args.report_to}: {error}") from error

    def _longest_prompt(self) -> int:
        return max(longest_prompt(each) for each in (self.train_dataset, self.eval_dataset) if each is not None)

    def _check_lengths(self, models: list[Any]) -> None:
        """Hold the longest prompt and a full completion against the positions that each model has."""
        longest = self._longest_prompt()
        for model in models:
            names = (name for name, _ in model.named_parameters())
            warning = check_length(type(model).__name__, model.config, names, longest, self.args.response_length)
            if warning is not None:
                logger.warning(warning)

    def _new_state(self) -> PPOState:
        args = self.args
        samples_of_a_pass = args.num_generations * len(self.train_dataset)
        state = PPOState(
            is_local_process_zero=self.parallel.is_main,
            is_world_process_zero=self.parallel.is_main,
            max_steps=args.num_total_batches,
            num_train_epochs=-(-args.num_total_batches * args.batch_size // samples_of_a_pass),
            train_batch_size=args.per_device_train_batch_size,
            kl_coef=args.kl_coef,
        )
        state.compute_steps(args, state.max_steps)
        return state

    def _stateful(self) -> list[Any]:
        return [cb for cb in self.callback_handler.callbacks if isinstance(cb, ExportableState)]

    def _card_info(self) -> dict[str, Any]:
        return {
            "base_model": self.model.config._name_or_path,
            "adapter": isinstance(self.model, PeftModel),
            "peft": self._adapter_settings(),
            "value_head": self.roles.value_head is not None,
            "rewards": [_told(reward) for reward in self.scorer.rewards if reward.name != "reward_model"],
            "dataset": next((c.dataset_name for c in self.run_config if hasattr(c, "dataset_name")), None),
        }

    def _adapter_settings(self) -> dict[str, Any]:
        if not isinstance(self.model, PeftModel):
            return {}
        config = self.model.peft_config[trained_adapter(self.model)].to_dict()
        known = {"r": "lora_r", "lora_alpha": "lora_alpha", "use_dora": "use_dora", "use_rslora": "use_rslora"}
        settings = {shown: config[name] for name, shown in known.items() if config.get(name)}
        bits = {f"load_in_{n}bit": True for n in (4, 8) if getattr(self.model, f"is_loaded_in_{n}bit", False)}
        return settings | bits

    @staticmethod
    def _one(by_role: dict[str, Any]) -> Any:
        """The policy's, which stands for all where callbacks and logs know only one."""
        return by_role["policy"]


def _told(reward: Reward) -> str:
    """What the model card says of a reward: its name, but of a server, which is where it is, no more than that."""
    return "reward server" if isinstance(reward, Server) else reward.name
