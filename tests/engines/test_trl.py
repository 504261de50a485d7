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
import runpy
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="needs the environment of requirements-trl.txt")

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network, and none should

import accelerate
import torch
import transformers
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import GRPOConfig, GRPOTrainer

import gipo_trl

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries to each other
ROOT = Path(__file__).parents[2]
SURROGATES = ("gipo", "clip", "sapo", "cispo", "vespo")
SMALL = {"prompts": 4, "group": 4, "minibatches": 2, "eval_prompts": 8, "iterations": 10}


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


def make_trainer(config, kind=gipo_trl.GIPOTrainer, seed=1):
    """A trainer of a new tiny model, which has learned nothing yet."""
    transformers.set_seed(seed)
    model, tokenizer = gipo_trl.tiny_model()
    held_out, rows = gipo_trl.read_rows(gipo_trl.Args(eval_prompts=8, iterations=8))
    trainer = kind(model, length, config, rows, held_out, tokenizer)
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def make_config(folder, **flags):
    return gipo_trl.make_config(gipo_trl.Args(**SMALL | flags), folder)


def drift(model, scale=0.2):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)


def record(trainer):
    """The minibatches of a generation, with advantages of both signs, by a policy from which the learner drifted."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # TRL's loop sets it
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    drift(trainer.model)
    for minibatch in trainer.drawn:
        minibatch["advantages"] = torch.linspace(-1, 1.2, len(minibatch["completion_ids"]))
    return trainer.drawn


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


def gradients(loss, model) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])


def logged(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), {"scalars": 0}).Reload()


# -------------------------------------------------------- Loss --------------------------------------------------------
OVERRIDDEN = [name for name, value in vars(gipo_trl.GIPOTrainer).items() if callable(value) and name != "__init__"]
READ = ("_buffered_inputs", "_metrics", "current_gradient_accumulation_steps", "num_iterations")


def test_trl_still_has_the_hooks_that_the_script_overrides_and_reads(tmp_path):
    assert len(OVERRIDDEN) == 7
    for name in OVERRIDDEN:
        assert callable(getattr(GRPOTrainer, name, None)), f"TRL has no GRPOTrainer.{name} any more; we override it."
    trainer = make_trainer(make_config(tmp_path, iterations=1))
    trainer.train()
    for name in READ:
        assert hasattr(trainer, name), f"TRL's trainer has no {name} any more; we read it."
    assert hasattr(trainer.args, "steps_per_generation"), (
        "TRL's config has no steps_per_generation any more; we read it."
    )
    assert trainer.generation == 0 and len(trainer.rollouts) == 1, "TRL did not call _prepare_inputs with its buffer."


@pytest.mark.parametrize("tools", [False, True])
def test_the_gradient_is_that_of_the_scripts_on_the_same_tokens(tools, tmp_path):
    trainer = make_trainer(make_config(tmp_path, sigma=0.4, sigma_neg=0.2, kl_coef=0.0, minibatches=4, prompts=32))
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
    logratios = [log_ratios(model, minibatch) for minibatch in minibatches]
    advantages = [minibatch["advantages"].unsqueeze(1).expand_as(mask) for minibatch, mask in zip(minibatches, masks)]
    # the gradient of the mean of r - 1 - log r, where no more than exp(2) is taken for r
    slopes = [logratio.detach().clamp(max=2).exp() - 1 for logratio in logratios]
    kl = sum((slope * x)[mask].mean() for slope, x, mask in zip(slopes, logratios, masks)) / len(minibatches)
    pull = 0.3 * gradients(kl, model)
    logratios = [log_ratios(model, minibatch) for minibatch in minibatches]
    logratio, advantage, kept = torch.cat(logratios), torch.cat(advantages), torch.cat(masks)
    assert logratio[kept].min() < -2 and logratio[kept].max() > 2.2 and not kept.all()
    (policy_loss,) = scripts_functions("policy_loss")
    logratio, advantage, loss = logratio[kept].unsqueeze(1), advantage[kept].unsqueeze(1), 0
    for sigma, rows in ((0.4, advantage[:, 0] > 0), (0.2, advantage[:, 0] <= 0)):  # the scripts have one width
        loss += rows.float().mean() * policy_loss(logratio[rows], advantage[rows], SimpleNamespace(sigma=sigma))
    expected = gradients(loss, model)
    torch.testing.assert_close(own[0.0], expected, atol=1e-5, rtol=1e-4)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(own[0.3] - own[0.0], pull, atol=1e-5, rtol=1e-4)
    assert pull.abs().max() > 1e-2


def test_two_micro_batches_give_the_gradient_of_one_batch(tmp_path):
    settings = {"output_dir": str(tmp_path), "num_generations": 4, "max_completion_length": 8, "bf16": False}
    settings |= {"max_steps": 4, "kl_coef": 0.3}
    halves = gipo_trl.GIPOConfig(
        **settings, per_device_train_batch_size=4, steps_per_generation=4, gradient_accumulation_steps=2
    )
    whole = gipo_trl.GIPOConfig(**settings, per_device_train_batch_size=8, steps_per_generation=2)
    halves, whole = make_trainer(halves), make_trainer(whole)
    micro = record(halves)
    for minibatch in micro:  # as many tokens in each, because the KL term is a mean over those of a micro-batch
        ends = torch.tensor([8, 5, 3, 2]).roll(random.randrange(4))
        minibatch["completion_mask"] = (torch.arange(8) < ends.unsqueeze(1)).long()
        minibatch["num_items_in_batch"] = 4 * ends.sum()
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


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_recorded_coefficient_is_what_autograd_finds_in_trl_s_loss(surrogate, tmp_path):
    flags = {"prompts": 64, "sigma": 0.6, "sigma_neg": 0.3, "kl_coef": 0.0}
    trainer = make_trainer(make_config(tmp_path, surrogate=surrogate, **flags))
    minibatch = record(trainer)[0]
    mask, advantages = mask_of(minibatch), minibatch["advantages"].unsqueeze(1)
    loss = trainer._compute_loss(trainer.model, minibatch)
    (slope,) = torch.autograd.grad(loss, trainer.logprobs)
    tokens = minibatch["num_items_in_batch"] / 2  # of a mean minibatch
    if surrogate == "sapo":  # the mean over completions of the mean over tokens
        tokens = mask.sum(1, keepdim=True) * len(mask)
    found = (-slope * tokens / advantages)[mask]
    coef = trainer.coef.expand_as(mask)[mask]
    torch.testing.assert_close(coef, found, atol=1e-4, rtol=1e-4)
    assert (slope[~mask] == 0).all() and coef.std() > 0.05
    assert surrogate != "clip" or 0.1 < (coef == 0).float().mean() < 0.9
    assert surrogate != "cispo" or (coef == 5).any()
    scalars = {tag: values[-1] for tag, values in trainer._metrics["train"].items()}
    logratio = log_ratios(trainer.model, minibatch)[mask].detach()
    assert scalars["offpolicy/coef_mean"] == pytest.approx(found.mean().item(), rel=1e-3)
    assert scalars["losses/kl"] == pytest.approx(-logratio.mean().item(), abs=1e-5)


@pytest.mark.parametrize("surrogate", SURROGATES[1:])
def test_all_surrogates_but_gipo_are_trl_s_own(surrogate, tmp_path):
    own = make_trainer(make_config(tmp_path, surrogate=surrogate, kl_coef=0.0))
    minibatch = record(own)[0]
    config = GRPOConfig(
        str(tmp_path),
        loss_type={"clip": "dapo"}.get(surrogate, surrogate),
        epsilon_high={"cispo": 5.0}.get(surrogate),
        per_device_train_batch_size=8,
        steps_per_generation=2,
        num_generations=4,
        bf16=False,
    )
    theirs = make_trainer(config, GRPOTrainer)
    theirs.model.load_state_dict(own.model.state_dict())
    theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1
    losses = [trainer._compute_loss(trainer.model, minibatch) for trainer in (own, theirs)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)
    slopes = [gradients(loss, trainer.model) for loss, trainer in zip(losses, (own, theirs))]
    torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-4)
    assert slopes[0].abs().max() > 1e-3


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
    logratio = torch.tensor([-100.0, -20.0, 0.0, 20.0, 100.0]).expand(2, 5)
    advantages = torch.tensor([[1.0], [-1.0]])
    for sigma in (0.01, 0.5, 10):
        args = gipo_trl.Args(sigma=sigma)
        coef = gipo_trl.gipo_coefficient(logratio, advantages, args)
        for value in (coef, *gipo_trl.diagnostics(logratio.flatten(), coef.flatten()).values()):
            assert value.isfinite().all()
    for surrogate in ("clip", "sapo", "cispo"):
        coef = gipo_trl.trl_coefficient(logratio, advantages, make_config(tmp_path, surrogate=surrogate))
        for value in (coef, *gipo_trl.diagnostics(logratio.flatten(), coef.flatten()).values()):
            assert value.isfinite().all()
    trainer = make_trainer(make_config(tmp_path))
    minibatch = record(trainer)[0]
    minibatch["old_per_token_logps"][:, ::2] += 100
    minibatch["old_per_token_logps"][:, 1::2] -= 100
    loss = trainer._compute_loss(trainer.model, minibatch)
    assert loss.isfinite() and gradients(loss, trainer.model).isfinite().all()
    assert all(math.isfinite(values[-1]) for values in trainer._metrics["train"].values())


def test_the_weight_counts_from_vllm_s_probabilities_where_vllm_wrote(tmp_path):
    trainer = make_trainer(make_config(tmp_path))
    logratio, ratio = torch.tensor([[0.3, -0.2, 0.1]]), torch.tensor([[1.5, 0.5, 0.0]])  # TRL masks with a ratio of 0
    found = trainer.get_gamma_weights(
        advantages=torch.ones(1, 1), log_ratio_per_token=logratio, mask=None, importance_sampling_ratio=ratio
    )
    total = logratio + ratio.log()
    expected = torch.exp(total - 0.5 * (total / 0.5) ** 2)
    torch.testing.assert_close(found, expected)
    assert found[0, 2] == 0


# --------------------------------------------------- Replay buffer, lag -----------------------------------------------
class Watched(gipo_trl.GIPOTrainer):
    """Keeps the learner's weights at each generation, and what is learned from after it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.learners, self.stored, self.taught, self.distances = [], [], [], []

    def _generate_and_score_completions(self, inputs):
        learner = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        completions = super()._generate_and_score_completions(inputs)
        assert all(tensor.equal(learner[name]) for name, tensor in self.model.state_dict().items())
        if self.model.training:
            self.learners.append(learner)
        return completions

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if model.training:
            if len(self.stored) < len(self.learners):
                self.stored.append([list(rollout) for rollout in self.rollouts])
                self.taught.append([])
                self.distances.append([])
            self.taught[-1].append(inputs)
            logratio = (self.logprobs - inputs["old_per_token_logps"])[mask_of(inputs)]
            self.distances[-1].append(logratio.abs().max().item())
        return loss


