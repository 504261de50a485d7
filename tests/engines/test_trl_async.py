"""GIPO on TRL's asynchronous trainer, with a sampler on the CPU: exact attention and losses, true staleness.

Needs the environment of requirements-trl.txt, and is skipped elsewhere.
"""

import os
import random
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="needs the environment of requirements-trl.txt")

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from test_trl import drift, gradients
from trl import GRPOTrainer
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

import gipo_trl
from benchmark import llm_run
from benchmark.cpu_sampler import Sampler, packed_attention, use_cpu
from gipo_trl import sorting
from gipo_trl_async import AsyncGIPOConfig, AsyncGIPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
FLAGS = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1, "max_steps": 6}
FLAGS |= {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 8, "token_budget": -1}
FLAGS |= {"gradient_checkpointing": False, "max_staleness": 10**6, "disable_tqdm": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A new tiny model."""
    use_cpu()
    found = tmp_path_factory.mktemp("model")
    transformers.set_seed(1)
    for part in gipo_trl.tiny_model():
        part.save_pretrained(found)
    return found


def length(completions, **_):
    return [float(len(completion)) for completion in completions]


def make_trainer(folder, waiting=0, kind=AsyncGIPOTrainer, study=None, **flags):
    transformers.set_seed(1)
    rows = sorting(400, random.Random(1))
    sampler = Sampler(folder, rows, length, prompts=4, group=4, max_new_tokens=8, waiting=waiting)
    settings = AsyncGRPOConfig if kind is AsyncGRPOTrainer else AsyncGIPOConfig
    trainer = kind(
        str(folder),
        args=settings(str(folder / "out"), **FLAGS | flags),
        train_dataset=gipo_trl.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        rollout_worker=sampler,
        weight_transfer=sampler,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.study = study
    return trainer


def stale_batch(trainer):
    """A batch of the sampler, and a learner that has drifted from it."""
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    drift(trainer.model, 0.1)
    return batch


def by_hand(trainer, batch):
    """Log-ratios and advantages of all tokens, by the stock forward pass over each completion alone."""
    plain = transformers.AutoModelForCausalLM.from_config(trainer.model.config, attn_implementation="eager")
    plain.load_state_dict(trainer.model.state_dict())
    ratios, advantages = [], []
    for sample in trainer.given:
        ids = torch.tensor(sample.input_ids)
        logprobs = plain(ids.unsqueeze(0)).logits[0, :-1].log_softmax(-1).gather(1, ids[1:].unsqueeze(1)).squeeze(1)
        chosen = torch.tensor(sample.completion_mask[1:]).bool()
        ratios.append((logprobs - torch.tensor(sample.old_log_probs[1:]))[chosen])
        advantages += [sample.advantage] * int(chosen.sum())
    return plain, torch.cat(ratios), torch.tensor(advantages)


@pytest.fixture
def stale(folder):
    """A trainer, its batch, and what the sampler gave."""

    def make(**kwargs):
        trainer = make_trainer(folder, **kwargs)
        trainer.given, take = [], trainer.rollout_worker.get

        def get(timeout=None):
            trainer.given.append(take())
            return trainer.given[-1]

        trainer.rollout_worker.rollout_buffer.get = get
        batch = stale_batch(trainer)
        trainer.given = trainer.given[:16]
        return trainer, batch

    return make


def test_packed_attention_is_that_of_each_sequence_alone():
    torch.manual_seed(1)
    lengths_q, lengths_k = [3, 1, 5], [7, 4, 5]
    q, k, v = (torch.randn(sum(n), heads, 8) for n, heads in ((lengths_q, 4), (lengths_k, 2), (lengths_k, 2)))
    ends_q, ends_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k))
    found = packed_attention(q, k, v, ends_q, ends_k, 5, 7, softmax_scale=0.3)
    for i, (n, m) in enumerate(zip(lengths_q, lengths_k)):
        own_q, own_k, own_v = q[ends_q[i] :][:n], k[ends_k[i] :][:m], v[ends_k[i] :][:m]
        for j in range(n):
            seen = m - n + j + 1
            keys, values = (x[:seen].repeat_interleave(2, 1) for x in (own_k, own_v))
            weights = (torch.einsum("hd,khd->hk", own_q[j], keys) * 0.3).softmax(1)
            expected = torch.einsum("hk,khd->hd", weights, values)
            torch.testing.assert_close(found[ends_q[i] + j], expected, atol=1e-5, rtol=1e-5)


def test_the_gradient_is_the_formula_s_by_the_stock_forward_pass(stale):
    trainer, batch = stale(sigma=0.4, kl_coef=0.3)
    own = gradients(trainer.compute_loss(trainer.model, batch), trainer.model)
    plain, logratio, advantages = by_hand(trainer, batch)
    assert logratio.abs().max() > 0.5 and advantages.min() < 0 < advantages.max()
    x = logratio.detach()
    slope = -(x - 0.5 * (x / 0.4) ** 2).exp() * advantages + 0.3 * (x.clamp(max=2).exp() - 1)
    expected = gradients((slope * logratio).mean(), plain)
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-3)
    assert expected.abs().max() > 1e-2
    logged = {tag: values[-1] for tag, values in trainer._metrics["train"].items()}
    assert logged["losses/kl"] == pytest.approx(-x.mean().item(), abs=1e-5)
    assert logged["offpolicy/coef_mean"] == pytest.approx((x - 0.5 * (x / 0.4) ** 2).exp().mean().item(), abs=1e-4)
    assert "clip_ratio/region_mean" in logged  # TRL's own log is complete


def test_the_clip_of_the_study_is_trl_s_own_loss(folder, stale):
    trainer, batch = stale(kind=llm_run.Study, study=llm_run.Args(loss="clip", epsilon=0.2), kl_coef=0.0)
    own = gradients(trainer.compute_loss(trainer.model, batch), trainer.model)
    theirs = make_trainer(folder, kind=AsyncGRPOTrainer, epsilon=0.2)
    theirs.model.load_state_dict(trainer.model.state_dict())
    theirs.current_gradient_accumulation_steps = 1
    expected = gradients(theirs.compute_loss(theirs.model, batch), theirs.model)
    torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-4)
    assert expected.abs().max() > 1e-2


def study_slopes(loss, x, advantages, **flags):
    """-d loss / d logratio / A of each token."""
    study = SimpleNamespace(study=llm_run.Args(loss=loss, **flags), completion=torch.arange(len(x)))
    study.vespo_coefficient = lambda *args: llm_run.Study.vespo_coefficient(study, *args)
    leaf = x.clone().requires_grad_()
    losses, coef = llm_run.Study.token_losses(study, leaf, advantages)
    (slope,) = torch.autograd.grad(losses.sum(), leaf)
    torch.testing.assert_close(coef, -slope / advantages)
    return coef


def test_the_losses_of_the_study_have_the_gradients_of_their_formulas():
    x, advantages = torch.tensor([-1.5, -0.3, 0.0, 0.1, 0.3, 1.5]), torch.tensor([1.0, -1, 1, -1, 1, -1])
    ratio = x.exp()
    assert study_slopes("none", x, advantages).equal(torch.ones(6))
    torch.testing.assert_close(study_slopes("cispo", x + 1, advantages), (x + 1).exp().clamp(max=5))
    torch.testing.assert_close(study_slopes("gipo", x, advantages, sigma=0.7), ratio * (-(x**2) / 0.98).exp())
    leaf = x.clone().requires_grad_()
    tau = torch.where(advantages > 0, 0.8, 0.84)
    (slope,) = torch.autograd.grad((4 / tau * torch.sigmoid(tau * (leaf.exp() - 1))).sum(), leaf)  # SAPO's gate
    torch.testing.assert_close(study_slopes("sapo", x, advantages, sapo_tau=0.8), slope)


def test_vespo_weighs_whole_completions_as_trl_does():
    x, completion = torch.tensor([0.2, -0.1, 0.4, 0.3, -0.5]), torch.tensor([0, 0, 1, 1, 1])
    study = SimpleNamespace(completion=completion)
    found = llm_run.Study.vespo_coefficient(study, x, torch.tensor([1.0, 1, -2, -2, -2]))
    rows = torch.tensor([[0.2, -0.1, 0.0], [0.4, 0.3, -0.5]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    expected = GRPOTrainer.get_gamma_weights(torch.tensor([[1.0], [-2]]), rows, mask, None)
    torch.testing.assert_close(found, expected.squeeze(1)[completion])


@pytest.mark.parametrize("steps", [0, 3])
def test_completions_are_as_stale_as_the_queue_makes_them(steps, folder):
    trainer = make_trainer(folder, waiting=16 * steps, learning_rate=1e-2, max_steps=8)
    trainer.train()
    found = [entry["sample/staleness_mean"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(found) <= steps + 1 and found[-1] >= steps and (steps or found[0] == 0)  # a batch is fetched ahead
    distance = [e["offpolicy/abs_logratio_p95"] for e in trainer.state.log_history if "loss" in e]
    assert distance[0] < 1e-3 and distance[-1] > (0.02 if steps else 1e-4)
    # the sampler has the learner's weights
    own = dict(trainer.model.named_parameters())
    assert all(own[name].equal(weight) for name, weight in trainer.rollout_worker.model.named_parameters())


def test_a_seeded_run_repeats(folder):
    one, two = (make_trainer(folder, waiting=16, learning_rate=1e-2) for _ in range(2))
    for trainer in (one, two):
        transformers.set_seed(3)
        trainer.train()
    assert all(a.equal(b) for a, b in zip(one.model.parameters(), two.model.parameters()))


def test_completions_end_with_the_first_end_of_sequence(folder):
    sampler = Sampler(folder, sorting(8, random.Random(1)), length, prompts=4, group=4, max_new_tokens=8, waiting=0)
    transformers.set_seed(1)
    found = [sampler.get() for _ in range(64)]
    for sample in found:
        completion = sample.input_ids[sample.completion_mask == 1].tolist()
        assert 1 not in completion[:-1] and (len(completion) == 8 or completion[-1] == 1)
        assert (sample.old_log_probs[sample.completion_mask == 0] == 0).all()
        logits = sampler.model(torch.tensor([sample.input_ids])).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(sample.input_ids[1:]).unsqueeze(1)).squeeze(1)
        chosen = sample.completion_mask[1:] == 1
        assert abs(expected.detach().numpy() - sample.old_log_probs[1:])[chosen].max() < 1e-4
    assert len({len(sample.input_ids) for sample in found}) > 4


def test_settings_are_checked(folder):
    with pytest.raises(ValueError, match=r"^sigma 0: give"):
        AsyncGIPOConfig(str(folder), sigma=0)
    with pytest.raises(ValueError, match=r"^kl_coef -1: give"):
        AsyncGIPOConfig(str(folder), kl_coef=-1)
    with pytest.raises(ValueError, match="give an AsyncGIPOConfig"):
        AsyncGIPOTrainer(str(folder), args=AsyncGRPOConfig(str(folder), bf16=False))


@pytest.mark.slow
def test_a_run_of_the_study_writes_what_the_benchmark_reads(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llm_run, "ROOT", tmp_path)
    monkeypatch.setattr(llm_run, "HELD_OUT", 64)
    llm_run.main(llm_run.Args(total_timesteps=20, staleness=2, warm_up=20))
    (run,) = (tmp_path / "runs").glob("sorting__*")
    curves = EventAccumulator(str(run), {"scalars": 0}).Reload()
    tags = set(curves.Tags()["scalars"])
    assert {"charts/episodic_return", "eval/episodic_return", "eval/start", "offpolicy/age_mean"} <= tags
    assert {"offpolicy/abs_logratio_p95", "offpolicy/ess", "offpolicy/coef_mean"} <= tags
    assert 1 < curves.Scalars("offpolicy/age_mean")[-1].value <= 3
