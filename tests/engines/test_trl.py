"""GIPO on TRL: its gradient is the scripts', old completions are as old as they should be, it learns and resumes.

Needs the environment of requirements-trl.txt, and is skipped elsewhere.
"""

import ast
import contextlib
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="needs the environment of requirements-trl.txt")

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network, and none should

import peft
import torch
import transformers
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import GRPOConfig, GRPOTrainer

import gipo_trl
from gipo_trl import GIPOConfig, GIPOTrainer, sorting

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries to each other
ROOT = Path(__file__).parents[2]
# ten generations of four prompts, two steps each
SMALL = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "num_generations": 4, "max_steps": 20}
SMALL |= {"max_completion_length": 8, "disable_dropout": True, "report_to": [], "save_strategy": "no"}
SMALL |= {"logging_steps": 2}


def scripts_functions(*names: str):
    """Functions as the scripts ship them, without their imports, which are not installed here."""
    body = ast.parse((ROOT / "gipo_continuous.py").read_text()).body
    nodes = [node for node in body if isinstance(node, ast.FunctionDef) and node.name in names]
    space = {"torch": torch, "math": math}
    exec(compile(ast.Module(nodes, []), "gipo_continuous", "exec"), space)
    return [space[name] for name in names]


def length(completions, **_):
    """A reward that a new model gets in various amounts."""
    return [float(len(completion)) for completion in completions]


def make_config(folder, **flags):
    return GIPOConfig(str(folder), **SMALL | flags)


def make_trainer(config, kind=GIPOTrainer, seed=1, model=None, **kwargs):
    """A trainer of a new tiny model, which has learned nothing yet, or of that in a folder."""
    transformers.set_seed(seed)
    new, tokenizer = gipo_trl.tiny_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(model) if model else new
    rows = gipo_trl.Dataset.from_list(sorting(200, random.Random(1)))
    trainer = kind(model, length, config, rows, None, tokenizer, **kwargs)
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def drift(model, scale=0.2):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)


def generate(trainer):
    """The minibatches of a generation, as the trainer learns from them."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # TRL's loop sets it
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer.drawn


def record(trainer):
    """The same, with advantages of both signs, by a policy from which the learner has drifted."""
    minibatches = generate(trainer)
    drift(trainer.model)
    for minibatch in minibatches:
        minibatch["advantages"] = torch.linspace(-1, 1.2, len(minibatch["completion_ids"]))
    return minibatches


def mask_of(minibatch):
    return (minibatch["completion_mask"] * minibatch.get("tool_mask", 1)).bool()


def log_probabilities(model, minibatch):
    """Of the completions' tokens (B, T), by the model alone."""
    ids = torch.cat([minibatch["prompt_ids"], minibatch["completion_ids"]], 1)
    mask = torch.cat([minibatch["prompt_mask"], minibatch["completion_mask"]], 1)
    completion = minibatch["completion_ids"]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -completion.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, completion.unsqueeze(-1)).squeeze(-1)


def log_ratios(model, minibatch):
    return log_probabilities(model, minibatch) - minibatch["old_per_token_logps"]


def gradients(loss, model, **flags) -> torch.Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trained, **flags)])


def logged(trainer, tag):
    return [entry[tag] for entry in trainer.state.log_history if tag in entry]


# -------------------------------------------------------- Loss --------------------------------------------------------
READ = ("_buffered_inputs", "_metrics", "_step", "current_gradient_accumulation_steps", "processing_class")


def test_trl_still_has_the_hooks_that_the_trainer_overrides_and_reads(tmp_path):
    methods = [name for name, value in vars(GIPOTrainer).items() if callable(value) and name != "__init__"]
    overridden = set(methods) - {"_behaviour_policy", "_load", "_set_log_mu", "_log_diagnostics"}
    assert len(overridden) == 6
    for name in overridden:
        assert callable(getattr(GRPOTrainer, name, None)), f"TRL has no GRPOTrainer.{name} any more; we override it."
    trainer = make_trainer(make_config(tmp_path, max_steps=2))
    trainer.train()
    for name in READ:
        assert hasattr(trainer, name), f"TRL's trainer has no {name} any more; we read it."
    assert trainer.generation == 0 and len(trainer.rollouts) == 1, "TRL did not call _prepare_inputs with its buffer."


