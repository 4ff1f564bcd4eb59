import json
import sys

import pytest
import torch
from tiny import make_checkpoint, make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from fourscore import cli, load_models
from fourscore.config import ModelConfig, PPOConfig
from fourscore.errors import FourscoreError
from fourscore.models import kernels, loading
from fourscore.plan import estimate
from fourscore.plan.advice import advise
from fourscore.plan.estimate import PHASES, NoPlan, _recorded, make_plan, plan_of_run
from fourscore.plan.memory import Capacity
from fourscore.plan.report import as_json
from fourscore.ppo.optim import build_optimizer
from fourscore.rollout.sampling import Sampling
from fourscore.rollout.transformers import generate


@pytest.fixture(autouse=True)
def no_weights_are_read(monkeypatch, request):
    """A plan is made of headers; tests that load, too, say so."""
    if "loads" in request.keywords:
        return

    def refuse(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(loading.AutoModelForSequenceClassification, "from_pretrained", refuse)


def settings(policy, reward, *, model=None, **training):
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "response_length": 8} | training
    args = PPOConfig(sft_model_path=str(policy), reward_model_path=str(reward), use_cpu=True, **training)
    return args, ModelConfig(**(model or {}))


def room(size):
    return Capacity(size, None)


# --------------------------------------------------------------------------------------------------- weights, state


@pytest.mark.loads
@pytest.mark.parametrize(
    ("arch", "model", "training"),
    [
        ("llama", {}, {}),
        ("gpt2", {}, {}),
        ("llama", {"use_peft": True}, {}),
        ("gemma3_text", {"use_peft": True, "lora_target_modules": ["all-linear"]}, {}),
        ("llama", {"use_peft": True}, {"value_training": "full"}),
        ("llama", {"dtype": "bfloat16", "use_peft": True}, {}),
    ],
)
def test_weights_gradients_and_state_are_those_of_the_loaded_roles(arch, model, training, tmp_path):
    policy = make_checkpoint(arch, tmp_path / "policy")
    reward = make_checkpoint(arch, tmp_path / "reward", "reward", seed=1)
    args, model_args = settings(policy, reward, model=model, **training)
    plan = make_plan(args, model_args, prompt=8)
    models = load_models(model_args, args)
    roles = {
        "policy": models.policy,
        "ref_policy": models.ref_policy,
        "reward_model": models.reward_model,
        "value_model": models.value_model,
    }
    roles = {name: role for name, role in roles.items() if role is not None}
    assert list(plan.roles) == list(roles)
    seen: set[int] = set()
    for name, module in roles.items():
        planned, parameters = plan.roles[name], list(module.parameters())
        trained = [p for p in parameters if p.requires_grad]
        assert planned.parameters == sum(p.numel() for p in parameters)
        assert planned.trainable == sum(p.numel() for p in trained)
        assert planned.gradients == sum(p.numel() * p.element_size() for p in trained)
        new = {p.data_ptr(): p.numel() * p.element_size() for p in parameters if p.data_ptr() not in seen}
        assert planned.weights + planned.mapped == sum(new.values())
        seen |= set(new)
        if trained:
            optimizer = build_optimizer(module, args)
            for p in trained:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            state = [t for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t)]
            assert planned.optimizer == sum(t.numel() * t.element_size() for t in state if t.numel() > 1)


def test_frozen_weights_of_the_dtype_of_the_file_cost_nothing(llama_policy, llama_reward):
    args, model_args = settings(llama_policy, llama_reward)
    mapped = make_plan(args, model_args, prompt=8).roles
    converted = make_plan(args, ModelConfig(dtype="bfloat16"), prompt=8).roles
    assert mapped["ref_policy"].weights == mapped["reward_model"].weights == 0
    assert mapped["ref_policy"].mapped == 2 * converted["ref_policy"].weights > 0
    assert converted["ref_policy"].mapped == 0


@pytest.mark.parametrize("peft", [False, True])
def test_a_moving_average_is_a_copy_of_what_trains_in_the_policy(peft, llama_policy, llama_reward):
    plans = []
    for extra in ({}, {"ema_decay": 0.99}):
        args, model_args = settings(llama_policy, llama_reward, model={"use_peft": peft}, **extra)
        plans.append(make_plan(args, model_args, prompt=8))
    plain, averaged = plans
    added = plain.roles["policy"].gradients  # as many bytes: both are float32
    assert averaged.roles["policy"].optimizer == plain.roles["policy"].optimizer + added
    assert averaged.roles["value_model"] == plain.roles["value_model"]
    assert averaged.peak_bytes["update"] - averaged.baseline == plain.peak_bytes["update"] - plain.baseline + added