def watched(folder, **flags):
    config = make_config(folder, minibatches=4, eval_interval=3, checkpoint_interval=100, learning_rate=1e-2, **flags)
    trainer = make_trainer(config, Watched)
    trainer.train()
    assert len(trainer.learners) == len(trainer.stored) == SMALL["iterations"]
    return trainer


@pytest.mark.parametrize(("epochs", "lag"), [(1, 0), (3, 0), (1, 2), (4, 3)])
def test_completions_are_as_old_as_buffer_and_lag_make_them(epochs, lag, tmp_path):
    trainer = watched(tmp_path, buffer_epochs=epochs, policy_lag=lag)
    old = 0
    for generation, (stored, taught) in enumerate(zip(trainer.stored, trainer.taught)):
        kept = range(max(0, generation - epochs + 1), generation + 1)  # the newest K rollouts
        versions = [[minibatch["version"] for minibatch in rollout] for rollout in stored]
        assert versions == [[max(0, number - lag)] * 4 for number in kept]
        ids = [id(minibatch) for rollout in stored for minibatch in rollout]
        assert len({id(minibatch) for minibatch in taught} & set(ids)) == len(taught) == 4  # and none of them twice
        old += sum(minibatch["version"] < versions[-1][0] for minibatch in taught)
    ages = {generation - minibatch["version"] for rollout in trainer.stored[-1] for minibatch in rollout}
    assert ages == set(range(lag, lag + epochs))
    assert old == 0 if epochs == 1 else 10 < old < 32  # of 40, where two or three of four are expected
    *_, newest = (entry for entry in trainer.state.log_history if "offpolicy/age_max" in entry)
    assert newest["offpolicy/age_max"] == lag + epochs - 1
    assert newest["offpolicy/age_mean"] == lag + (epochs - 1) / 2

    def distance(version, minibatch):
        trainer.model.load_state_dict(trainer.learners[version])
        with torch.no_grad():
            return log_ratios(trainer.model, minibatch)[mask_of(minibatch)].abs().max()

    for rollout in trainer.stored[-1]:
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