@pytest.mark.parametrize("tools", [False, True])
def test_the_gradient_is_that_of_the_scripts_on_the_same_tokens(tools, tmp_path):
    trainer = make_trainer(make_config(tmp_path, sigma=0.4, kl_coef=0.0, per_device_train_batch_size=32))
    minibatches, model = record(trainer), trainer.model
    if tools:  # tokens of a tool are in the completion, but the model did not write them
        for minibatch in minibatches:
            minibatch["tool_mask"] = (torch.rand(minibatch["completion_ids"].shape) < 0.6).long()
        for minibatch in minibatches:
            minibatch["num_items_in_batch"] = sum(mask_of(other).sum() for other in minibatches)
    own = {}
    for kl_coef in (0.0, 0.3):
        trainer.args.kl_coef = kl_coef
        found = [gradients(trainer._compute_loss(model, minibatch), model) for minibatch in minibatches]
        own[kl_coef] = sum(found) / len(found)  # TRL divides by the tokens of a mean minibatch

    masks = [mask_of(minibatch) for minibatch in minibatches]
    advantages = [minibatch["advantages"].unsqueeze(1).expand_as(mask) for minibatch, mask in zip(minibatches, masks)]
    logratio = torch.cat([log_ratios(model, minibatch) for minibatch in minibatches])
    advantage, kept = torch.cat(advantages), torch.cat(masks)
    # the gradient of the mean of r - 1 - log r, where no more than exp(2) is taken for r
    slope = logratio.detach().clamp(max=2).exp() - 1
    pull = 0.3 * gradients((slope * logratio)[kept].mean(), model, retain_graph=True)
    assert logratio[kept].min() < -2 and logratio[kept].max() > 2.2 and not kept.all()
    (policy_loss,) = scripts_functions("policy_loss")
    loss = policy_loss(logratio[kept].unsqueeze(1), advantage[kept].unsqueeze(1), SimpleNamespace(sigma=0.4))
    expected = gradients(loss, model)
    torch.testing.assert_close(own[0.0], expected, atol=1e-5, rtol=1e-4)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(own[0.3] - own[0.0], pull, atol=1e-5, rtol=1e-4)
    assert pull.abs().max() > 1e-2


def test_two_micro_batches_give_the_gradient_of_one_batch(tmp_path):
    flags = {"max_steps": 4, "kl_coef": 0.3}
    shape = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    halves, whole = make_trainer(make_config(tmp_path, **flags, **shape)), make_trainer(make_config(tmp_path, **flags))
    micro = record(halves)
    for i, minibatch in enumerate(micro):  # one has more tokens than the other
        ends = torch.tensor([8, 5, 3, 2 + 4 * (i % 2)])
        minibatch["completion_mask"] = (torch.arange(8) < ends.unsqueeze(1)).long()
        minibatch["num_items_in_batch"] = torch.tensor(2 * (18 + 22))
    whole.model.load_state_dict(halves.model.state_dict())
    whole.model.train()
    halves._buffered_inputs = halves.drawn = micro
    whole._buffered_inputs = whole.drawn = [
        {name: torch.cat([a[name], b[name]]) if torch.is_tensor(a[name]) and a[name].ndim else a[name] for name in a}
        for a, b in zip(micro[::2], micro[1::2])
    ]
    halves.current_gradient_accumulation_steps, whole.current_gradient_accumulation_steps = 2, 1
    halves._step, whole._step = 2, 1  # the second half of the generation
    for trainer in (halves, halves, whole):
        trainer.training_step(trainer.model, None, None)
    for one, other in zip(halves.model.parameters(), whole.model.parameters()):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)
    assert max(parameter.grad.abs().max() for parameter in whole.model.parameters()) > 1e-2


def test_the_log_says_what_is_learned_from(tmp_path):
    trainer = make_trainer(make_config(tmp_path, sigma=0.6, kl_coef=0.0, per_device_train_batch_size=32))
    minibatch = record(trainer)[0]
    mask, advantages = mask_of(minibatch), minibatch["advantages"].unsqueeze(1)
    own = gradients(trainer._compute_loss(trainer.model, minibatch), trainer.model)
    coef = trainer.coef
    tokens = minibatch["num_items_in_batch"] / 2  # of a mean minibatch
    loss = -(coef * advantages * log_probabilities(trainer.model, minibatch))[mask].sum() / tokens
    torch.testing.assert_close(own, gradients(loss, trainer.model), atol=1e-5, rtol=1e-4)
    assert own.abs().max() > 1e-2 and coef[mask].std() > 0.05
    scalars = {tag: values[-1] for tag, values in trainer._metrics["train"].items()}
    logratio = log_ratios(trainer.model, minibatch)[mask].detach()
    assert scalars["offpolicy/coef_mean"] == pytest.approx(coef[mask].mean().item(), rel=1e-3)
    assert scalars["losses/kl"] == pytest.approx(-logratio.mean().item(), abs=1e-5)


def test_diagnostics_are_those_of_the_scripts():
    logratio = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    coef = torch.exp(logratio - 2 * logratio**2)
    _, diagnostics = scripts_functions("policy_loss", "diagnostics")
    own = gipo_trl.diagnostics(logratio, coef)
    theirs = diagnostics(logratio.unsqueeze(1), torch.randn(2000, 1), SimpleNamespace(sigma=0.5))
    theirs["losses/kl"] = -logratio.mean()  # the scripts log it with the losses
    assert own.keys() == theirs.keys()
    for tag, value in own.items():
        torch.testing.assert_close(value, theirs[tag])
    coarse = gipo_trl.diagnostics(logratio.bfloat16(), coef.bfloat16())
    for tag, value in coarse.items():
        torch.testing.assert_close(value.float(), own[tag], atol=0.02, rtol=0.02)
    assert 0 < own["offpolicy/dead_fraction"] < 1 and 0 < own["offpolicy/ess"] < 1