def test_terms_of_the_loss_are_traced(llama_policy, llama_reward):
    def update(**extra):
        args, model_args = settings(llama_policy, llama_reward, **extra)
        return make_plan(args, model_args, prompt=8).parts["update"]

    plain = update()
    everything = update(
        entropy_coef=0.1, use_kl_loss=True, positive_lm_coef=0.1, early_stop_kl=1e-9, dual_clip=3.0, stop_on_ratio=True
    )
    assert everything.keys() == plain.keys()
    assert all(everything[part] >= plain[part] for part in plain)
    assert everything["policy forward, backward"] > plain["policy forward, backward"]  # the entropy's gradient


def test_four_bits(llama_policy, llama_reward):
    peft = {"use_peft": True, "lora_target_modules": ["all-linear"]}
    args, model_args = settings(llama_policy, llama_reward, model=peft)
    plain = make_plan(args, model_args, prompt=8).roles["policy"]
    quantized = make_plan(args, ModelConfig(load_in_4bit=True, **peft), prompt=8).roles["policy"]
    assert (quantized.parameters, quantized.trainable) == (plain.parameters, plain.trainable)
    assert "nf4" in quantized.dtype
    assert quantized.weights < plain.weights + plain.mapped


# ------------------------------------------------------------------------------------------------------------- peaks


def test_what_grows_with_what(llama_policy, llama_reward):
    def peaks(**training):
        args, model_args = settings(llama_policy, llama_reward, **training)
        parts = make_plan(args, model_args, prompt=16).parts
        return {phase: max(sizes.values()) for phase, sizes in parts.items()}

    start = peaks(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    smaller = peaks(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert smaller["update"] < start["update"]
    assert smaller["rollout"] == start["rollout"]
    longer = peaks(per_device_train_batch_size=4, gradient_accumulation_steps=1, response_length=64)
    assert all(longer[phase] > start[phase] for phase in ("rollout", "scoring", "update"))
    split = peaks(per_device_train_batch_size=4, gradient_accumulation_steps=1, local_rollout_forward_batch_size=1)
    assert split["scoring"] < start["scoring"] and split["rollout"] < start["rollout"]
    assert split["update"] == start["update"]


def test_all_prompts_of_a_batch_are_read(llama_policy, llama_reward):
    def prefill(batch):
        args, model_args = settings(llama_policy, llama_reward, per_device_train_batch_size=batch)
        return make_plan(args, model_args, prompt=128).parts["rollout"]["prefill"]

    assert prefill(8) > 3.5 * prefill(2)


def test_the_copy_of_the_weights_is_in_the_rollout_and_can_be_done_without(llama_policy, llama_reward, monkeypatch):
    monkeypatch.setattr(kernels, "are_there", lambda: False)
    args, model_args = settings(llama_policy, llama_reward)
    plan = make_plan(args, model_args, prompt=8)
    policy = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama_policy))
    linear = {id(m): 4 * m.weight.numel() for m in policy.modules() if isinstance(m, torch.nn.Linear)}
    assert plan.packed == sum(linear.values()) == as_json(plan, [])["packed_bytes"]
    args.pack_rollout_weights = False
    without = make_plan(args, model_args, prompt=8)
    assert without.packed == 0
    assert plan.peak_bytes["rollout"] - plan.baseline == without.peak_bytes["rollout"] - without.baseline + plan.packed
    assert plan.parts == without.parts
    monkeypatch.setattr(kernels, "are_there", lambda: True)
    args.pack_rollout_weights = True
    assert make_plan(args, model_args, prompt=8).packed == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_memory_kept_for_the_next_pass_is_in_every_phase_and_can_be_done_without(
    llama_policy, llama_reward, monkeypatch
):
    args, model_args = settings(llama_policy, llama_reward)
    assert make_plan(args, model_args, prompt=8).idle == 0  # a small model: glibc is left alone
    monkeypatch.setattr("fourscore.runs.memory.HEAVY", 1)
    plan = make_plan(args, model_args, prompt=8)
    assert plan.idle == as_json(plan, [])["idle_bytes"]
    assert plan.idle > 2**20 + max(max(by_part.values()) for by_part in plan.parts.values()) / 2
    args.keep_freed_memory = False
    without = make_plan(args, model_args, prompt=8)
    assert without.idle == 0 and without.parts == plan.parts
    for phase in PHASES:
        kept = 0 if phase == "load" else plan.idle
        assert plan.peak_bytes[phase] - plan.baseline == without.peak_bytes[phase] - without.baseline + kept