def test_what_the_trainer_cannot_do_is_refused(tmp_path, monkeypatch):
    for stale in ({"buffer_epochs": 2}, {"policy_lag": 1}):
        with pytest.raises(ValueError, match=r"^TRL stores log mu of old completions only if[^.]*\.$"):
            make_trainer(make_config(tmp_path, minibatches=1, **stale))
    make_trainer(make_config(tmp_path, minibatches=1))
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"^policy_lag swaps the weights of the model[^.]*\.$"):
        make_trainer(make_config(tmp_path, policy_lag=1))
    make_trainer(make_config(tmp_path, buffer_epochs=2))
    monkeypatch.undo()
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", lambda *_, **__: None)
    config = make_config(tmp_path, policy_lag=1)
    config.use_vllm, config.vllm_importance_sampling_mode = True, "token_truncate"
    with pytest.raises(ValueError, match=r"^policy_lag swaps the weights of the model[^.]*\.$"):
        make_trainer(config)


# ---------------------------------------------------- Command line ----------------------------------------------------
def script(folder, *flags) -> tuple[int, str]:
    """The script as a program, but in this process, which has imported TRL already: exit code and output."""
    output, handlers = io.StringIO(), {number: signal.getsignal(number) for number in (1, 2, 15)}
    sys.modules.pop("own", None)
    if "--resume" in flags:
        time.sleep(1 - time.time() % 1)  # TensorBoard's files are named by the second, and read in that order
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["gipo_trl.py", *map(str, flags)])
        patch.setattr(sys, "path", [*sys.path])
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                runpy.run_path(str(ROOT / "gipo_trl.py"), run_name="__main__")
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
    return code, output.getvalue()


