import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers.utils import logging as transformers_logging

from fourscore import __version__, cli, demo, flags
from fourscore.config import ModelConfig, PPOConfig, ScriptArguments
from fourscore.config_fields import FIELDS
from fourscore.errors import FourscoreError
from fourscore.runs.directory import write_config
from fourscore.runs.logs import set_up_logging

MODELS = ["--sft_model_path", "sft", "--reward_model_path", "reward", "--dataset_name", "prompts.jsonl"]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "ppo.yaml"
    path.write_text("response_length: 24\nkl_coef: 0.2\n")
    monkeypatch.setattr(demo, "RECIPE", path)
    return path


@pytest.fixture
def config(tmp_path):
    """Writes a configuration file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def failure(argv, capsys) -> str:
    """Run a command that must fail with one line on stderr, and return that line."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.strip()


# ---------------------------------------------------------------------------------------------------------- help


def test_help_needs_no_torch():
    code = (
        "import sys; from fourscore.cli import main; assert main(['ppo', '--help']) == 0;"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == cli.HELP_FILE.read_text()


def test_help_is_up_to_date_and_fits():
    text = cli.render_help()
    assert cli.HELP_FILE.read_text() == text, "run python -m fourscore.flag_docs"
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    columns = {
        line.index(line.split("  ", 2)[-1].strip()) for line in lines if line.startswith("  --") and "   " in line
    }
    assert columns == {40}
    for group in ("Models", "Data", "Rollout", "Rewards", "PPO", "Optimisation", "Run", "PEFT and quantization"):
        assert f"{group}:" in lines
    assert "--gamma X                             Discount factor (default: 1.0)." in text
    assert "Weight of the KL penalty in the reward (default: 0.05; vapo: 0.0)." in " ".join(text.split())
    assert "(eos, none; default: eos)" in " ".join(text.split())
    assert "--help-all" in text
    assert lines[-4:].count("examples:") == 1


def test_help_names_no_refused_flag():
    refused = [name for name, note in FIELDS.items() if note.status == "refused"]
    assert not [name for name in refused if f"--{name} " in cli.HELP_FILE.read_text()]


def test_help_all_lists_every_flag(capsys):
    assert cli.main(["ppo", "--help-all"]) == 0
    text = capsys.readouterr().out
    fields = [name for c in (PPOConfig, ScriptArguments, ModelConfig) for name in c.__dataclass_fields__]
    assert not [name for name in fields if f"  --{name}" not in text]
    assert max(map(len, text.splitlines())) <= 100


def test_top_level(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert cli.main(argv) == 0
        assert "fourscore COMMAND" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fourscore {__version__}\n"
    assert "'pop': did you mean ppo?" in failure(["pop"], capsys)
    assert "'train': there are ppo, plan, eval, demo; see fourscore --help" in failure(["train"], capsys)
    assert "the command comes first, as in fourscore ppo --use_peft" in failure(["--use_peft"], capsys)


# ------------------------------------------------------------------------------------------------ flags and files


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_step", "3"], "there is no flag --max_step: did you mean --max_steps?"),
        (["--learning-rat=1e-5"], "there is no flag --learning-rat: did you mean --learning-rate?"),
        (["--warmup_ratio", "0.1"], "there is no flag --warmup_ratio: did you mean --warmup_steps?"),
        (["--zzzzzzzz", "3"], "there is no flag --zzzzzzzz"),
        (["--torch-dtype=bfloat16"], "there is no flag --torch-dtype: here that is --dtype"),
        (["--fp61"], "there is no flag --fp61"),
        (["--resume_from_checkpoint="], "--resume_from_checkpoint: is empty; give a checkpoint or true, or leave"),
        (["prompts.jsonl"], "'prompts.jsonl' belongs to no flag"),
        (["--response_length", "long"], "error: --response_length: invalid int value: 'long'"),
        (["--kl_estimator", "k2"], "error: --kl_estimator: invalid choice: 'k2'"),
        (["--save_strategy", "epoch"], "invalid choice: 'epoch'"),
        (["--gamma", "2"], "--gamma 2.0: must be from 0 to 1"),
        (["--fp16", "true"], "--fp16 True: Loss scaling is not supported"),
        (["--torch_empty_cache_steps", "0"], "`torch_empty_cache_steps` must be an integer bigger than 0"),
        (["--load_in_4bit"], "--load_in_4bit: quantized weights cannot train, add --use_peft"),
    ],
)
def test_bad_flags(flags, message, capsys):
    assert message in failure(["ppo", *MODELS, *flags], capsys)


