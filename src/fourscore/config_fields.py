"""What becomes of every `PPOConfig` field: the text of `--help`, of error messages and of `docs/config.md`.

Nothing here imports transformers, so that `fourscore.config` can take its help strings from here.
"""

from dataclasses import MISSING, Field, dataclass
from typing import Any, Literal

from fourscore.presets import preset_default

Status = Literal["honoured", "changed", "refused"]


@dataclass(frozen=True)
class FieldNote:
    """One field of `PPOConfig`.

    Attributes:
        status: `honoured` (does what TRL and transformers say it does), `changed` (accepted, but its default or its
            effect differs; `note` says how) or `refused` (any other value than the default raises `FourscoreError`).
        help: what the field is, short enough for `--help`.
        note: how it differs, or why it is refused and what to use instead. Empty when there is nothing to add.
    """

    status: Status
    help: str
    note: str = ""


def _honoured(help: str, note: str = "") -> FieldNote:
    return FieldNote("honoured", help, note)


def _changed(help: str, note: str) -> FieldNote:
    return FieldNote("changed", help, note)


def _refused(help: str, note: str) -> FieldNote:
    return FieldNote("refused", help, note)


GROUPS: dict[str, dict[str, FieldNote]] = {
    "Models": {
        "sft_model_path": _changed(
            "Policy and reference: a causal LM, hub name or folder.",
            "Default: the checkpoint that ships with fourscore (TRL: EleutherAI/pythia-160m).",
        ),
        "reward_model_path": _changed(
            "Reward and value model: a sequence classifier with one label, hub name or folder.",
            "Default: the checkpoint that ships with fourscore if sft_model_path is open, too, and there is no other "
            "reward (TRL: EleutherAI/pythia-160m). With another tokenizer than the policy's it is given text.",
        ),
        "model_adapter_name": _honoured("Name of the adapter to train, for a policy with several."),
        "ref_adapter_name": _honoured("Name of the adapter that is the reference, for a policy with several."),
        "value_training": _changed(
            "What trains of the value model under PEFT, beside its head.",
            "Not in TRL, which trains the whole value model.",
        ),
        "freeze_layers": _changed(
            "Layers from the bottom, and the embedding, that do not train; without PEFT only.",
            "Not in TRL. The policy holds them together with the reference, the value model with the reward model, and "
            "a tied lm_head stays frozen with its embedding.",
        ),
        "share_value_backbone": _changed(
            "Put the value head on the policy's backbone: one forward and backward for both.",
            "Not in TRL. The head starts at zero, nothing of the reward model is used for it, and value_model/ holds "
            "the head alone. Not under FSDP.",
        ),
        "value_model_path": _changed(
            "Where the value model starts, if not from the reward or SFT checkpoint.",
            "Not in TRL. A causal LM or a sequence classifier on the policy's tokenizer; a head that is not there "
            "starts at zero. Without it the value model starts from the reward checkpoint, or where that has another "
            "tokenizer or is not named, from the SFT checkpoint.",
        ),
    },
    "Rewards": {
        "reward_funcs": _changed(
            "Reward functions (package.module:name, path/file.py:name) or further reward checkpoints.",
            "Not in TRL's PPO; functions have the signature of its GRPO. See docs/rewards.md.",
        ),
        "reward_url": _changed("Reward servers; see docs/rewards.md for the protocol.", "Not in TRL."),
        "reward_weights": _changed(
            "A weight for each: reward model, reward_funcs, reward_url (default: 1 each).", "Not in TRL's PPO."
        ),
        "reward_timeout": _changed("Seconds that a reward server may take for an answer.", "Not in TRL."),
        "reward_retries": _changed("Times that a request to a reward server is repeated.", "Not in TRL."),
        "reward_concurrency": _changed("Requests to a reward server at a time, per process.", "Not in TRL."),
        "reward_batch_size": _changed("Samples in a request to a reward server.", "Not in TRL."),
        "missing_eos_penalty": _honoured("Taken off the score of a completion without its stop token."),
        "length_penalty": _changed("Taken off the score for each completion token.", "Not in TRL."),
        "overlong_buffer": _changed(
            "Last tokens of response_length over which overlong_penalty grows from nothing.", "Not in TRL."
        ),
        "overlong_penalty": _changed("Taken off the score of a completion of full length.", "Not in TRL."),
        "score_clip": _changed("Scores are held within plus and minus this.", "Not in TRL 1.12."),
        "normalize_scores": _changed("Divide scores by their running standard deviation.", "Not in TRL 1.12."),
        "center_scores": _changed(
            "Samples of the SFT policy whose mean score is taken off all scores; 0: none.", "Not in TRL 1.12."
        ),
    },
    "Rollout": {
        "rollout_engine": _changed(
            "What draws completions: the policy in this process, or a vLLM server.",
            "Not in TRL's PPO. See docs/rollout.md.",
        ),
        "vllm_server_url": _changed(
            "The vLLM server, given weights or adapter before each rollout (default: one that the run starts).",
            "Not in TRL's PPO. See docs/rollout.md for the command that starts one.",
        ),
        "vllm_python": _changed(
            "A Python that has vLLM, to start a server with (default: the one that runs this).", "Not in TRL's PPO."
        ),
        "vllm_gpu_memory_utilization": _changed(
            "Share of the GPU for a vLLM server that the run starts; of no matter for others, and on a CPU.",
            "Not in TRL's PPO; as in its GRPO.",
        ),
        "vllm_timeout": _changed("Seconds that the vLLM server may take for an answer.", "Not in TRL's PPO."),
        "vllm_retries": _changed(
            "Times that a request to the vLLM server is repeated; 8 wait 2 minutes for one that starts again.",
            "Not in TRL's PPO. A server that the run starts is started again instead.",
        ),
        "response_length": _honoured("Most tokens in a completion."),
        "min_response_length": _changed(
            "Least tokens in a completion.", "Not in TRL. The stop token counts. See docs/rollout.md."
        ),
        "num_generations": _changed(
            "Completions of each prompt in an update.",
            "Not in TRL's PPO. Batch sizes and episodes count samples: an update takes batch_size / num_generations "
            "prompts, and an epoch has num_generations samples of each prompt.",
        ),
        "temperature": _honoured("Sampling temperature."),
        "top_k": _changed(
            "Draw from the k likeliest tokens; 0: from all.",
            "Not in TRL's PPO. Logprobs, old, new and reference ones, are of the distribution that was drawn from: see "
            "docs/rollout.md.",
        ),
        "top_p": _changed(
            "Draw from the likeliest tokens that together have this probability.", "Not in TRL's PPO. As for top_k."
        ),
        "stop_token": _changed(
            "What ends a completion: the EOS token, or nothing but its length.",
            "Default: eos (TRL: no stop token, so that every completion has response_length tokens).",
        ),
        "stop_token_id": _changed(
            "Token ids that end a completion.",
            "One or several. Takes the place of stop_token (TRL refuses the two together).",
        ),
        "stop_strings": _changed(
            "Texts that end a completion.",
            "Not in TRL's PPO. They end it beside the stop token, and the token that completes one is kept.",
        ),
        "max_prompt_length": _changed("Most tokens in a prompt.", "Not in TRL."),
        "max_prompt_length_action": _changed(
            "What is done with longer prompts; truncate keeps the end.", "Not in TRL, which uses prompts of any length."
        ),
        "local_rollout_forward_batch_size": _honoured(
            "Samples of the greatest length generated or scored at a time, per process."
        ),
        "pack_rollout_weights": _changed(
            "On a CPU in fp32, copy weights for a rollout where that makes it faster: adapters folded in, or packed.",
            "Not in TRL. Faster rollouts (docs/rollout.md); the plan says what the copy takes. No effect on a GPU.",
        ),
        "cuda_graphs": _changed(
            "On a GPU, make CUDA graphs of decoding steps and small passes of scoring; with all of small updates, too.",
            "Not in TRL. Faster where a GPU waits for this process (docs/rollout.md); what they compute with, the KV "
            "cache among it, is held through the run. all is for adapters, and has not been measured. No effect on a "
            "CPU, nor under FSDP.",
        ),
        "keep_freed_memory": _changed(
            "On a CPU, use memory again that a forward or backward pass has freed, and give it back after each phase.",
            "Not in TRL. Default: true where the plan has room for what then lies idle. Faster updates "
            "(docs/benchmarks.md); with false the system gets memory back at once. No effect on a GPU, nor on models "
            "below 128 MiB.",
        ),
        "dataset_num_proc": _honoured("Processes that tokenize the prompts."),
    },
    "PPO": {
        "preset": _changed(
            "Recipe that fills in what is not given.",
            "Not in TRL. n_plus is Huang et al. 2024 with TRL's numbers, vapo Yue et al. 2025; fields whose default "
            "names presets take theirs.",
        ),
        "num_ppo_epochs": _honoured("Passes over each rollout batch."),
        "num_mini_batches": _changed(
            "Optimizer steps in each of those passes.",
            "The batch is really split into this many optimizer steps; TRL steps once per "
            "gradient_accumulation_steps microbatches whatever is set here.",
        ),
        "kl_coef": _honoured("Weight of the KL penalty in the reward."),
        "kl_estimator": _honoured(
            "KL estimator; both are unbiased, k3 varies less.",
            "As estimates; in the reward k1 alone has the divergence's gradient, see docs/algorithm.md.",
        ),
        "use_kl_loss": _changed(
            "The KL term goes into the policy loss instead of the reward.",
            "Not in TRL's PPO. Both estimators have the divergence's gradient there.",
        ),
        "kl_target": _changed(
            "Nats a completion that kl_coef is adapted to (default: kl_coef is fixed).", "Not in TRL 1.12."
        ),
        "kl_horizon": _changed("Episodes over which kl_coef adapts.", "Not in TRL 1.12."),
        "early_stop_kl": _changed(
            "Nats a token from the rollout's policy at which an update's PPO epochs end.",
            "Not in TRL 1.12. The value model goes on to the end, unless it shares the policy's backbone.",
        ),
        "cliprange": _honoured("Clip range of the policy ratio."),
        "cliprange_high": _changed("Clip range of the policy ratio above 1.", "Not in TRL's PPO."),
        "dual_clip": _changed("Bound of the ratio where the advantage is negative, such as 3.", "Not in TRL."),
        "entropy_coef": _changed("Weight of the entropy bonus.", "Not in TRL's PPO."),
        "loss_aggregation": _changed(
            "Policy loss: mean over all tokens, or over samples of their means.", "Not in TRL's PPO."
        ),
        "positive_lm_coef": _changed("Weight of the language model loss on positive samples.", "Not in TRL."),
        "positive_lm_threshold": _changed(
            "A sample is positive if its score is above this.",
            "Not in TRL. The score as the reward takes it, penalties included.",
        ),
        "cliprange_value": _honoured("Clip range of the value prediction."),
        "vf_coef": _honoured("Weight of the value loss."),
        "value_warmup_updates": _changed(
            "First updates, in which the value model alone learns, from Monte-Carlo returns.",
            "Not in TRL. The policy, its schedule and an adaptive kl_coef stand still. Of a value model on the "
            "policy's backbone only the head learns then.",
        ),
        "gamma": _honoured("Discount factor."),
        "lam": _honoured("GAE lambda."),
        "lam_value": _changed("GAE lambda of the value model's targets.", "Not in TRL."),
        "lam_alpha": _changed(
            "Above 0 the policy's lambda is 1 - 1/(lam_alpha x length), for each completion.", "Not in TRL."
        ),
        "whiten_rewards": _honoured("Whiten rewards before GAE."),
        "whiten_advantages": _changed("Whiten advantages.", "Not in TRL, which always does."),
        "ema_decay": _changed(
            "Keep a moving average of the policy's weights, saved beside it (default: none).",
            "Not in TRL. It takes in the weights after every update; policy_ema/ holds it.",
        ),
        "stop_on_ratio": _changed(
            "Stop when the first ratios of an update are not 1; else that is a warning.",
            "Not in TRL. The updates before are saved.",
        ),
    },
    "Batch and length": {
        "per_device_train_batch_size": _changed(
            "Samples in a forward and backward pass.",
            "Passes are cut where that costs least and are never larger than so many samples of the greatest length: "
            "more of them fit where they are short.",
        ),
        "tokens_per_microbatch": _changed(
            "Most tokens in a forward and backward pass, padding included where there is any.",
            "Not in TRL. Default: per_device_train_batch_size times the longest sample of the minibatch; on a CPU "
            "fourscore ppo takes 1024 where that is less and its plan has room: fewer passes, more memory.",
        ),
        "gradient_accumulation_steps": _honoured("Such passes in a rollout batch."),
        "per_device_eval_batch_size": _honoured("Prompts generated and scored at a time in evaluation."),
        "total_episodes": _honoured("Samples to train on (default: num_train_epochs x prompts x num_generations)."),
        "num_train_epochs": _honoured("Passes over the prompts."),
        "max_steps": _changed(
            "Updates (rollout batches); above 0 it overrides total_episodes.",
            "Counts updates; without effect in TRL's PPO.",
        ),
        "world_size": _refused("Number of processes.", "It is computed: start the processes with accelerate launch."),
        "num_total_batches": _refused("Number of updates.", "It is computed: use --max_steps or --total_episodes."),
        "micro_batch_size": _refused(
            "per_device_train_batch_size over all processes.",
            "It is computed: use --per_device_train_batch_size.",
        ),
        "local_batch_size": _refused(
            "Samples of an update, per process.",
            "It is computed: use --per_device_train_batch_size and --gradient_accumulation_steps.",
        ),
        "batch_size": _refused(
            "Samples of an update, over all processes.",
            "It is computed: use --per_device_train_batch_size and --gradient_accumulation_steps.",
        ),
        "local_mini_batch_size": _refused(
            "Samples of an optimizer step, per process.", "It is computed: use --num_mini_batches."
        ),
        "mini_batch_size": _refused(
            "Samples of an optimizer step, over all processes.", "It is computed: use --num_mini_batches."
        ),
    },
    "Optimisation": {
        "learning_rate": _honoured("Peak learning rate of the policy."),
        "value_learning_rate": _changed("Peak learning rate of the value model.", "Not in TRL."),
        "value_lr_scheduler_type": _changed(
            "Learning rate schedule of the value model.",
            "Not in TRL. Takes lr_scheduler_kwargs, if it is of the type of lr_scheduler_type.",
        ),
        "value_warmup_steps": _changed("Warmup of the value model's learning rate.", "Not in TRL."),
        "value_max_grad_norm": _changed("Gradient clipping of the value model.", "Not in TRL."),
        "lr_scheduler_type": _changed(
            "Learning rate schedule; one step an update.",
            "reduce_lr_on_plateau and greedy are refused: PPO has no evaluation loss that they could follow.",
        ),
        "lr_scheduler_kwargs": _honoured("Arguments of the scheduler, as JSON."),
        "warmup_steps": _honoured("Updates of linear warmup; below 1 a share of all."),
        "optim": _changed(
            "Optimizer, by its name in transformers.",
            "Those that change the backward pass or need modes of their own (galore, apollo, lomo, schedule_free) are "
            "refused.",
        ),
        "optim_args": _honoured("Arguments of the optimizer, as key=value pairs."),
        "weight_decay": _honoured("Weight decay."),
        "adam_beta1": _honoured("Adam beta 1."),
        "adam_beta2": _honoured("Adam beta 2."),
        "adam_epsilon": _honoured("Adam epsilon."),
        "max_grad_norm": _changed(
            "Gradient clipping, of policy and value model each; 0: off.", "Without effect in TRL's PPO."
        ),
        "optim_target_modules": _refused(
            "Modules for GaLore or APOLLO.", "These optimizers are not supported: --use_peft saves optimizer memory."
        ),
        "label_smoothing_factor": _refused("Label smoothing.", "PPO has no labels: leave it out."),
        "neftune_noise_alpha": _refused(
            "NEFTune noise.", "It would make the policy differ from the one that was sampled: leave it out."
        ),
        "average_tokens_across_devices": _refused(
            "Mean over the tokens of all processes.",
            "It cannot be turned off: losses are means over the tokens of all processes.",
        ),
    },
    "Precision and memory": {
        "bf16": _changed(
            "bfloat16 autocast (default: on if the accelerator has it).",
            "Unset: on for an accelerator with bfloat16 or with accelerate launch --mixed_precision bf16, else off "
            "(TRL: always on, an error on a CPU). Frozen bfloat16 weights (dtype) turn it on, too. Slow on a CPU.",
        ),
        "fp16": _refused("float16 autocast.", "Loss scaling is not supported: use --bf16, or neither."),
        "bf16_full_eval": _refused("bfloat16 evaluation.", "Evaluation has the precision of training: use --bf16."),
        "fp16_full_eval": _refused("float16 evaluation.", "Evaluation has the precision of training: use --bf16."),
        "tf32": _honoured("TF32 matrix products on CUDA."),
        "gradient_checkpointing": _changed(
            "Recompute activations, to save memory (default: where the plan needs it on an accelerator).",
            "Unset means off, but where fourscore ppo's plan needs it on an accelerator (TRL: on, without effect).",
        ),
        "activation_checkpointing": _changed(
            "Newer name of gradient_checkpointing.",
            "Works with every supported transformers version.",
        ),
        "gradient_checkpointing_kwargs": _honoured("Arguments of gradient checkpointing, as JSON."),
        "activation_checkpointing_kwargs": _honoured("Newer name of gradient_checkpointing_kwargs."),
        "torch_empty_cache_steps": _honoured("Empty the CUDA cache every so many updates."),
        "auto_find_batch_size": _refused(
            "Lower the batch size on out-of-memory errors.",
            "It would change the update: lower --per_device_train_batch_size and raise --gradient_accumulation_steps.",
        ),
        "torch_compile": _refused(
            "torch.compile.", "Samples of many lengths would recompile at almost every step: leave it out."
        ),
        "torch_compile_backend": _refused("torch.compile backend.", "torch.compile is not supported: leave it out."),
        "torch_compile_mode": _refused("torch.compile mode.", "torch.compile is not supported: leave it out."),
        "use_liger_kernel": _refused(
            "Liger kernels.", "Their fused loss is cross-entropy, which PPO does not use: leave it out."
        ),
        "liger_kernel_config": _refused("Options of Liger kernels.", "They are not supported: leave it out."),
        "ignore_plan": _changed("Start though the plan of memory does not fit.", "Not in TRL."),
        "use_cache": _changed(
            "Key-value cache.", "Accepted, has no effect: generation always has a cache, training never."
        ),
    },
    "Logging, evaluation and saving": {
        "output_dir": _changed("Directory of the run.", "Default: runs/ppo (TRL: trainer_output)."),
        "resume_from_checkpoint": _changed(
            "Continue from a checkpoint folder, or, without one, from the run's last.",
            "fourscore ppo hands it to train(); TRL's PPO cannot resume.",
        ),
        "seed": _honoured("Seed of all randomness."),
        "data_seed": _honoured("Seed of the order of the prompts (default: seed)."),
        "full_determinism": _honoured("Deterministic kernels; slower."),
        "logging_strategy": _changed(
            "When to report.",
            "epoch is refused: use steps. Rules report_to and the console; metrics.jsonl has a line for every update.",
        ),
        "logging_steps": _changed(
            "Updates between reports.", "Default: 1. metrics.jsonl has a line for every update in any case."
        ),
        "profile": _changed(
            "Write a trace of one update and print its costliest operations, by phase.",
            "Not in TRL. Of the second update, or of the only one; traces are in the run's folder profile/.",
        ),
        "logging_first_step": _honoured("Report the first update too."),
        "report_to": _honoured("Tracker, such as trackio, wandb or tensorboard."),
        "run_name": _honoured("Name of the run in trackers."),
        "project": _honoured("Project of the run in trackers."),
        "trackio_space_id": _honoured("Space that trackio reports to."),
        "trackio_bucket_id": _honoured("Bucket that trackio reports to."),
        "trackio_static_space_id": _honoured("Static space that trackio publishes to."),
        "disable_tqdm": _honoured("No progress bar."),
        "log_level": _changed(
            "Log level of the main process.", "fourscore ppo sets it; a script of your own sets up logging itself."
        ),
        "log_level_replica": _changed(
            "Log level of the other processes.", "fourscore ppo sets it; a script of your own sets up logging itself."
        ),
        "log_on_each_node": _changed(
            "Whether the first process of every node takes log_level.",
            "fourscore ppo sets it; a script of your own sets up logging itself.",
        ),
        "logging_nan_inf_filter": _changed(
            "Filter NaN and infinity from logs.", "Accepted, has no effect: nothing is filtered."
        ),
        "include_num_input_tokens_seen": _changed(
            "Count input tokens.", "Accepted, has no effect: tokens/prompt and tokens/completion are always logged."
        ),
        "skip_memory_metrics": _changed(
            "No memory metrics.", "Accepted, has no effect: memory/peak_gib is always logged."
        ),
        "num_sample_generations": _honoured("Times in a run that samples are written down; 0: never."),
        "eval_strategy": _changed("When to evaluate.", "TRL's PPO never evaluates. epoch is refused: use steps."),
        "eval_steps": _changed("Updates between evaluations.", "Default: 10, not logging_steps."),
        "eval_delay": _honoured("Updates before the first evaluation."),
        "eval_on_start": _honoured("Evaluate before the first update."),
        "eval_accumulation_steps": _changed("Moves predictions to the CPU.", "Accepted, has no effect."),
        "eval_do_concat_batches": _changed("How predictions are collected.", "Accepted, has no effect."),
        "eval_use_gather_object": _changed("How predictions are collected.", "Accepted, has no effect."),
        "prediction_loss_only": _changed("Only the loss in evaluation.", "Accepted, has no effect."),
        "include_for_metrics": _refused(
            "Inputs of compute_metrics.", "There is no compute_metrics: evaluation reports scores and KL."
        ),
        "batch_eval_metrics": _refused(
            "compute_metrics per batch.", "There is no compute_metrics: evaluation reports scores and KL."
        ),
        "save_strategy": _changed("When to save checkpoints.", "epoch and best are refused: use steps."),
        "save_steps": _honoured("Updates between checkpoints; below 1 a share of all."),
        "save_total_limit": _honoured("Checkpoints to keep."),
        "save_only_model": _honoured("Checkpoints that cannot be resumed, but are smaller."),
        "save_on_each_node": _refused(
            "Every node saves.", "The first process alone writes: use an output directory that all nodes share."
        ),
        "enable_jit_checkpoint": _refused("Save on SIGTERM.", "It is not supported: use --save_steps."),
        "load_best_model_at_end": _refused(
            "Load the best checkpoint at the end.", "There is no best one to PPO: pick one from metrics.jsonl."
        ),
        "metric_for_best_model": _refused(
            "Metric of the best checkpoint.", "There is no best one to PPO: pick one from metrics.jsonl."
        ),
        "greater_is_better": _refused(
            "Direction of that metric.", "There is no best one to PPO: pick one from metrics.jsonl."
        ),
        "ignore_data_skip": _refused(
            "Start the data over when resuming.", "A resumed run goes on with the prompts that come next."
        ),
        "restore_callback_states_from_checkpoint": _changed(
            "Restore callbacks when resuming.", "Accepted, has no effect: they are always restored."
        ),
    },
    "Hub": {
        "push_to_hub": _honoured("Push the trained policy to the hub."),
        "hub_model_id": _honoured("Repository to push to (default: the name of output_dir)."),
        "hub_strategy": _changed("What to push and when.", "Accepted, has no effect: the finished run is pushed."),
        "hub_token": _honoured("Token to push with; never written to a run directory."),
        "hub_private_repo": _honoured("Make the repository private."),
        "hub_always_push": _changed(
            "Push while the last push is under way.", "Accepted, has no effect: the finished run is pushed."
        ),
        "hub_revision": _honoured("Branch to push to."),
    },
    "Distributed": {
        "use_cpu": _honoured("Train on the CPU in any case."),
        "fsdp": _changed(
            "Shard parameters with FSDP2.",
            "FSDP2 only: version 1 and offloading to the CPU are refused. Each transformer layer is a group.",
        ),
        "fsdp_config": _changed(
            "Options of FSDP2, as JSON or a file.",
            "Only version 2 without cpu_offload and activation_checkpointing (use gradient_checkpointing); other "
            "options have no effect.",
        ),
        "ddp_backend": _honoured("Backend of torch.distributed."),
        "ddp_timeout": _honoured("Timeout of torch.distributed, in seconds."),
        "ddp_find_unused_parameters": _changed(
            "Option of DDP.", "Accepted, has no effect: gradients are added up directly."
        ),
        "ddp_bucket_cap_mb": _changed("Option of DDP.", "Accepted, has no effect: gradients are added up directly."),
        "ddp_broadcast_buffers": _changed(
            "Option of DDP.", "Accepted, has no effect: gradients are added up directly."
        ),
        "ddp_static_graph": _changed("Option of DDP.", "Accepted, has no effect: gradients are added up directly."),
        "deepspeed": _refused("DeepSpeed configuration.", "DeepSpeed takes one trained model, PPO has two: use FSDP2."),
        "ds3_gather_for_generation": _changed(
            "Gather ZeRO-3 weights for generation.", "Accepted, has no effect: there is no DeepSpeed."
        ),
        "parallelism_config": _refused(
            "Tensor and context parallelism.", "It is not supported: use FSDP2 (accelerate launch --use_fsdp)."
        ),
        "accelerator_config": _refused(
            "Options of Accelerator.", "Batches are made without its data loaders: see --seed and --data_seed."
        ),
        "local_rank": _changed("Set by old launchers.", "Accepted, has no effect: launchers set LOCAL_RANK."),
    },
    "Other": {
        "train_sampling_strategy": _refused("Order of the samples.", "Prompts are always shuffled: see --data_seed."),
        "dataloader_drop_last": _changed("Drop the last, smaller batch.", "Accepted, has no effect: batches are full."),
        "dataloader_num_workers": _changed(
            "Processes that load data.", "Accepted, has no effect: prompts are tokenized before training."
        ),
        "dataloader_pin_memory": _changed("Pinned memory for batches.", "Accepted, has no effect."),
        "dataloader_persistent_workers": _changed("Keep the loading processes.", "Accepted, has no effect."),
        "dataloader_prefetch_factor": _changed("Batches to load ahead.", "Accepted, has no effect."),
        "dataloader_multiprocessing_context": _changed("How loading processes start.", "Accepted, has no effect."),
        "dataloader_in_order": _changed("Load batches in order.", "Accepted, has no effect: the order is fixed."),
        "remove_unused_columns": _changed(
            "Drop columns the model does not take.", "Accepted, has no effect: only the prompt is read."
        ),
        "label_names": _changed("Names of label columns.", "Accepted, has no effect: PPO has no labels."),
        "length_column_name": _changed("Column with lengths.", "Accepted, has no effect: lengths are counted."),
        "do_train": _changed("Train.", "Accepted, has no effect: train() trains."),
        "do_eval": _changed("Evaluate.", "Accepted, has no effect: see eval_strategy."),
        "do_predict": _changed("Predict.", "Accepted, has no effect."),
        "debug": _refused("Debugging hooks.", "They are not supported: see torch.autograd.set_detect_anomaly."),
    },
}
"""The fields in the order and under the headings of `docs/config.md`."""