def test_a_budget_of_tokens_is_what_a_microbatch_holds(llama_policy, llama_reward):
    def update(**training):
        args, model_args = settings(llama_policy, llama_reward, **training)
        return make_plan(args, model_args, prompt=16).parts["update"]

    whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert update(**whole, tokens_per_microbatch=10**6) == update(**whole)
    one_by_one = update(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert update(**whole, tokens_per_microbatch=1) == one_by_one != update(**whole)


@pytest.mark.parametrize(
    ("training", "bytes_a_token"),
    [
        ({"top_k": 5}, 4 * 5 + 9),
        ({"top_k": 40}, 4 * 10 + 9),  # a bit for each of 300 ids
        ({"top_p": 0.9}, 4 * 10 + 9),
        ({"min_response_length": 3, "stop_token_id": [1, 2]}, 4 * 2 + 9),
    ],
)
def test_what_tokens_are_drawn_from_is_counted(llama_policy, llama_reward, training, bytes_a_token):
    args, model_args = settings(llama_policy, llama_reward, **training)
    plan = make_plan(args, model_args, prompt=16)
    assert plan.support == 4 * 8 * bytes_a_token
    plain = make_plan(*settings(llama_policy, llama_reward), prompt=16)
    assert plain.support == 0
    for phase in ("scoring", "update"):
        assert max(plan.parts[phase].values()) > max(plain.parts[phase].values()), "masks and selected supports"
    assert as_json(plan, [])["support_bytes"] == plan.support

    torch.manual_seed(0)
    policy = make_model("llama", make_tokenizer())
    draw = Sampling(8, 1.0, (1, 2), None, 4, args.top_k, args.top_p, args.min_response_length)
    e = generate(policy, [[5, 6]] * 4, draw)
    assert e.support.nbytes <= plan.support


@pytest.mark.parametrize("model", [{}, {"use_peft": True}])
def test_layers_are_extrapolated_exactly(model, tmp_path, monkeypatch):
    policy = make_checkpoint("llama", tmp_path / "policy", num_hidden_layers=7)
    reward = make_checkpoint("llama", tmp_path / "reward", "reward", num_hidden_layers=7)
    args, model_args = settings(policy, reward, model=model, response_length=40)
    short = make_plan(args, model_args, prompt=16).parts
    monkeypatch.setattr("fourscore.plan.phases._DEPTHS", (6, 7))
    whole = make_plan(args, model_args, prompt=16).parts
    for phase in whole:
        assert max(short[phase].values()) == pytest.approx(max(whole[phase].values()), rel=0.002)


def test_a_server_takes_the_memory_of_rollouts(llama_policy, llama_reward):
    here = make_plan(*settings(llama_policy, llama_reward, response_length=64), prompt=32)
    url = {"rollout_engine": "vllm", "vllm_server_url": "http://127.0.0.1:8000"}
    elsewhere = make_plan(*settings(llama_policy, llama_reward, response_length=64, **url), prompt=32)
    assert here.kv_cache > 0 and elsewhere.kv_cache == 0
    taken = [plan.peak_bytes["rollout"] - plan.baseline for plan in (here, elsewhere)]
    assert taken[0] - taken[1] >= here.kv_cache
    assert any("vLLM server" in line for line in elsewhere.assumptions)
    assert elsewhere.parts["scoring"] == here.parts["scoring"]


def test_a_server_of_the_runs_own_leaves_less_room(llama_policy, llama_reward, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    monkeypatch.setattr(estimate, "capacity", lambda device: Capacity(2**33, None))
    plan = make_plan(*settings(llama_policy, llama_reward, rollout_engine="vllm"), prompt=32)
    assert plan.available == 2**33 - 3 * 2**30 - 2**31 - 4 * plan.roles["policy"].parameters
    assert "the vLLM server that the run starts takes 5.0 GiB beside it" in plan.assumptions
    assert Capacity(5, 7).less(3) == Capacity(5, 4) and Capacity(5, None).less(9) == Capacity(0, None)


def test_checkpointing_lowers_the_update(llama_policy, llama_reward):
    def update(**training):
        args, model_args = settings(
            llama_policy, llama_reward, response_length=64, per_device_train_batch_size=8, **training
        )
        return make_plan(args, model_args, prompt=32).parts["update"]["policy forward, backward"]

    assert update(gradient_checkpointing=True) < 0.8 * update()


def test_processes_share_weights_only_when_sharded(llama_policy, llama_reward):
    args, model_args = settings(llama_policy, llama_reward)
    one = make_plan(args, model_args, prompt=8, world_size=1)
    whole = make_plan(args, model_args, prompt=8, world_size=4)
    sharded = make_plan(args, model_args, prompt=8, world_size=4, sharding="fsdp")
    assert (whole.world_size, whole.sharding, sharded.sharding) == (4, "none", "fsdp")
    assert whole.peak_bytes["update"] - whole.baseline == one.peak_bytes["update"] - one.baseline
    assert sharded.peak_bytes["update"] - sharded.baseline < one.peak_bytes["update"] - one.baseline


def test_model_that_cannot_be_traced_is_named(llama_policy, llama_reward, monkeypatch):
    def broken(*args):
        raise RuntimeError("data dependent")

    monkeypatch.setattr(estimate, "trace_phases", broken)
    with pytest.raises(NoPlan, match=r"LlamaConfig.*data dependent"):
        make_plan(*settings(llama_policy, llama_reward), prompt=8)


# ------------------------------------------------------------------------------------------------------ fits, advice


def test_fits_and_advice_is_of_plans_made_again(llama_policy, llama_reward, monkeypatch):
    # The process itself is a hundred times larger than these models.
    monkeypatch.setattr(estimate, "anonymous_bytes", lambda: 0)
    monkeypatch.setattr(estimate, "RUNNING", 0)
    args, model_args = settings(llama_policy, llama_reward, response_length=64, per_device_train_batch_size=8)
    plan = make_plan(args, model_args, prompt=32)
    peak = max(plan.peak_bytes.values())
    assert plan.fits
    assert make_plan(args, model_args, prompt=32, room=room(2 * peak)).fits
    over = make_plan(args, model_args, prompt=32, room=room(int(0.8 * peak)))
    assert not over.fits
    advice = advise(over, args, model_args)
    assert any(a.fits for a in advice)
    for a in advice:
        assert a.peak_bytes < peak
        assert a.fits == (a.peak_bytes <= over.available)
    first = next(a for a in advice if a.flags.startswith("--per_device_train_batch_size 4"))
    args.per_device_train_batch_size, args.gradient_accumulation_steps = 4, 4
    again = max(make_plan(args, model_args, prompt=32).peak_bytes.values())
    assert first.peak_bytes == again


def test_json_has_what_machines_ask_for(llama_policy, llama_reward):
    args, model_args = settings(llama_policy, llama_reward)
    plan = json.loads(json.dumps(as_json(make_plan(args, model_args, prompt=8), [])))
    assert set(plan["roles"]) == {"policy", "ref_policy", "reward_model", "value_model"}
    assert list(plan["peak_bytes"]) == list(PHASES)
    assert all(isinstance(size, int) for size in plan["peak_bytes"].values())
    assert plan["shared"]["sft"]["roles"] == ["ref_policy"] and plan["fits"] is True


# ------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def flags(tmp_path, llama_policy, llama_reward):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "the film " * n + "was"}) + "\n" for n in range(1, 9)))
    return [
        *("--sft_model_path", str(llama_policy), "--reward_model_path", str(llama_reward)),
        *("--dataset_name", str(prompts), "--output_dir", str(tmp_path / "run"), "--use_cpu"),
        *("--per_device_train_batch_size", "4", "--response_length", "5", "--max_steps", "1"),
    ]


def test_plan_prints_nothing_but_json(flags, capsys):
    assert cli.main(["plan", "--json", "--world_size", "2", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["world_size"] == 2 and plan["sizes"]["response_tokens"] == 5
    assert plan["sizes"]["prompt_tokens"] > 8  # the longest of the file


def test_plan_for_people_is_narrow(flags, capsys):
    assert cli.main(["plan", *flags]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "value_model" in out and "scoring" in out and "within" in out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--world_size", "0"], "--world_size 0: must be at least 1"),
        (["--world_size", "two"], "--world_size: invalid int value"),
        (["--sharding", "zero"], "--sharding: invalid choice"),
        (["--max_step", "2"], "did you mean --max_steps?"),
    ],
)
def test_bad_flags_of_plan(extra, message, flags, capsys):
    assert cli.main(["plan", *flags, *extra]) == 2
    assert message in capsys.readouterr().err


def test_plan_help(capsys):
    assert cli.main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--world_size" in out and "fourscore ppo --help" in out and max(map(len, out.splitlines())) <= 120


@pytest.mark.loads
def test_ppo_stops_when_the_plan_does_not_fit(flags, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(estimate, "capacity", lambda device: room(10 * 2**20))
    loads = []
    monkeypatch.setattr(
        loading, "load_models", lambda *args, _load=loading.load_models: loads.append(1) or _load(*args)
    )
    assert cli.main(["ppo", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the peak is") and "DOES NOT FIT" in err and "--ignore_plan" in err
    assert not loads and not (tmp_path / "run").exists()
    assert cli.main(["ppo", *flags, "--ignore_plan"]) == 0
    assert loads and "--ignore_plan" in capsys.readouterr().err


@pytest.mark.loads
def test_ppo_goes_on_without_a_plan(flags, capsys, monkeypatch):
    def none(*args):
        raise RuntimeError("exotic")

    monkeypatch.setattr(estimate, "trace_phases", none)
    assert cli.main(["ppo", *flags]) == 0
    assert "warning: no plan for LlamaConfig" in capsys.readouterr().err
    assert cli.main(["plan", *flags]) == 2
    assert "no plan for LlamaConfig" in capsys.readouterr().err


def test_plan_of_what_cannot_be_trained_says_so(flags, tmp_path, capsys):
    assert cli.main(["plan", *flags, "--sft_model_path", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(FourscoreError, match="nowhere"):
        make_plan(*settings(tmp_path / "nowhere", tmp_path))


def test_activation_checkpointing_that_nobody_asked_for_is_there_where_it_is_needed(llama_policy, llama_reward):
    flags = {"gradient_checkpointing": True, "response_length": 64, "tokens_per_microbatch": 144}
    args, model_args = settings(llama_policy, llama_reward, **flags)
    peaks = {}
    for value in (True, False):
        args.gradient_checkpointing = args.activation_checkpointing = value
        plan = make_plan(args, model_args, prompt=8)
        peaks[value] = max(plan.peak_bytes.values()) - plan.baseline
    assert peaks[False] > peaks[True]

    def decided(room_for, asked_for):
        args.gradient_checkpointing = args.activation_checkpointing = asked_for
        args.checkpointing_open = not asked_for
        baseline = make_plan(args, model_args, prompt=8).baseline
        plan = plan_of_run(args, model_args, prompt=8, room=room(room_for + 2 * baseline))
        assert args.gradient_checkpointing == args.activation_checkpointing
        assert max(plan.peak_bytes.values()) - plan.baseline == peaks[args.gradient_checkpointing]
        return args.gradient_checkpointing

    enough = 2**33
    assert decided(enough, asked_for=True) is True
    assert decided(enough, asked_for=False) is False
    assert decided(-(2**33), asked_for=False) is True


def test_small_microbatches_are_filled_up_where_there_is_room_and_nobody_said_how_large(llama_policy, llama_reward):
    def decided(available, **flags):
        args, model_args = settings(llama_policy, llama_reward, **({"gradient_accumulation_steps": 64} | flags))
        plan = plan_of_run(args, model_args, prompt=24, room=room(available))
        return args.tokens_per_microbatch, plan.sizes.microbatch

    enough = 2**33
    assert decided(enough) == (1024, 32)  # samples of 24 + 8 tokens
    assert decided(enough, gradient_accumulation_steps=4) == (1024, 8)  # no more than there are
    assert decided(enough, per_device_train_batch_size=32) == (None, 32)
    assert decided(enough, tokens_per_microbatch=100) == (100, 3)
    assert decided(2**20) == (None, 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_memory_is_kept_where_there_is_room_or_where_it_is_asked_for(llama_policy, llama_reward, monkeypatch):
    monkeypatch.setattr("fourscore.runs.memory.HEAVY", 1)
    args, model_args = settings(llama_policy, llama_reward)

    def decided(available, asked_for=None):
        args.keep_freed_memory = asked_for
        plan = plan_of_run(args, model_args, prompt=8, room=room(available))
        assert bool(plan.idle) == args.keep_freed_memory
        return args.keep_freed_memory

    needed = max(make_plan(args, model_args, prompt=8).peak_bytes.values())
    assert decided(2 * needed) is True
    assert decided(needed) is False  # it fits, but not by much
    assert decided(needed, asked_for=True) is True
    assert decided(2 * needed, asked_for=False) is False


def test_cuda_graphs_keep_what_they_compute_with():
    tops = {"rollout": 7, "scoring": 3, "update": 9}
    kept = {flag: _recorded(PPOConfig(cuda_graphs=flag), 5, tops, 0.5) for flag in ("none", "forward", "all")}
    assert kept["none"] == {}
    assert kept["forward"] == {"rollout": 5, "scoring": 1, "update": 0}
    assert kept["all"] == {"rollout": 5, "scoring": 1, "update": 9}