def test_nothing_overflows_at_log_ratios_of_100(tmp_path):
    logratio = torch.tensor([-100.0, -20.0, 0.0, 20.0, 100.0])
    for sigma in (0.01, 0.5, 10):
        coef = gipo_trl.gipo_coefficient(logratio, sigma)
        for value in (coef, gipo_trl.kl_estimate(logratio), *gipo_trl.diagnostics(logratio, coef).values()):
            assert value.isfinite().all()
    trainer = make_trainer(make_config(tmp_path))
    minibatch = record(trainer)[0]
    minibatch["old_per_token_logps"][:, ::2] += 100
    minibatch["old_per_token_logps"][:, 1::2] -= 100
    loss = trainer._compute_loss(trainer.model, minibatch)
    assert loss.isfinite() and gradients(loss, trainer.model).isfinite().all()
    assert all(math.isfinite(values[-1]) for values in trainer._metrics["train"].values())


def test_a_minibatch_without_a_token_to_learn_from_teaches_nothing(tmp_path):
    """All its completions are too long, and TRL's mask_truncated_completions is set."""
    trainer = make_trainer(make_config(tmp_path))
    minibatch = record(trainer)[0]
    minibatch["completion_mask"] = torch.zeros_like(minibatch["completion_mask"])
    loss = trainer._compute_loss(trainer.model, minibatch)
    assert loss == 0 and (gradients(loss, trainer.model) == 0).all()
    assert "losses/kl" not in trainer._metrics["train"]


def test_fresh_completions_without_a_reward_teach_nothing(tmp_path):
    trainer = make_trainer(make_config(tmp_path, kl_coef=0.3))
    trainer.reward_funcs = [lambda completions, **_: [1.0] * len(completions)]
    loss = trainer._compute_loss(trainer.model, generate(trainer)[0])
    assert gradients(loss, trainer.model).abs().max() < 1e-5


def test_the_pull_to_a_reference_model_has_no_ratio_without_bound(tmp_path):
    """TRL would multiply it by the ratio, which is e^12 here."""
    for part in gipo_trl.tiny_model():
        part.save_pretrained(tmp_path)
    trainer = make_trainer(make_config(tmp_path, beta=0.1, kl_coef=0.0), model=tmp_path)
    minibatch = generate(trainer)[0]
    minibatch["old_per_token_logps"] = minibatch["old_per_token_logps"] - 12
    minibatch["ref_per_token_logps"] = minibatch["ref_per_token_logps"] + 0.1
    assert gradients(trainer._compute_loss(trainer.model, minibatch), trainer.model).norm() < 1


# --------------------------------------------- The sampler's log-probabilities ---------------------------------------
def stale_sampler(unknown):
    """A rollout_func whose policy is an older one; it does not report the tokens at `unknown`."""
    transformers.set_seed(7)
    policy = gipo_trl.tiny_model()[0]
    drift(policy, 0.1)

    @torch.no_grad()
    def rollout(prompts, trainer):
        ids = trainer.processing_class(prompts, return_token_type_ids=False)["input_ids"]
        found = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for prompt in ids:
            completion = torch.randint(2, 12, (8,))
            logits = policy(torch.tensor([prompt + completion.tolist()])).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(1, completion.unsqueeze(1)).squeeze(1)
            logprobs[unknown] = math.nan
            found["prompt_ids"].append(prompt)
            found["completion_ids"].append(completion.tolist())
            found["logprobs"].append(logprobs.tolist())
        return found

    return policy, rollout