FIELDS: dict[str, FieldNote] = {name: note for group in GROUPS.values() for name, note in group.items()}
"""Every field of `PPOConfig`, those inherited from `transformers.TrainingArguments` included."""

_SHOWN_DEFAULTS = {
    "sft_model_path": "shipped checkpoint",
    "reward_model_path": "shipped checkpoint",
    "output_dir": "runs/ppo",
    "bf16": "auto",
    "gradient_checkpointing": "auto",
    "activation_checkpointing": "auto",
}


def help_text(name: str) -> str:
    """The help string of a `PPOConfig` field, with `%` doubled as argparse wants it."""
    return FIELDS[name].help.replace("%", "%%")


def shown_default(name: str, default: Any) -> str | None:
    """A field's default as users read it: None where there is none to show.

    Args:
        name: field name.
        default: the default the dataclass has.
    """
    if name in _SHOWN_DEFAULTS:
        return _SHOWN_DEFAULTS[name]
    if (filled_in := preset_default(name)) is not None:
        return filled_in
    default = getattr(default, "value", default)
    if default is None or default == "" or default == []:
        return None
    return str(default).lower() if isinstance(default, bool) else str(default)


def field_default(field: Field) -> Any:
    """The default of a dataclass field, made by its factory where it has one."""
    return field.default if field.default_factory is MISSING else field.default_factory()