@contextlib.contextmanager
def inherited(number, handler):
    """Start with this handler of a signal, though pytest may run in the background, where SIGINT is ignored."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def read_args(folder, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["gipo_trl.py", *map(str, flags)])
        return gipo_trl.read_args()


OWN = """
import os, signal
import huggingface_hub

calls = 0

def length(completions, **_):
    return [float(len(completion)) for completion in completions]

def stops(completions, **_):
    global calls
    calls += 1
    if calls == 5:  # the first is the evaluation before the first iteration
        os.kill(os.getpid(), signal.{signal})
    return length(completions)

def hurries(completions, **_):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    return length(completions)

def breaks(completions, **_):
    global calls
    calls += 1
    return [float("inf") if calls == 5 else value for value in length(completions)]

def weight(prompts, completions, weight, **_):
    print("telemetry is off:", huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY)
    return weight
"""


def place(folder, stop_signal="SIGINT"):
    """A working folder with a new model, and a module of rewards."""
    (folder / "own.py").write_text(OWN.replace("{signal}", stop_signal))
    transformers.set_seed(1)
    for part in gipo_trl.tiny_model():
        part.save_pretrained(folder / "model")
    return folder


SHORT = ["--model", "./model", "--prompts", 4, "--group", 4, "--eval-prompts", 8, "--eval-interval", 100]
SHORT += ["--minibatches", 2, "--learning-rate", 3e-3]


def newest_run(folder) -> Path:
    return max((folder / "runs").iterdir(), key=lambda path: int(path.name.split("__")[-1]))


def assert_same_end(run, other, step):
    """Two runs ended with the same weights, state of Adam and replay buffer."""
    one, two = (load_file(path / f"checkpoint-{step}" / "model.safetensors") for path in (run, other))
    assert all(tensor.equal(two[name]) for name, tensor in one.items())
    for file in ("optimizer.pt", "buffer-0.pt"):
        one, two = (torch.load(path / f"checkpoint-{step}" / file) for path in (run, other))
        for a, b in zip(leaves(one), leaves(two), strict=True):
            assert a.equal(b) if torch.is_tensor(a) else a == b


def leaves(tree):
    if isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(branch)
    else:
        yield tree


@pytest.mark.parametrize(("name", "epochs", "lag"), [("SIGINT", 3, 2), ("SIGTERM", 1, 0)])
def test_a_run_that_was_stopped_and_resumed_is_the_same_to_the_bit(name, epochs, lag, tmp_path):
    place(tmp_path, name)
    flags = [*SHORT, "--buffer-epochs", epochs, "--policy-lag", lag, "--iterations", 10]
    assert script(tmp_path, *flags, "--reward", "own:length")[0] == 0
    whole = newest_run(tmp_path)
    with inherited(getattr(signal, name), signal.SIG_DFL):
        code, output = script(tmp_path, *flags, "--reward", "own:stops")
    stopped = newest_run(tmp_path)
    assert code == 128 + getattr(signal, name) and f"--resume {stopped.relative_to(tmp_path)} goes on" in output
    assert output.count("\nstops after this iteration; once more ends the program at once\n") == 1
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-8"]  # of 2 steps in each iteration
    code, output = script(tmp_path, "--resume", stopped, "--reward", "own:length")
    assert code == 0 and "goes on after iteration 4" in output
    assert_same_end(whole, stopped, 20)
    for tag in ("charts/episodic_return", "offpolicy/age_mean", "losses/kl"):
        one, two = ([(e.step, e.value) for e in logged(run).Scalars(tag)] for run in (whole, stopped))
        assert one == two and [step for step, _ in one] == list(range(1, 11))


def test_a_checkpoint_that_was_not_finished_is_not_used(tmp_path, monkeypatch):
    flags = [*SHORT, "--reward", "own:length", "--buffer-epochs", 2, "--checkpoint-interval", 2, "--iterations", 6]
    assert script(place(tmp_path), *flags)[0] == 0
    whole, save = newest_run(tmp_path), GRPOTrainer._save_checkpoint

    def die(self, *args):
        save(self, *args)
        if self.state.global_step == 12:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GRPOTrainer, "_save_checkpoint", die)
        script(tmp_path, *flags)
    run = newest_run(tmp_path)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-12"}
    code, output = script(tmp_path, "--resume", run)
    assert code == 0 and "goes on after iteration 4" in output
    assert_same_end(whole, run, 12)
    assert [event.step for event in logged(run).Scalars("losses/kl")] == list(range(1, 7))

    assert read_args(tmp_path, "--resume", run, "--iterations", 9)[1] == run / "checkpoint-12"  # 8 < 12 as numbers
    for path in run.glob("checkpoint-*/buffer-0.pt"):
        path.unlink()
    code, output = script(tmp_path, "--resume", run)
    assert code == 2 and "has no checkpoint of this script" in output


def test_flags_given_anew_hold_and_the_others_stay(tmp_path):
    flags = ["--reward", "own:length", "--sigma", 0.7, "--kl-coef", 0.2, "--buffer-epochs", 3, "--iterations", 3]
    assert script(place(tmp_path), *SHORT, *flags)[0] == 0
    run = newest_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for anew in ([], ["--iterations", 2], ["--iterations", 3, "--sigma", 0.3]):
        code, output = script(tmp_path, "--resume", run, *anew)
        assert code == 2 and output.splitlines()[-1] == "error: --iterations: give more than 3."
    code, output = script(tmp_path, "--resume", run, "--iterations", 5, "--minibatches", 4)
    assert code == 2 and output == "error: --minibatches: give 2, as before.\n"
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    anew = ["--iterations", 5, "--sigma", 0.3, "--buffer-epochs", 2, "--exp-name", "other"]
    assert script(tmp_path, "--resume", run, *anew)[0] == 0
    assert newest_run(tmp_path) == run
    args = json.loads((run / "args.json").read_text())
    held = {"iterations": 5, "sigma": 0.3, "buffer_epochs": 2, "exp_name": "other", "kl_coef": 0.2, "minibatches": 2}
    assert args == args | held
    ages = [(event.step, event.value) for event in logged(run).Scalars("offpolicy/age_max")]
    assert ages == [(1, 0), (2, 1), (3, 2), (4, 1), (5, 1)]
    args, checkpoint = read_args(tmp_path, "--evaluate", run)
    assert args.kl_coef == 0.2 and checkpoint.name == "checkpoint-10"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path):
    flags = [*SHORT, "--reward", "own:hurries", "--iterations", 10]
    output = start(place(tmp_path), *flags, code=-signal.SIGINT)
    assert output.endswith("\nstops after this iteration; once more ends the program at once\n")


@pytest.mark.slow
def test_it_runs_on_windows_which_has_no_sighup(tmp_path):
    code = "import runpy, signal, sys; del signal.SIGHUP, sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = [*SHORT, "--reward", "own:length", "--iterations", 1]
    output = start(place(tmp_path), *flags, program=("-c", code, ROOT / "gipo_trl.py"))
    assert "iteration 1: mean reward" in output


@pytest.mark.parametrize(("variable", "expected"), [(None, [1]), ("2", [])])
def test_torch_has_one_thread_unless_the_environment_says_otherwise(variable, expected, tmp_path, monkeypatch):
    """Two runs with torch's own number wait for each other."""
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    code, _ = script(place(tmp_path), *SHORT, "--reward", "own:length", "--iterations", 1)
    assert code == 0 and found == expected