@pytest.mark.parametrize("unknown", [[], [0, 3]])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_ratio_is_to_the_policy_that_wrote(steps, unknown, tmp_path):
    """Where the sampler reports no log-probability, it is to the trainer's policy of that time."""
    policy, rollout = stale_sampler(unknown)
    shape = {"steps_per_generation": steps, "per_device_train_batch_size": 16 // steps}
    trainer = make_trainer(make_config(tmp_path, **shape), rollout_func=rollout)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    minibatch = generate(trainer)[0]
    fresh, old = (log_probabilities(model, minibatch).detach() for model in (trainer.model, policy))
    known = minibatch["sampling_per_token_logps"].isfinite()
    assert (~known).float().mean() == len(unknown) / 8 and (old - fresh).abs().mean() > 0.3
    torch.testing.assert_close(minibatch["old_per_token_logps"], torch.where(known, old, fresh), atol=1e-4, rtol=1e-4)
    trainer._compute_loss(trainer.model, minibatch)
    expected = (fresh - minibatch["old_per_token_logps"])[mask_of(minibatch)]
    scalars = {tag: values[-1] for tag, values in trainer._metrics["train"].items()}
    assert scalars["losses/kl"] == pytest.approx(-expected.mean().item(), abs=1e-4)
    coef = gipo_trl.gipo_coefficient(expected, 0.5).mean().item()
    assert scalars["offpolicy/coef_mean"] == pytest.approx(coef, abs=1e-4) and coef < 0.9
    assert all(a.equal(b) for a, b in zip(before, trainer.model.parameters()))


def test_trl_s_own_correction_is_off(tmp_path):
    """It would cut the ratio to vLLM's policy off at 3, before the Gaussian weighs it."""
    config = make_config(tmp_path, use_vllm=True)
    assert not config.vllm_importance_sampling_correction
    assert gipo_trl.gipo_coefficient(torch.tensor(3.0), 0.5) < 1e-6


# --------------------------------------------------- Replay buffer, lag -----------------------------------------------
class Watched(GIPOTrainer):
    """Keeps the learner's weights at each generation, and what is learned from after it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.learners, self.stored, self.taught, self.distances = [], [], [], []

    def _generate_and_score_completions(self, inputs):
        learner = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        completions = super()._generate_and_score_completions(inputs)
        assert all(tensor.equal(learner[name]) for name, tensor in self.model.state_dict().items())
        self.learners.append(learner)
        return completions

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if len(self.stored) < len(self.learners):
            self.stored.append([list(rollout) for rollout in self.rollouts])
            self.taught.append([])
            self.distances.append([])
        self.taught[-1].append(inputs)
        self.distances[-1].append(self.logratio[mask_of(inputs)].abs().max().item())
        return loss


def watched(folder, **flags):
    trainer = make_trainer(make_config(folder, learning_rate=1e-2, **flags), Watched)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("epochs", "lag", "steps"), [(1, 0, 4), (3, 0, 4), (1, 2, 4), (4, 3, 4), (3, 0, 1), (1, 2, 1)])
def test_completions_are_as_old_as_buffer_and_lag_make_them(epochs, lag, steps, tmp_path):
    """With four steps for a generation, and with one, where TRL stores no log-probabilities."""
    shape = {"steps_per_generation": steps, "per_device_train_batch_size": 16 // steps, "max_steps": 10 * steps}
    trainer = watched(tmp_path, buffer_epochs=epochs, policy_lag=lag, **shape)
    assert len(trainer.learners) == len(trainer.stored) == 10
    old = 0
    for generation, (stored, taught) in enumerate(zip(trainer.stored, trainer.taught)):
        kept = range(max(0, generation - epochs + 1), generation + 1)  # the newest K rollouts
        versions = [[minibatch["version"] for minibatch in rollout] for rollout in stored]
        assert versions == [[max(0, number - lag)] * steps for number in kept]
        ids = [id(minibatch) for rollout in stored for minibatch in rollout]
        assert len({id(minibatch) for minibatch in taught} & set(ids)) == len(taught) == steps  # and none of them twice
        old += sum(minibatch["version"] < versions[-1][0] for minibatch in taught)
    ages = {generation - minibatch["version"] for rollout in trainer.stored[-1] for minibatch in rollout}
    assert ages == set(range(lag, lag + epochs))
    assert (old == 0) if epochs == 1 else (2 * steps < old < 9 * steps)
    assert logged(trainer, "offpolicy/age_max")[-1] == lag + epochs - 1
    assert logged(trainer, "offpolicy/age_mean")[-1] == lag + (epochs - 1) / 2

    def distance(version, minibatch):
        trainer.model.load_state_dict(trainer.learners[version])
        with torch.no_grad():
            return log_ratios(trainer.model, minibatch)[mask_of(minibatch)].abs().max()

    for rollout in trainer.stored[-1] if epochs > 1 or lag else []:
        version = rollout[0]["version"]
        for minibatch in rollout:
            assert distance(version, minibatch) < 1e-4
            for other in {version - 1, version + 1} & set(range(len(trainer.learners))):
                assert distance(other, minibatch) > 1e-3


def test_without_buffer_and_lag_the_first_minibatch_is_on_policy_and_all_are_new(tmp_path):
    trainer = watched(tmp_path)
    for stored, taught, (first, *later) in zip(trainer.stored, trainer.taught, trainer.distances):
        assert {id(minibatch) for minibatch in taught} == {id(minibatch) for minibatch in stored[-1]}
        assert first < 1e-5 and min(later) > 1e-3


def test_each_pass_over_a_generation_draws_anew(tmp_path):
    trainer = watched(tmp_path, num_iterations=4, buffer_epochs=4, max_steps=80)
    assert {len(taught) for taught in trainer.taught} == {8}
    passes = [{id(minibatch) for minibatch in taught[i : i + 2]} for taught in trainer.taught[4:] for i in (0, 2, 4, 6)]
    assert {len(one) for one in passes} == {2}  # none twice in a pass
    assert len(set(map(frozenset, passes))) > 15  # of 24


def test_a_generation_that_fails_leaves_the_newest_weights(tmp_path):
    calls = []

    def fails(completions, **_):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return length(completions)

    trainer = make_trainer(make_config(tmp_path, policy_lag=3, learning_rate=1e-2))
    trainer.reward_funcs = [fails]
    first = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    newest = trainer.policies[-1]
    assert all(weight.equal(newest[name]) for name, weight in trainer.model.named_parameters())
    assert not all(weight.equal(first[name]) for name, weight in trainer.model.named_parameters())


def test_a_lag_copies_what_is_trained(tmp_path):
    adapters = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(make_config(tmp_path, policy_lag=2, learning_rate=1e-2), peft_config=adapters)
    trainer.train()
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert [sum(x.numel() for x in policy.values()) for policy in trainer.policies] == [trained] * 3
    assert trained < 0.2 * sum(parameter.numel() for parameter in trainer.model.parameters())
    assert logged(trainer, "offpolicy/abs_logratio_p95")[-1] > 1e-3 and logged(trainer, "offpolicy/age_max")[-1] == 2


# ------------------------------------------------------ Settings -----------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"sigma": 0}, "sigma 0: give"),
        ({"sigma": -1.0}, "sigma -1.0: give"),
        ({"sigma": math.nan}, "sigma nan: give"),
        ({"kl_coef": -0.1}, "kl_coef -0.1: give"),
        ({"buffer_epochs": 0}, "buffer_epochs 0: give 1"),
        ({"policy_lag": -1}, "policy_lag -1: give 0"),
        ({"loss_type": "dapo"}, "loss_type dapo: "),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level: "),
        ({"policy_lag": 1, "use_vllm": True}, "policy_lag swaps"),
    ],
)
def test_settings_are_checked_at_once(flags, words, tmp_path):
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        make_config(tmp_path, **flags)


def test_a_lag_is_refused_where_weights_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr(gipo_trl, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 splits them"):
        make_trainer(make_config(tmp_path, policy_lag=1))


def test_settings_of_trl_alone_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give a GIPOConfig"):
        make_trainer(GRPOConfig(str(tmp_path), bf16=False, **SMALL))


def test_the_example_of_the_page_runs_as_printed(tmp_path, monkeypatch):
    """With a model, a reward and rows; on a CPU, where TRL's own default is bfloat16."""
    text = (ROOT / "docs" / "llm.md").read_text().split("## Use it", 1)[1]
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    for part in gipo_trl.tiny_model():
        part.save_pretrained(tmp_path / "PATH_OR_ID")
    monkeypatch.chdir(tmp_path)
    space = {"reward": length, "rows": gipo_trl.Dataset.from_list(sorting(64, random.Random(1)))}
    exec(example, space)
    assert space["trainer"].args.buffer_epochs > 1 and space["trainer"].args.bf16 is False
    space["trainer"].args.max_steps = 2
    space["trainer"].train()


# ------------------------------------------------------ Checkpoints --------------------------------------------------
def test_a_checkpoint_of_grpo_goes_on_with_an_empty_buffer(tmp_path):
    config = GRPOConfig(str(tmp_path), bf16=False, **SMALL | {"save_strategy": "steps", "save_steps": 10})
    plain = make_trainer(config, GRPOTrainer)
    plain.train()
    trainer = make_trainer(make_config(tmp_path, buffer_epochs=4))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert trainer.state.global_step == 20 and trainer.generation == 4


def test_minibatches_of_another_size_leave_the_buffer(tmp_path):
    """They would have another weight."""
    flags = {"buffer_epochs": 4, "save_strategy": "steps", "save_steps": 8, "max_steps": 8}
    make_trainer(make_config(tmp_path, **flags)).train()
    for shape in ({}, {"steps_per_generation": 1, "per_device_train_batch_size": 16}):
        trainer = make_trainer(make_config(tmp_path, **flags | {"max_steps": 10} | shape))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        sizes = {len(rollout) for rollout in trainer.rollouts}
        assert sizes == {trainer.args.steps_per_generation}
        assert len(trainer.rollouts) == (2 if shape else 4)


def test_groups_of_parameters_keep_their_rates(tmp_path):
    flags = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant", "max_steps": 4}

    def trainer(**more):
        found = make_trainer(make_config(tmp_path, **flags | more))
        first, *others = found.model.parameters()
        groups = [{"params": [first], "lr": 1e-3}, {"params": others, "lr": 1e-5}]
        found.optimizer = torch.optim.AdamW(groups)
        return found

    trainer().train()
    resumed = trainer(max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [1e-3, 1e-5]


TWO = """
import gc, json, sys, random, torch, gipo_trl, transformers
folder, *checkpoint = sys.argv[1:]
transformers.set_seed(1)
model, tokenizer = gipo_trl.tiny_model()
flags = dict(steps_per_generation=2, num_generations=4, max_completion_length=8, use_cpu=True, report_to=[])
flags |= dict(logging_steps=1, save_steps=4, buffer_epochs=2, policy_lag=1, learning_rate=1e-2)
config = gipo_trl.GIPOConfig(folder, per_device_train_batch_size=4, max_steps=8 if checkpoint else 4, **flags)
rows = gipo_trl.Dataset.from_list(gipo_trl.sorting(64, random.Random(1)))
reward = lambda completions, **_: [float(len(x)) for x in completions]
trainer = gipo_trl.GIPOTrainer(model, reward, config, rows, processing_class=tokenizer)
found, diagnose = [], gipo_trl.diagnostics
def watched(logratio, coef):
    found.append([coef.sum().item(), len(coef)])
    return diagnose(logratio, coef)
gipo_trl.diagnostics = watched
trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
total = sum(parameter.double().sum().item() for parameter in model.parameters())
logs = [x["offpolicy/coef_mean"] for x in trainer.state.log_history if "offpolicy/coef_mean" in x]
with open(f"rank-{config.process_index}.json", "w") as file:
    json.dump([total, found, logs[-len(found):], trainer.generation], file)
del trainer, model  # they hold the group, whose threads must end before Python does
gc.collect()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_buffers_of_their_own_and_one_log(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "two.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for more, generation in (["run"], 1), (["run", "run/checkpoint-4"], 3):
        done = subprocess.run([*launch, *more], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
        assert one[0] == two[0] and one[3] == two[3] == generation  # the same model
        own = torch.tensor([one[1], two[1]])
        assert not own[0].equal(own[1])  # other completions
        sums, counts = own.sum(0).unbind(1)
        torch.testing.assert_close(torch.tensor(one[2]), sums / counts, atol=1e-4, rtol=1e-4)
    assert {path.name for path in (tmp_path / "run/checkpoint-8").glob("buffer*")} == {"buffer-0.pt", "buffer-1.pt"}


# ---------------------------------------------------- Command line ----------------------------------------------------
def script(folder, *flags) -> tuple[int, str]:
    """The command, but in this process, which has imported TRL already: exit code and output."""
    output, handlers = io.StringIO(), {number: signal.getsignal(number) for number in (2, 15)}
    sys.modules.pop("own", None)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["gipo_trl.py", *map(str, flags)])
        patch.setattr(sys, "path", [*sys.path])
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                code = gipo_trl.main()
            except SystemExit as stop:
                code = stop.code or 0
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
    return code, output.getvalue()


def start(folder, *flags, code=0) -> str:
    """The command as a process of its own."""
    command = [sys.executable, str(ROOT / "gipo_trl.py"), *map(str, flags)]
    dropped = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # pytest may run in the background, where it is ignored
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    found = subprocess.run(command, cwd=folder, env=env, **output)
    signal.signal(signal.SIGINT, before)
    assert found.returncode == code, found.stdout
    return found.stdout


OWN = """
import builtins, os, signal
import huggingface_hub

calls = 0

def length(completions, **_):
    return [float(len(completion)) for completion in completions]

def stops(completions, **_):
    global calls
    calls += 1
    if calls == 6:  # the first is the evaluation before the first step
        os.kill(os.getpid(), signal.SIGINT)
    return length(completions)

def hurries(completions, **_):
    # Ctrl-C, and once more as soon as the answer is there
    written = builtins.print

    def answered(*words, **settings):
        written(*words, **settings)
        os.kill(os.getpid(), signal.SIGINT)

    builtins.print = answered
    os.kill(os.getpid(), signal.SIGINT)
    return length(completions)

def none(completions, **_):
    return [None] * len(completions)

def fails(completions, **_):
    global calls
    calls += 1
    if calls == 6:
        raise KeyError("no such judge")
    return length(completions)

def weight(prompts, completions, weight, **_):
    print("telemetry is off:", huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY)
    return weight

nothing = 3
"""
SHORT = ["--model", "./model", "--per_device_train_batch_size", 8, "--steps_per_generation", 2, "--num_generations", 4]
SHORT += ["--eval_prompts", 8, "--per_device_eval_batch_size", 8, "--eval_steps", 100, "--learning_rate", 3e-3]
SHORT += ["--output_dir", "run", "--logging_steps", 2]


def place(folder):
    """A working folder with a new model, rows and a module of rewards."""
    (folder / "own.py").write_text(OWN)
    transformers.set_seed(1)
    for part in gipo_trl.tiny_model():
        part.save_pretrained(folder / "model")
    return folder


def assert_same_end(one, other):
    """Two checkpoints have the same weights, state of Adam and replay buffer."""
    weights, others = (load_file(path / "model.safetensors") for path in (one, other))
    assert all(tensor.equal(others[name]) for name, tensor in weights.items())
    assert (one / "buffer-0.pt").exists() == (other / "buffer-0.pt").exists()
    for file in ("optimizer.pt", *(["buffer-0.pt"] if (one / "buffer-0.pt").exists() else [])):
        states = [leaves(torch.load(path / file)) for path in (one, other)]
        for a, b in zip(*states, strict=True):
            assert a.equal(b) if torch.is_tensor(a) else a == b


def leaves(tree):
    if isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(branch)
    else:
        yield tree


@pytest.mark.parametrize(("epochs", "lag"), [(3, 2), (1, 0)])
def test_a_run_that_was_stopped_and_resumed_is_the_same_to_the_bit(epochs, lag, tmp_path):
    flags = [*SHORT, "--buffer_epochs", epochs, "--policy_lag", lag, "--max_steps", 20, "--save_steps", 10]
    assert script(place(tmp_path), *flags, "--reward", "own:length")[0] == 0
    (tmp_path / "run").rename(tmp_path / "whole")
    code, output = script(tmp_path, *flags, "--reward", "own:stops")
    assert code == 130 and output.count("\nsaves and stops after this step; once more ends the program at once\n") == 1
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert int(checkpoint.name.split("-")[1]) < 10
    assert f"run has the model\nwhich is not finished; --resume_from_checkpoint run/{checkpoint.name} goes on" in output
    # from the end of a generation it is exact
    torch.manual_seed(0)
    code, output = script(tmp_path, *flags, "--reward", "own:length", "--resume_from_checkpoint", "whole/checkpoint-10")
    assert code == 0
    assert_same_end(tmp_path / "whole/checkpoint-20", tmp_path / "run/checkpoint-20")
    code, _ = script(tmp_path, *flags, "--reward", "own:length", "--resume_from_checkpoint", checkpoint)
    assert code == 0


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path):
    output = start(place(tmp_path), *SHORT, "--reward", "own:hurries", "--max_steps", 20, code=-signal.SIGINT)
    assert output.endswith("\nsaves and stops after this step; once more ends the program at once\n")


@pytest.mark.parametrize(("variable", "expected"), [(None, [1]), ("2", [])])
def test_the_tiny_model_has_one_thread_unless_the_environment_says_otherwise(variable, expected, tmp_path, monkeypatch):
    """Two runs with torch's own number wait for each other."""
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(gipo_trl, "warm_up", lambda *_: None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    code, _ = script(tmp_path, *SHORT[2:], "--max_steps", 2)
    assert code == 0 and found == expected


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    compute_loss = GRPOTrainer._compute_loss

    def broken(self, model, inputs):
        return compute_loss(self, model, inputs) * (math.nan if self.state.global_step == 7 else 1)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", broken)
    code, output = script(place(tmp_path), *SHORT, "--reward", "own:length", "--max_steps", 20, "--save_steps", 2)
    assert code == 1 and re.search(r"error: \['loss'.*\] not finite at step 8; the last checkpoint stays\.\n", output)
    weights = load_file(tmp_path / "run/checkpoint-6/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_reward_that_fails_says_where_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(KeyError, match="no such judge"):
        script(place(tmp_path), *SHORT, "--reward", "own:fails", "--max_steps", 20, "--save_steps", 2)
    assert (tmp_path / "run/checkpoint-8/trainer_state.json").exists()


def test_rewards_of_none_are_skipped(tmp_path):
    code, _ = script(place(tmp_path), *SHORT, "--reward", "own:none", "--max_steps", 4, "--report_to", "tensorboard")
    assert code == 0


def write_rows(path, rows, encoding="utf-8"):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding)


MODEL = ["--model", "./model"]
BAD = {
    "sigma 0.0: give": ["--sigma", 0],
    "kl_coef nan: give": ["--kl_coef", "nan"],
    "buffer_epochs 0: give": ["--buffer_epochs", 0],
    "--data: give --model too": ["--data", "short.jsonl"],
    "--data nowhere.jsonl: ": [*MODEL, "--data", "nowhere.jsonl"],
    "--data own.py: ": [*MODEL, "--data", "own.py"],
    "--data short.jsonl: 3 rows; give 40": [*MODEL, "--data", "short.jsonl", "--eval_prompts", 8],
    "--data answerless.jsonl: ": [*MODEL, "--data", "answerless.jsonl"],
    "--data numbers.jsonl: prompt must be a text": [*MODEL, "--data", "numbers.jsonl"],
    "--data empty.jsonl: 0 rows": [*MODEL, "--data", "empty.jsonl"],
    "--reward nomodule:f: give exact or module:function": ["--reward", "nomodule:f"],
    "bug.py, line 2).": ["--reward", "bug:f"],
    "--reward own:nothing: it is no function": ["--reward", "own:nothing"],
    "--model ./nowhere: ": ["--model", "./nowhere"],
    "--model ./endless: its tokenizer has no end-of-sequence token": ["--model", "./endless"],
    "--output_dir own.py/run: ": ["--output_dir", "own.py/run"],
    "--beta: give --model": ["--beta", 0.1],
    "--eval_prompts -1: give 1": ["--eval_prompts", -1],
    "nowhere is no checkpoint": ["--resume_from_checkpoint", "nowhere"],
    "--data chats.jsonl: the model has no template": [*MODEL, "--data", "chats.jsonl", "--eval_prompts", 8],
}


def test_a_mistake_is_one_sentence_and_starts_no_run(tmp_path, monkeypatch):
    place(tmp_path)
    model, tokenizer = gipo_trl.tiny_model()
    tokenizer.eos_token = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "endless")
    rows = sorting(3, random.Random(1))
    write_rows(tmp_path / "short.jsonl", rows)
    write_rows(tmp_path / "answerless.jsonl", [*rows, {"prompt": "1="}])
    write_rows(tmp_path / "numbers.jsonl", [{"prompt": "1=", "answer": 1}])
    write_rows(tmp_path / "empty.jsonl", [])
    (tmp_path / "bug.py").write_text("\n1 / 0\n")
    write_rows(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": "1"}], "answer": "1"}] * 60)
    monkeypatch.setattr(gipo_trl, "warm_up", lambda *_: pytest.fail("too late"))
    for words, flags in BAD.items():
        code, output = script(tmp_path, *flags)
        (line,) = output.splitlines()
        assert code == 2 and line.startswith("error: ") and words in line, (flags, output)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(GIPOConfig, "world_size", 2)
    code, output = script(tmp_path)
    assert code == 2 and output.startswith("error: this example takes one process")
    assert not (tmp_path / "run").exists()


def test_rows_are_read_as_utf_8_whatever_the_locale(tmp_path):
    rows = [{"prompt": f"Grüße {i}=", "answer": "ß"} for i in range(12)]
    write_rows(tmp_path / "rows.jsonl", rows, "utf-8-sig")  # with a byte-order mark
    args, config = gipo_trl.ExampleArgs(data=str(tmp_path / "rows.jsonl"), eval_prompts=4), make_config(tmp_path)
    held_out, rest = gipo_trl.read_rows(args, config)
    assert held_out[0] == rows[0] and len(rest) == 8


CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def test_prompts_of_a_chat_model(tmp_path):
    place(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    rows = sorting(24, random.Random(1))
    chats = [row | {"prompt": [{"role": "user", "content": row["prompt"][:-1]}]} for row in rows]
    write_rows(tmp_path / "chats.jsonl", chats)
    code, output = script(tmp_path, *SHORT, "--data", "chats.jsonl", "--max_steps", 4)
    assert code == 0 and "on held-out prompts" in output
    assert gipo_trl.exact([[{"role": "assistant", "content": "12"}], "13"], ["12", "12"]) == [1.0, 0.0]


def test_adapters(tmp_path):
    code, _ = script(place(tmp_path), *SHORT, "--reward", "own:length", "--lora_rank", 2, "--max_steps", 4)
    assert code == 0 and (tmp_path / "run/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_data_and_reward_of_one_s_own_are_learned_from(tmp_path):
    place(tmp_path)
    rows = sorting(24, random.Random(1))
    write_rows(tmp_path / "task.jsonl", [row | {"weight": 1.0 if i < 8 else 3.0} for i, row in enumerate(rows)])
    flags = [*SHORT, "--data", "task.jsonl", "--reward", "own:weight", "--max_steps", 4, "--eval_steps", 4]
    output = start(tmp_path, *flags)
    assert "step 4: reward 1.000 on held-out prompts" in output  # the first rows of the file
    assert "Traceback" not in output and "reward=3" in output
    found = re.findall("telemetry is off: (.*)", output)
    assert found and set(found) == {"True"}


@pytest.mark.slow
def test_a_tiny_model_learns_to_sort(tmp_path):
    output = start(tmp_path, "--max_steps", 480, "--eval_steps", 160, "--output_dir", "run")
    assert "run has the model\n" in output
    (events,) = (tmp_path / "run").rglob("events*")
    curves = EventAccumulator(str(events.parent), {"scalars": 0}).Reload()
    evaluations = curves.Scalars("eval/reward")
    assert [event.step for event in evaluations] == [0, 160, 320, 480]
    first, *_, last = (event.value for event in evaluations)
    assert 0.5 < first < 0.9 <= last and last - first > 0.05, output
    assert f"step 480: reward {last:.3f} on held-out prompts" in output
    tags = curves.Tags()["scalars"]
    assert sum(tag.startswith("train/losses/") for tag in tags) == 3
    assert sum(tag.startswith("train/offpolicy/") for tag in tags) == 6
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert sum(parameter.numel() for parameter in model.parameters()) > 100_000
