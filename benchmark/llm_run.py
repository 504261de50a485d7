"""One run of the language models' study: sorting digits with TRL's asynchronous trainer and stale completions.

    python benchmark/llm_run.py --loss gipo --staleness 32 --learning-rate 1e-4

The model has seen the task; about half of its completions are right. The score is the reward of the policy that has
learned, on prompts that it has not seen.
"""

import contextlib
import json
import os
import random
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
import tyro
from datasets import Dataset
from torch.utils.tensorboard import SummaryWriter
from trl import GRPOTrainer

from benchmark.cpu_sampler import Sampler, use_cpu
from gipo_trl import exact, gipo_coefficient, sorting, tiny_model, warm_up
from gipo_trl_async import AsyncGIPOConfig, AsyncGIPOTrainer

ROOT = Path(__file__).parents[1]
LENGTHS = {"shortest": 6, "longest": 9}  # digits
PROMPTS, GROUP = 8, 8  # completions of a step
HELD_OUT = 2048
VESPO = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}  # TRL's defaults


@dataclass
class Args:
    loss: Literal["gipo", "clip", "sapo", "cispo", "vespo", "none"] = "gipo"
    """none takes old completions as if they were fresh"""
    sigma: float = 0.5
    """gipo: width of the weight"""
    epsilon: float = 0.2
    """clip: distance of the ratio from 1"""
    sapo_tau: float = 1.0
    """sapo: temperature of the gate, 1.05 times that where the advantage is not positive"""
    kl_coef: float = 0.1
    """weight of KL(mu || pi), for every loss"""
    learning_rate: float = 1e-4
    """constant step size of Adam"""
    staleness: int = 0
    """steps for which a completion waits in the queue"""
    seed: int = 1
    """seed of the model, the prompts and the completions"""
    total_timesteps: int = 240
    """gradient steps, each on 64 completions"""
    warm_up: int = 300
    """supervised steps before"""


class Study(AsyncGIPOTrainer):
    """GIPO, or another loss in its place."""

    study: Args

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.completion = inputs["segment_id"][inputs["token_index"] >= 0]  # of each token
        return super().compute_loss(model, inputs, *args, **kwargs)

    def token_losses(self, logratio, advantages):
        args, x = self.study, logratio.detach()
        ratio = x.clamp(max=20).exp()
        positive = advantages > 0
        if args.loss == "gipo":
            coef = gipo_coefficient(x, args.sigma)
        elif args.loss == "clip":
            coef = ratio * torch.where(positive, ratio <= 1 + args.epsilon, ratio >= 1 - args.epsilon)
        elif args.loss == "sapo":
            tau = torch.where(positive, args.sapo_tau, 1.05 * args.sapo_tau)
            coef = ratio / torch.cosh(0.5 * tau * (ratio - 1)) ** 2
        elif args.loss == "cispo":
            coef = ratio.clamp(max=5.0)
        elif args.loss == "vespo":
            coef = self.vespo_coefficient(x, advantages)
        else:
            coef = torch.ones_like(x)
        return -coef * advantages * logratio, coef

    def vespo_coefficient(self, logratio, advantages):
        """TRL's weight of each completion, for each of its tokens."""
        n = int(self.completion.max()) + 1
        total = torch.zeros(n).index_add_(0, self.completion, logratio)
        advantage = torch.zeros(n).index_copy_(0, self.completion, advantages)
        column = {"advantages": advantage.unsqueeze(1), "log_ratio_per_token": total.unsqueeze(1)}
        found = GRPOTrainer.get_gamma_weights(**column, mask=torch.ones(n, 1), importance_sampling_ratio=None, **VESPO)
        return found.squeeze(1)[self.completion]


class Log(transformers.TrainerCallback):
    """Writes the tags of the other scripts."""

    def __init__(self, writer):
        self.writer = writer

    def on_log(self, args, state, control, logs, **kwargs):
        tags = {"reward": "charts/episodic_return", "sample/staleness_mean": "offpolicy/age_mean"}
        for name, value in logs.items():
            tag = tags.get(name, name)
            if tag.startswith(("charts/", "losses/", "offpolicy/")):
                self.writer.add_scalar(tag, value, state.global_step)


def warm_start(args) -> Path:
    """A folder with a model that has seen the task; all runs of a seed share it."""
    folder = ROOT / "runs" / "warm-up" / f"{args.seed}-{args.warm_up}"
    if not folder.exists():
        transformers.set_seed(args.seed)
        model, tokenizer = tiny_model()
        warm_up(model, tokenizer, random.Random(f"warm-up {args.seed}"), args.warm_up, **LENGTHS)
        own = folder.with_name(f"{folder.name}-{os.getpid()}")
        model.save_pretrained(own)
        tokenizer.save_pretrained(own)
        with contextlib.suppress(OSError):  # another run was first
            own.rename(folder)
    return folder


def main(args: Args):
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    use_cpu()
    folder = Path("runs", f"sorting__{args.loss}__{args.seed}__{time.time_ns()}")
    folder.mkdir(parents=True)
    flags = asdict(args) | {"env_id": "sorting"}
    (folder / "args.json").write_text(json.dumps(flags))
    start = warm_start(args)
    rng = random.Random(f"prompts {args.seed}")
    held_out = sorting(HELD_OUT, rng, **LENGTHS)
    rows = sorting(PROMPTS * (args.total_timesteps + args.staleness + 2), rng, **LENGTHS)
    batch, longest = PROMPTS * GROUP, LENGTHS["longest"] + 2
    sampler = Sampler(start, rows, exact, PROMPTS, GROUP, longest, args.staleness * batch)
    config = AsyncGIPOConfig(
        str(folder),
        sigma=args.sigma,
        kl_coef=args.kl_coef,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        max_steps=args.total_timesteps,
        per_device_train_batch_size=batch,
        num_generations=GROUP,
        max_completion_length=longest,
        token_budget=-1,
        max_staleness=10**6,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        seed=args.seed,
    )
    trainer = Study(
        str(start),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(start),
        rollout_worker=sampler,
        weight_transfer=sampler,
    )
    trainer.study = args
    with SummaryWriter(folder) as writer:
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(Log(writer))
        *_, before = sampler.score(held_out)
        trainer.train()
        sampler.send_weights(trainer.model.named_parameters())
        *_, after = sampler.score(held_out)
        for tag, rewards in (("eval/start", before), ("eval/episodic_return", after)):
            writer.add_scalar(tag, sum(rewards) / len(rewards), args.total_timesteps)
            print(f"{tag} {sum(rewards) / len(rewards):.3f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