def test_a_run_that_ignores_the_closing_of_its_terminal_goes_on(tmp_path):
    with inherited(signal.SIGHUP, signal.SIG_IGN):  # as from nohup
        code, _ = script(place(tmp_path, "SIGHUP"), *SHORT, "--reward", "own:stops", "--iterations", 5)
    assert code == 0


@pytest.mark.parametrize("what", ["reward", "loss"])
def test_a_run_that_went_wrong_stops_with_a_sentence_and_keeps_its_checkpoint(what, tmp_path, monkeypatch):
    flags = [*SHORT, "--iterations", 10, "--checkpoint-interval", 1, "--reward"]
    compute_loss = GRPOTrainer._compute_loss

    def broken(self, model, inputs):
        return compute_loss(self, model, inputs) * (math.nan if self.state.global_step == 7 else 1)

    if what == "loss":
        monkeypatch.setattr(GRPOTrainer, "_compute_loss", broken)
    code, output = script(place(tmp_path), *flags, "own:breaks" if what == "reward" else "own:length")
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert code == 1 and re.search(rf"'{what}'.* not finite in iteration 4; \S+ keeps its checkpoint\.$", error)
    run = newest_run(tmp_path)
    _, checkpoint = read_args(tmp_path, "--resume", run)
    assert checkpoint.name == "checkpoint-6"
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
    monkeypatch.undo()
    assert script(tmp_path, "--resume", run, "--reward", "own:length")[0] == 0


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


