"""A PPO script as for TRL 1.12: four models loaded by hand, its flags, its trainer. Only the imports differ.

    python examples/trl_style.py --dataset_name prompts/ --output_dir runs/mine \
        --model_name_or_path ./sft --sft_model_path ./sft --reward_model_path ./reward --missing_eos_penalty 1.0

Add `--use_peft`, or `--load_in_4bit --use_peft`. `fourscore.load_models` does the loading below in one line, reads each
checkpoint once instead of twice, and checks first; see docs/migrating-from-trl.md.
"""

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from fourscore import ModelConfig, PPOConfig, PPOTrainer, ScriptArguments, get_peft_config, get_quantization_config

HELD_OUT = 8


def main() -> None:
    """Parse, load, train, save."""
    parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_into_dataclasses()

    dtype = model_args.dtype if model_args.dtype in ("auto", None) else getattr(torch, model_args.dtype)
    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": dtype,
    }
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    classifier = AutoModelForSequenceClassification
    value_model = classifier.from_pretrained(training_args.reward_model_path, num_labels=1, **options)
    reward_model = classifier.from_pretrained(training_args.reward_model_path, num_labels=1, **options)
    policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path, **options)
    peft_config = get_peft_config(model_args)
    ref_policy = None
    if peft_config is None:
        ref_policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path, **options)

    def tokenize(dataset: Dataset) -> Dataset:
        return dataset.map(
            lambda rows: {"input_ids": tokenizer(rows["prompt"], padding=False)["input_ids"]},
            batched=True,
            remove_columns=dataset.column_names,
            num_proc=training_args.dataset_num_proc,
        )

    dataset = load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)
    with PartialState().local_main_process_first():
        train_dataset = tokenize(dataset.select(range(len(dataset) - HELD_OUT)))
        eval_dataset = tokenize(dataset.select(range(len(dataset) - HELD_OUT, len(dataset))))

    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.generate_completions()


if __name__ == "__main__":
    main()