def test_flags_of_other_trainers_lead_to_flags_that_there_are():
    known = {word for action in flags._build_parser()._actions for word in action.option_strings}
    for word, here in flags.ELSEWHERE.items():
        assert f"--{word}" not in known
        assert (named := set(re.findall(r"--\w+", here))) and named <= known, here


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (MODELS[:4], "--dataset_name must be named too"),
        (
            MODELS[:2] + MODELS[4:],
            "--reward_model_path (or --reward_funcs, or --reward_url) must be named too: --sft_model_path is named",
        ),
        (MODELS[2:], "--sft_model_path must be named too: --reward_model_path is named"),
        (["--model_name_or_path", "base", *MODELS[4:]], "--model_name_or_path names the tokenizer only"),
    ],
)
def test_models_that_are_not_named(flags, message, capsys):
    assert message in failure(["ppo", *flags], capsys)


def test_shipped_recipe_is_the_default(recipe, capsys):
    _, args, _ = cli.parse_ppo(["--kl_coef", "0.3"])
    assert (args.response_length, args.kl_coef) == (24, 0.3)
    assert (args.sft_model_path, args.reward_model_path) == (str(demo.POLICY), str(demo.REWARD))
    assert capsys.readouterr().out == (
        "No models and no prompts named: using those that ship with fourscore (ppo.yaml).\n"
    )


def test_shipped_recipe_parses():
    script, args, _ = cli.parse_ppo(["--use_cpu"])
    assert set(yaml.safe_load(demo.RECIPE.read_text())) <= set(FIELDS)
    assert (script.dataset_name, args.max_steps) == (None, yaml.safe_load(demo.RECIPE.read_text())["max_steps"])


def test_shipped_recipe_is_only_for_the_shipped_models(recipe, config, capsys):
    for argv in (MODELS, ["--dataset_name", "mine.jsonl"], ["--config", config("gamma: 0.9")]):
        _, args, _ = cli.parse_ppo(argv)
        assert args.response_length == 53
    assert capsys.readouterr().out == ""