BAD = {
    "--sigma 0.0: give": ["--sigma", 0],
    "--sigma-neg 11.0: give": ["--sigma-neg", 11],
    "--kl-coef nan: give": ["--kl-coef", "nan"],
    "--kl-coef -0.1: give": ["--kl-coef", -0.1],
    "--learning-rate inf: give": ["--learning-rate", "inf"],
    "--minibatches 3: give a divisor": ["--minibatches", 3],
    "--minibatches 1: give a divisor of --prompts x --group, 256, and >= 2": [
        "--minibatches",
        1,
        "--buffer-epochs",
        2,
    ],
    "of --prompts x --group, 256, and >= 2": ["--minibatches", 1, "--policy-lag", 1],
    "--group 1: give": ["--group", 1],
    "--iterations 0: give": ["--iterations", 0],
    "--seed -1: give": ["--seed", -1],
    "--data nowhere.jsonl: ": ["--data", "nowhere.jsonl"],
    "--data own.py: ": ["--data", "own.py"],
    "--data short.jsonl: 3 rows; give 40": ["--data", "short.jsonl", "--eval-prompts", 8],
    "--data answerless.jsonl: ": ["--data", "answerless.jsonl"],
    "--data numbers.jsonl: prompt and answer must be strings": ["--data", "numbers.jsonl"],
    "--data lists.jsonl: ": ["--data", "lists.jsonl"],
    "--data empty.jsonl: 0 rows": ["--data", "empty.jsonl"],
    "--data mixed.jsonl: ": ["--data", "mixed.jsonl", "--eval-prompts", 8, "--prompts", 4],
    "--reward nomodule:f: give exact or module:function": ["--reward", "nomodule:f"],
    "--reward exact2: give exact or module:function": ["--reward", "exact2"],
    "--reward own:nothing: ": ["--reward", "own:nothing"],
    "--model ./nowhere: ": ["--model", "./nowhere"],
    "nowhere has no checkpoint of this script": ["--resume", "nowhere"],
    "runs-of-others has no checkpoint of this script": ["--evaluate", "runs-of-others"],
}