def test_config_file_and_flags(config):
    path = config(
        "sft_model_path: a\nreward_model_path: b\ndataset_name: c.jsonl\n"
        "learning_rate: 1e-5\ngamma: 1\nuse_peft: true\nlora_target_modules: [q_proj, v_proj]\n"
        "run_name: 12\nlr_scheduler_kwargs: {num_cycles: 2}\nstop_token: null\nmissing_eos_penalty: null\n"
    )
    script, args, model = cli.parse_ppo(["--config", path, "--sft_model_path", "mine", "--gamma", "0.5"])
    assert (script.dataset_name, args.sft_model_path, args.reward_model_path) == ("c.jsonl", "mine", "b")
    assert (args.learning_rate, args.gamma) == (1e-5, 0.5)  # YAML reads 1e-5 as text
    assert (model.use_peft, model.lora_target_modules) == (True, ["q_proj", "v_proj"])
    assert (args.run_name, args.lr_scheduler_kwargs) == ("12", {"num_cycles": 2})
    assert (args.stop_token, args.missing_eos_penalty) == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl_coeff: 0.1", "there is no flag kl_coeff: did you mean kl_coef?"),
        ("response_length: 5.5", "response_length: 5.5 is not a whole number"),
        ("gamma: high", "gamma: 'high' is not a number"),
        ("use_peft: maybe", "use_peft: 'maybe' is not true or false"),
        ("kl_estimator: k2", "kl_estimator: 'k2' is not one of k1, k3"),
        ("gamma: [1, 2]", "gamma takes one value, not a list"),
        ("gamma: {a: 1}", "gamma takes one value, not a mapping"),
        ("gamma:", "gamma has no value"),
        ("fp16: true", "--fp16 True"),
        ("batch_size: 12", "--batch_size 12: It is computed"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_config_files(text, message, config, capsys):
    assert message in failure(["ppo", "--config", config(text), *MODELS], capsys)


def test_config_file_that_is_missing(capsys):
    assert failure(["ppo", "--config", "none.yaml"], capsys) == "error: --config none.yaml: No such file or directory"
    assert "expected one argument" in failure(["ppo", "--config"], capsys)


def test_saved_configuration_reads_back_equal(tmp_path):
    argv = [
        *MODELS,
        "--stop_token",
        "none",
        "--eval_strategy",
        "steps",
        "--use_peft",
        "--lora_target_modules",
        "all-linear",
    ]
    configs = cli.parse_ppo([*argv, "--lr_scheduler_type", "cosine", "--no_gradient_checkpointing"])
    configs[1].resolve_batches(100, 1)
    path = tmp_path / "config.yaml"
    write_config(path, *configs)
    again = cli.parse_ppo(["--config", str(path)])
    again[1].resolve_batches(100, 1)
    for before, after in zip(configs, again, strict=True):
        fields = before.__dataclass_fields__
        assert {n: getattr(after, n) for n in fields} == {n: getattr(before, n) for n in fields}
    # Both names of a setting are in the file; a flag with either one still wins.
    for flag in ("--gradient_checkpointing", "--activation_checkpointing"):
        assert cli.parse_ppo(["--config", str(path), flag])[1].gradient_checkpointing is True


def test_saved_configuration_of_the_shipped_models_reads_back(recipe, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    write_config(path, *cli.parse_ppo([]))
    _, args, _ = cli.parse_ppo(["--config", str(path)])
    assert args.kl_coef == 0.2


@pytest.mark.parametrize(
    ("flag", "resume"), [(None, None), ("true", True), ("True", True), ("false", None), ("runs/a/checkpoint-3",) * 2]
)
def test_resume_flag(flag, resume):
    assert cli._resume(flag) == resume


@pytest.mark.parametrize(("flags", "ours", "theirs"), [([], logging.INFO, None), (["--log_level", "error"], 40, 40)])
def test_log_level(flags, ours, theirs):
    before = transformers_logging.get_verbosity()
    try:
        set_up_logging(cli.parse_ppo([*MODELS, "--use_cpu", *flags])[1])
        assert logging.getLogger("fourscore").level == ours
        assert transformers_logging.get_verbosity() == (before if theirs is None else theirs)
    finally:
        transformers_logging.set_verbosity(before)
        logging.getLogger("fourscore").setLevel(logging.NOTSET)


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def run(tmp_path, llama_policy, llama_reward) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the film {word} was"}) + "\n" for word in "abcdefgh"))
    return [
        *("ppo", "--sft_model_path", str(llama_policy), "--reward_model_path", str(llama_reward)),
        *("--dataset_name", str(prompts), "--output_dir", str(tmp_path / "run"), "--use_cpu"),
        *("--per_device_train_batch_size", "4", "--response_length", "5", "--max_steps", "2", "--save_steps", "1"),
    ]


def test_ppo_trains_saves_refuses_and_resumes(run, tmp_path, capsys):
    assert cli.main(run) == 0
    out = tmp_path / "run"
    written = {path.name for path in out.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "value_model", "checkpoint-2", "tokenizer.json"} <= written
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()] == [1, 2]
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["response_length"], settings["dataset_name"]) == (5, str(tmp_path / "prompts.jsonl"))
    capsys.readouterr()

    message = failure(run, capsys)
    assert "--resume_from_checkpoint true" in message
    assert str(out) in message

    again = [*run, "--max_steps", "3", "--resume_from_checkpoint", "true"]
    assert cli.main(again) == 0
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()] == [1, 2, 3]


def test_positions_that_run_out_are_said_once(run, caplog, capsys):
    assert cli.main([*run, "--max_steps", "1", "--response_length", "140"]) == 0
    said = [line for line in (*capsys.readouterr().err.splitlines(), *caplog.messages) if "was made for" in line]
    assert [line.split(", but ")[1].split()[0] for line in said] == ["--sft_model_path", "--reward_model_path"]


def test_ctrl_c_says_how_to_resume(run, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_train", interrupted)
    assert cli.main(run) == 130
    assert "before the first update" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    assert cli.main(run) == 130
    assert "nothing to resume from" in capsys.readouterr().err
    for update in (7, 9):
        (tmp_path / "run" / f"checkpoint-{update}").mkdir()
    for name in ("trainer_state.json", "optimizers.pt", "rng.pt"):
        (tmp_path / "run" / "checkpoint-7" / name).touch()
    assert cli.main(run) == 130
    err = capsys.readouterr().err
    assert f"--resume_from_checkpoint {tmp_path}/run/checkpoint-7" in err, "the last one lacks what resuming needs"


def test_missing_model_is_one_line(run, capsys):
    assert "nowhere" in failure([*run, "--sft_model_path", "./nowhere"], capsys)


def test_demo_hands_its_flags_on(monkeypatch, capsys):
    class Run:
        @staticmethod
        def main(argv):
            if "--bad" in argv:
                raise FourscoreError("bad\n  flag")
            print(argv)

    monkeypatch.setitem(sys.modules, "fourscore.demo.run", Run)
    assert cli.main(["demo", "--seeds", "1", "2"]) == 0
    assert capsys.readouterr().out == "['--seeds', '1', '2']\n"
    assert failure(["demo", "--bad"], capsys) == "error: bad flag"