def test_a_mistake_is_one_sentence_and_starts_no_run(tmp_path):
    place(tmp_path)
    rows = gipo_trl.sorting(3, random.Random(1))
    write_rows(tmp_path / "short.jsonl", rows)
    write_rows(tmp_path / "answerless.jsonl", [*rows, {"prompt": "1="}])
    write_rows(tmp_path / "numbers.jsonl", [{"prompt": "1=", "answer": 1}])
    write_rows(tmp_path / "lists.jsonl", [["1=", "1"]])
    write_rows(tmp_path / "empty.jsonl", [])
    write_rows(tmp_path / "mixed.jsonl", [row | {"note": note} for row in rows * 4 for note in (1, "one")])
    (tmp_path / "runs-of-others").mkdir()
    for words, flags in BAD.items():
        code, output = script(tmp_path, *flags)
        (line,) = output.splitlines()
        assert code == 2 and line.startswith("error: ") and words in line, (flags, output)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    place(tmp_path)
    code, output = script(tmp_path, "--exp-name", 300 * "x")
    assert code == 2 and "cannot be written" in output and "Traceback" not in output
    (tmp_path / "runs").rmdir()
    (tmp_path / "runs").touch()
    code, output = script(tmp_path)
    assert code == 2 and "cannot be written" in output and "Traceback" not in output


def test_flags_reach_the_trainer(tmp_path):
    flags = {"seed": 5, "temperature": 0.7, "learning_rate": 1e-3, "sigma": 0.4, "sigma_neg": 0.2, "kl_coef": 0.3}
    flags |= {"buffer_epochs": 3, "policy_lag": 2}
    config = vars(make_config(tmp_path, max_new_tokens=5, **flags))
    lengths = {"max_completion_length": 5, "num_generations": 4, "generation_batch_size": 16, "max_steps": 20}
    assert config == config | flags | lengths
    assert config["disable_dropout"]  # or fresh completions would look old


def test_a_seed_gives_one_model_and_another_seed_another(tmp_path, monkeypatch):
    found = []

    def stop(parameters, **_):
        found.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        sys.exit()

    monkeypatch.setattr(torch.optim, "AdamW", stop)  # of the warm-up, before its first step
    for seed in (1, 1, 2):
        assert script(tmp_path, "--seed", seed) == (0, "")
    assert found[0].equal(found[1]) and not found[1].equal(found[2])


@pytest.fixture(scope="module")
def own_task(tmp_path_factory):
    """A run on data and a reward of one's own, as a process: its folder and output."""
    folder = place(tmp_path_factory.mktemp("own"))
    rows = gipo_trl.sorting(24, random.Random(1))
    write_rows(folder / "task.jsonl", [row | {"weight": 1.0 if i < 8 else 3.0} for i, row in enumerate(rows)])
    flags = [*SHORT, "--data", "task.jsonl", "--reward", "own:weight", "--iterations", 2, "--exp-name", "a:b/c d"]
    return folder, start(folder, *flags)


def start(folder, *flags, program=(ROOT / "gipo_trl.py",), code=0) -> str:
    command = [sys.executable, *map(str, program), *map(str, flags)]
    dropped = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    with inherited(signal.SIGINT, signal.SIG_DFL):
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        found = subprocess.run(command, cwd=folder, env=env, **output)
    assert found.returncode == code and "Traceback" not in found.stdout, found.stdout
    return found.stdout


@pytest.mark.slow
def test_data_and_reward_of_one_s_own_are_learned_from(own_task):
    folder, output = own_task
    (run,) = (folder / "runs").iterdir()
    assert re.fullmatch(r"task__a-b-c-d__1__\d+", run.name)
    assert "iteration 2: mean reward 1.000 on held-out prompts" in output  # the first rows of the file
    assert [(event.step, event.value) for event in logged(run).Scalars("charts/episodic_return")] == [(1, 3), (2, 3)]
    code, output = script(folder, "--resume", run, "--iterations", 3)
    assert code == 0 and "goes on after iteration 2" in output
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}
    code, output = script(folder, "--evaluate", run)
    assert code == 0 and "mean reward 1.000 on 8 held-out prompts\n" in output
    assert files == {path: path.stat().st_mtime_ns for path in files} and len(list((folder / "runs").iterdir())) == 1


@pytest.mark.slow
def test_telemetry_is_off_unless_it_is_asked_for(own_task):
    found = re.findall("telemetry is off: (.*)", own_task[1])
    assert found and set(found) == {"True"}


@pytest.mark.slow
def test_a_tiny_model_learns_to_sort(tmp_path):
    output = start(tmp_path, "--iterations", 120, "--eval-interval", 40)
    (run,) = (tmp_path / "runs").iterdir()
    curves = logged(run)
    evaluations = curves.Scalars("eval/episodic_return")
    assert [event.step for event in evaluations] == [0, 40, 80, 120]
    first, *_, last = (event.value for event in evaluations)
    assert 0.5 < first < 0.9 <= last and last - first > 0.05, output
    assert f"iteration 120: mean reward {last:.3f} on held-out prompts" in output
    groups = {"charts": 3, "losses": 5, "offpolicy": 6, "eval": 1}
    tags = curves.Tags()["scalars"]
    assert {group: sum(tag.startswith(f"{group}/") for tag in tags) for group in groups} == groups
    assert all(math.isfinite(event.value) for tag in tags for event in curves.Scalars(tag))
    code, output = script(tmp_path, "--evaluate", run)
    assert code == 0 and abs(float(re.search(r"mean reward ([\d.]+) on 256", output)[1]) - last) < 0.05


def test_a_learning_rate_given_anew_holds(tmp_path):
    assert script(place(tmp_path), *SHORT, "--reward", "own:length", "--iterations", 2)[0] == 0
    run = newest_run(tmp_path)
    assert script(tmp_path, "--resume", run, "--iterations", 4, "--learning-rate", 1e-4)[0] == 0
    rates = [event.value for event in logged(run).Scalars("charts/learning_rate")]
    assert rates[0] > 1e-3 and len(rates) == 4
    assert rates[3] == pytest.approx(1e-4 / 8)  # one of eight steps is left


@pytest.mark.parametrize("surrogate", ["gipo", "clip"])
def test_a_minibatch_without_a_token_to_learn_from_teaches_nothing(surrogate, tmp_path):
    """All its completions are too long, and TRL's mask_truncated_completions is set."""
    trainer = make_trainer(make_config(tmp_path, surrogate=surrogate))
    minibatch = record(trainer)[0]
    minibatch["completion_mask"] = torch.zeros_like(minibatch["completion_mask"])
    loss = trainer._compute_loss(trainer.model, minibatch)
    assert loss == 0 and (gradients(loss, trainer.model) == 0).all()


def test_fresh_completions_without_a_reward_teach_nothing(tmp_path):
    trainer = make_trainer(make_config(tmp_path, kl_coef=0.3))
    trainer.reward_funcs = [lambda completions, **_: [1.0] * len(completions)]
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer._compute_loss(trainer.model, trainer.drawn[0])
    assert gradients(loss, trainer.model).abs().max() < 1e-5


def test_ages_are_true_after_the_lag_was_raised(tmp_path):
    assert script(place(tmp_path), *SHORT, "--reward", "own:length", "--iterations", 3)[0] == 0
    run = newest_run(tmp_path)
    assert script(tmp_path, "--resume", run, "--iterations", 7, "--policy-lag", 2)[0] == 0
    ages = [event.value for event in logged(run).Scalars("offpolicy/age_max")]
    assert ages == [0, 0, 0, 0, 1, 2, 2]


def test_a_lag_given_up_and_taken_again_starts_anew(tmp_path):
    flags = ["--reward", "own:length", "--iterations", 3, "--policy-lag", 2]
    assert script(place(tmp_path), *SHORT, *flags)[0] == 0
    run = newest_run(tmp_path)
    assert script(tmp_path, "--resume", run, "--iterations", 4, "--policy-lag", 0)[0] == 0
    assert torch.load(run / "checkpoint-8" / "buffer-0.pt")["policies"] == []


def test_vllm_s_ratios_of_whole_completions_are_refused(tmp_path, monkeypatch):
    """One ratio of a completion is none of its tokens'."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", lambda *_, **__: None)
    config = gipo_trl.GIPOConfig(str(tmp_path), bf16=False, use_vllm=True)
    assert config.vllm_importance_sampling_mode.startswith("sequence")
    with pytest.raises(ValueError, match=r"^GIPO needs token_truncate or token_mask[^.]*\.$"):
        make_trainer(config)


def test_a_changed_copy_of_the_settings_keeps_the_loss(tmp_path):
    config = replace(make_config(tmp_path), sigma=1.0, generation_batch_size=None)
    assert config.loss_type == "gipo"
    trainer = make_trainer(config)
    logratio = torch.tensor([[0.5]])
    weighed = {"advantages": torch.ones(1, 1), "log_ratio_per_token": logratio, "importance_sampling_ratio": None}
    assert trainer.get_gamma_weights(mask=None, **weighed).item() == pytest.approx(math.exp(0.5 - 0.5**3))
