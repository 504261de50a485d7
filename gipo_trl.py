"""GIPO for language models: TRL's GRPO with a Gaussian weight instead of its clip, to learn from old completions too.

    loss = -mean(w * r * A) + kl_coef * KL(mu || pi),  r = pi(token) / mu(token),  w = exp(-(log r)^2 / (2 sigma^2))

mu is the policy that wrote the completion. Each token has its own ratio; A is the advantage of its completion within
the group of its prompt. The KL term pulls pi back towards mu; it is estimated by mean(r - 1 - log r). No gradient flows
through w. (Lu et al. 2026, arXiv:2603.03955)

    pip install -r requirements-trl.txt             # in its own virtual environment
    python gipo_trl.py                              # a tiny model learns to sort digits; downloads nothing
    python gipo_trl.py --buffer-epochs 8            # learn from the completions of the last 8 generations
    python gipo_trl.py --model PATH_OR_ID --data FILE.jsonl --reward module:function --max-new-tokens 256
    python gipo_trl.py --resume runs/RUN            # go on; or --evaluate runs/RUN
    tensorboard --logdir runs

In your own script, use GIPOConfig and GIPOTrainer instead of GRPOConfig and GRPOTrainer. Import them from here,
or copy the sections Loss and Trainer with their imports.
"""

import contextlib
import json
import math
import os
import pkgutil
import random
import re
import signal
import sys
import time
import warnings
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would report each run

import torch
import transformers
import tyro
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.tensorboard import SummaryWriter
from trl import GRPOConfig, GRPOTrainer


# -------------------------------------------------------- Loss --------------------------------------------------------
def gipo_coefficient(logratio, advantages, args):
    """The importance ratio times a Gaussian in its logarithm: the c of each token, whose gradient is -c A grad log pi.

    logratio = log pi - log mu is (B, T), advantages are (B, 1). c is at most exp(sigma^2 / 2), so it cannot overflow.
    """
    z = torch.where(advantages > 0, logratio / args.sigma, logratio / (args.sigma_neg or args.sigma))
    return torch.exp(logratio - 0.5 * z**2)


def trl_coefficient(logratio, advantages, args):
    """The same c for TRL's own token-level losses and its default options; only for the log."""
    ratio = logratio.clamp(max=20).exp()  # float32 ends at exp(88)
    positive = advantages > 0
    if args.loss_type == "cispo":
        return ratio.clamp(max=args.epsilon_high or args.epsilon)
    if args.loss_type == "sapo":
        tau = torch.where(positive, args.sapo_temperature_pos, args.sapo_temperature_neg)
        return ratio / torch.cosh(0.5 * tau * (ratio - 1)) ** 2
    # 0 where the clip cuts the gradient off
    return ratio * torch.where(positive, ratio <= 1 + (args.epsilon_high or args.epsilon), ratio >= 1 - args.epsilon)


def diagnostics(logratio, coef):
    """Scalars: how far pi is from the policies that wrote the tokens (n,), and how many still have a gradient."""
    ratio = logratio.clamp(max=20).exp()
    weight = coef.abs() / coef.abs().max().clamp(min=1e-38)  # at most 1, so that its square cannot overflow
    return {
        "losses/kl": -logratio.mean(),
        "losses/approx_kl": (ratio - 1 - logratio).mean(),
        "losses/clipfrac": ((ratio - 1).abs() > 0.2).float().mean(),
        # kthvalue, because torch.quantile does not take bfloat16
        "offpolicy/abs_logratio_p95": logratio.abs().kthvalue(math.ceil(0.95 * len(logratio))).values,
        "offpolicy/ess": weight.sum() ** 2 / (len(weight) * (weight**2).sum()).clamp(min=1e-38),
        "offpolicy/dead_fraction": (coef.abs() < 1e-3).float().mean(),
        "offpolicy/coef_mean": coef.mean(),
    }


# ------------------------------------------------------ Trainer -------------------------------------------------------
@dataclass
class GIPOConfig(GRPOConfig):
    """TRL's GRPOConfig with GIPO as its default loss, a replay buffer, a policy lag and a KL term for every loss."""

    loss_type: str = field(default="gipo", metadata={"help": "gipo, or one of TRL's own losses"})
    sigma: float = field(default=0.5, metadata={"help": "width of the weight, in units of a token's log-ratio"})
    sigma_neg: float | None = field(default=None, metadata={"help": "width where the advantage is not positive"})
    kl_coef: float = field(default=0.1, metadata={"help": "weight of KL(mu || pi); beta pulls to a reference model"})
    buffer_epochs: int = field(default=1, metadata={"help": "newest generations that the replay buffer keeps"})
    policy_lag: int = field(default=0, metadata={"help": "generate with the policy from L generations ago"})


class GIPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with GIPO's loss, a buffer of the last K generations and a delay of L generations.

    Each generation is followed by as many gradient steps as without a buffer, on minibatches from the whole buffer.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        args = self.args
        if args.loss_type == "gipo":
            self.loss_type = "vespo"  # TRL's loss -c A log pi, whose c comes from get_gamma_weights
            corrected = args.use_vllm and args.vllm_importance_sampling_correction
            if corrected and args.vllm_importance_sampling_mode not in ("token_truncate", "token_mask"):
                raise ValueError("GIPO needs token_truncate or token_mask as vllm_importance_sampling_mode.")
        if args.policy_lag and (self.accelerator.num_processes > 1 or args.use_vllm):
            raise ValueError("policy_lag swaps the weights of the model, so it needs a single process without vLLM.")
        every = args.steps_per_generation * self.num_iterations
        if (args.policy_lag or args.buffer_epochs > 1) and args.gradient_accumulation_steps % every == 0:
            raise ValueError("TRL stores log mu of old completions only if a generation has more than one step.")
        self.generation = -1
        self.rollouts = deque(maxlen=args.buffer_epochs)  # each a list of minibatches
        self.policies = deque(maxlen=args.policy_lag + 1 if args.policy_lag else 0)  # weights, the oldest first
        self.drawn = None  # the minibatches drawn last; if TRL has another list, it is a new generation
        self.buffer_file = f"buffer-{args.process_index}.pt"

    def get_gamma_weights(self, advantages, log_ratio_per_token, **kwargs):
        """The c of each token in the loss -c A log pi."""
        if self.args.loss_type != "gipo":
            self.coef = super().get_gamma_weights(advantages, log_ratio_per_token, **kwargs)
            return self.coef
        logratio = log_ratio_per_token.detach()
        if kwargs["importance_sampling_ratio"] is not None:  # mu is vLLM's policy; this is old policy / mu
            logratio = logratio + kwargs["importance_sampling_ratio"].log()
        self.coef = gipo_coefficient(logratio, advantages, self.args)
        return self.coef

    def _compute_loss(self, model, inputs):
        """TRL's loss and the KL term."""
        loss = super()._compute_loss(model, inputs)
        mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        if not self.model.training or not mask.any():
            return loss
        # with vLLM too, mu is here the trainer's policy at generation
        logratio = self.logprobs - inputs.get("old_per_token_logps", self.logprobs.detach())
        if self.loss_type != "vespo":
            self.coef = trl_coefficient(logratio.detach(), inputs["advantages"].unsqueeze(1), self.args)
        for tag, value in diagnostics(logratio[mask].detach(), self.coef.expand_as(mask)[mask]).items():
            self._metrics["train"][tag].append(value.item())
        # KL(mu || pi), estimated on tokens of mu: r - 1 has mean 0, and lowers the variance on fresh tokens
        ratio = torch.exp(logratio - (logratio - 2).clamp(min=0).detach())  # at most exp(2), because outliers dominate
        kl = (ratio - 1 - logratio)[mask].mean()
        return loss + self.args.kl_coef * kl / self.current_gradient_accumulation_steps

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.logprobs = found[0]  # for _compute_loss, which does not get them from TRL
        return found

    def _prepare_inputs(self, generation_batch):
        """The next minibatch. A new generation enters the buffer; as many minibatches are then drawn from all of it."""
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._buffered_inputs is not self.drawn:  # TRL has generated
            self.generation += 1
            version = self.generation - max(0, len(self.policies) - 1)  # of the policy that generated
            self.rollouts.append([minibatch | {"version": version} for minibatch in self._buffered_inputs])
            stored = [minibatch for rollout in self.rollouts for minibatch in rollout]
            self._buffered_inputs = self.drawn = random.sample(stored, len(self._buffered_inputs))
            ages = [self.generation - minibatch["version"] for minibatch in stored]
            self._metrics["train"]["offpolicy/age_mean"].append(sum(ages) / len(ages))
            self._metrics["train"]["offpolicy/age_max"].append(max(ages))
            inputs = self.drawn[0]
        return inputs

    def _generate_and_score_completions(self, inputs):
        """Completions and their log-probabilities by the policy from L generations ago."""
        if not self.model.training or not self.args.policy_lag:
            return super()._generate_and_score_completions(inputs)
        self.policies.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        self.model.load_state_dict(self.policies[0])
        completions = super()._generate_and_score_completions(inputs)
        self.model.load_state_dict(self.policies[-1])
        return completions

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        path = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}", self.buffer_file)
        state = {"generation": self.generation, "rollouts": list(self.rollouts), "policies": list(self.policies)}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)  # last: with this file the checkpoint is complete

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            # TRL restores the saved rate, but a flag given now applies
            self.lr_scheduler.base_lrs = [self.args.learning_rate for _ in self.lr_scheduler.base_lrs]
            state = torch.load(Path(checkpoint, self.buffer_file), self.accelerator.device.type, weights_only=True)
            self.generation = state["generation"]
            self.rollouts.extend(state["rollouts"])
            self.policies.extend(state["policies"])


# ------------------------------------------------------- Flags --------------------------------------------------------
@dataclass(kw_only=True)
class Args:
    model: str | None = None
    """folder or hub id of a causal language model; None makes a tiny one and warms it up on the task"""
    data: Path | None = None
    """file with one JSON object per line, with the texts prompt and answer; the template of a chat model must be in the
    prompt already; None makes lists of digits to sort"""
    reward: str = "exact"
    """exact is 1 for a completion that equals the answer, else 0; module:function names one of yours, which takes
    (prompts, completions, **columns) as in TRL and returns one number for each completion"""
    iterations: int = 200
    """generations, each followed by --minibatches gradient steps (50 to 10000); not TRL's num_iterations"""
    seed: int = 1
    """seed of the model, the prompts and the completions"""
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the name of the run's folder"""

    checkpoint_interval: int = 50
    """iterations between checkpoints (10 to 500); the last two are kept"""
    resume: Path | None = None
    """continue the run in this folder. Its flags apply, except those given now"""
    evaluate: Path | None = None
    """do not train, but sample completions of the held-out prompts with the model of the run in this folder"""
    eval_interval: int = 10
    """iterations between evaluations on the held-out prompts (10 to 100)"""
    eval_prompts: int = 256
    """prompts to hold out, the first ones of --data (64 to 1024)"""

    prompts: int = 32
    """prompts per generation (16 to 512)"""
    group: int = 8
    """completions of each prompt, which are compared with each other (4 to 64); TRL's num_generations"""
    max_new_tokens: int = 8
    """longest completion, in tokens (8 for the digits, 256 to 8192 for a pretrained model)"""
    temperature: float = 1.0
    """temperature of sampling (0.6 to 1.2)"""
    minibatches: int = 4
    """minibatches per generation, one gradient step each (1 to 16; 2 or more for old data)"""
    learning_rate: float = 2e-4
    """first step size of Adam, which falls linearly to 0 (1e-4 to 3e-4; 1e-6 for a pretrained model)"""

    buffer_epochs: int = 1
    """generations K in the replay buffer; 1 learns from the newest completions only (1 to 32)"""
    policy_lag: int = 0
    """generate with the policy from L iterations ago (0 to 32)"""

    surrogate: Literal["gipo", "clip", "sapo", "cispo", "vespo"] = "gipo"
    """policy loss; all but gipo are TRL's own at its defaults, except cispo (epsilon_high 5); clip is TRL's dapo"""
    sigma: float = 0.5
    """gipo: width of the weight, in units of a token's log-ratio; smaller trusts old data less (0.2 to 2)"""
    sigma_neg: float | None = None
    """gipo: width where the advantage is not positive; None: the same as sigma (0.1 to 2)"""
    kl_coef: float = 0.1
    """weight of KL(mu || pi), a pull to the policy that wrote the completion (0 to 0.3); TRL's beta, which pulls to a
    fixed reference model, is another thing and stays 0"""


# smallest and largest value of the numeric flags
RANGES = (
    (0, 2e9, "seed policy_lag kl_coef"),
    (1, 1e9, "iterations checkpoint_interval eval_interval eval_prompts prompts max_new_tokens"),
    (1, 1e9, "minibatches buffer_epochs"),
    (2, 1e9, "group"),
    (1e-9, 1, "learning_rate"),
    (1e-9, 10, "temperature sigma sigma_neg"),
)


# -------------------------------------------------------- Task --------------------------------------------------------
def sorting(n, rng):
    """n rows of 3 to 6 digits to sort, such as 3142= and 1234."""
    digits = [rng.choices("0123456789", k=rng.randint(3, 6)) for _ in range(n)]
    return [{"prompt": "".join(d) + "=", "answer": "".join(sorted(d))} for d in digits]


def exact(completions, answer, **_):
    """1 for each completion that equals its answer, else 0."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def tiny_model():
    """A Llama of 130,000 parameters with new weights, and a tokenizer with one token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    size = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(vocabulary), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **ids, tie_word_embeddings=True))
    return model, transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def warm_up(model, tokenizer, rng, steps=350):
    """Supervised steps on the task, which stand in for pretraining; about 7 in 10 completions are right after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        texts = [row["prompt"] + row["answer"] + tokenizer.eos_token for row in sorting(64, rng)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        equals = batch["input_ids"] == tokenizer.convert_tokens_to_ids("=")
        answer = (equals.cumsum(1) > 0) & ~equals
        loss = model(**batch, labels=batch["input_ids"].where(answer, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ------------------------------------------------------- Run ----------------------------------------------------------
def require(condition, message, code=2):
    """Exit with one sentence unless the condition holds."""
    if not condition:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code)


@contextlib.contextmanager
def exit_on_error(what):
    """Exit with one sentence instead of a traceback on any error, because each library has its own exceptions."""
    try:
        yield
    except Exception as error:
        require(False, f"{what}: {' '.join(str(error).split())[:300]} ({type(error).__name__}).")


def read_args():
    """The flags and, with --resume or --evaluate, the newest checkpoint. Its flags apply, except those given now."""
    args, checkpoint = tyro.cli(Args, description=__doc__), None
    folder = args.evaluate or args.resume
    if folder:
        with exit_on_error(f"{folder} has no checkpoint of this script"):
            complete = folder.glob("checkpoint-*/buffer-0.pt")
            checkpoint = max((path.parent for path in complete), key=lambda path: int(path.name.split("-")[1]))
            saved = json.loads((folder / "args.json").read_text())
            args = replace(args, **saved | {"data": saved["data"] and Path(saved["data"])})
        args = tyro.cli(Args, description=__doc__, default=args)
        require(args.minibatches == saved["minibatches"], f"--minibatches: give {saved['minibatches']}, as before.")
    for low, high, names in RANGES:
        for name in names.split():
            value = getattr(args, name)
            rule = f"--{name.replace('_', '-')} {value}: give {low:g} to {high:g}."
            require(value is None or low <= value <= high, rule)
    completions = args.prompts * args.group
    least = 2 if args.buffer_epochs > 1 or args.policy_lag else 1  # TRL keeps no log-probabilities for a single one
    rule = f"--minibatches {args.minibatches}: give a divisor of --prompts x --group, {completions}, and >= {least}."
    require(args.minibatches >= least and completions % args.minibatches == 0, rule)
    return args, checkpoint


def read_rows(args):
    """Rows to hold out, and rows to train on."""
    with exit_on_error(f"--data {args.data}"):
        if args.data is None:
            rows = sorting(args.eval_prompts + args.iterations * args.prompts, random.Random(f"prompts {args.seed}"))
        else:
            rows = [json.loads(line) for line in args.data.read_text().split("\n") if line.strip()]
        are_strings = [isinstance(row[name], str) for row in rows for name in ("prompt", "answer")]
        require(all(are_strings), f"--data {args.data}: prompt and answer must be strings.")
        least = args.eval_prompts + args.prompts
        require(len(rows) >= least, f"--data {args.data}: {len(rows)} rows; give {least}, or fewer --eval-prompts.")
        return Dataset.from_list(rows[: args.eval_prompts]), Dataset.from_list(rows[args.eval_prompts :])


def read_reward(args):
    """The reward function."""
    with exit_on_error(f"--reward {args.reward}: give exact or module:function"):
        sys.path.insert(0, os.getcwd())
        return exact if args.reward == "exact" else pkgutil.resolve_name(args.reward)


def read_model(args, checkpoint):
    """Model and tokenizer: those of the checkpoint, of --model, or new ones."""
    place = checkpoint or args.model
    if place is None:
        model, tokenizer = tiny_model()
        warm_up(model, tokenizer, random.Random(f"warm-up {args.seed}"))
        return model, tokenizer
    with exit_on_error(f"--model {place}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        return transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), tokenizer


SHARED_FLAGS = ("seed", "temperature", "learning_rate", "sigma", "sigma_neg", "kl_coef", "buffer_epochs", "policy_lag")


def make_config(args, folder):
    """TRL's settings for these flags."""
    return GIPOConfig(
        **{name: getattr(args, name) for name in SHARED_FLAGS},
        output_dir=str(folder),
        max_steps=args.iterations * args.minibatches,
        per_device_train_batch_size=args.prompts * args.group // args.minibatches,
        steps_per_generation=args.minibatches,
        num_generations=args.group,
        max_completion_length=args.max_new_tokens,
        disable_dropout=True,  # because it makes fresh completions look old
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        loss_type="dapo" if args.surrogate == "clip" else args.surrogate,
        epsilon_high=5.0 if args.surrogate == "cispo" else None,  # CISPO alone has no sensible default in TRL
        logging_steps=args.minibatches,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=args.minibatches * args.eval_interval,
        eval_on_start=True,
        num_generations_eval=1,
        per_device_eval_batch_size=args.prompts * args.group,
        save_steps=args.minibatches * args.checkpoint_interval,
        save_total_limit=2,
    )


TAGS = {
    "reward": "charts/episodic_return",
    "completions/mean_length": "charts/episodic_length",
    "learning_rate": "charts/learning_rate",
    "entropy": "losses/entropy",
    "grad_norm": "losses/grad_norm",
    "eval_reward": "eval/episodic_return",
}


class Log(transformers.TrainerCallback):
    """Writes TensorBoard's log by iteration. After a signal, it stops the run at the end of the iteration."""

    def __init__(self, args, folder, first_iteration):
        self.args, self.folder = args, folder
        self.writer = SummaryWriter(folder, purge_step=first_iteration + 1)
        self.stops = []

    def stop(self, signum, _):
        self.stops.append(signum)
        if signum in (signal.SIGINT, signal.SIGTERM):  # a closing terminal sends its signal twice
            print("\nstops after this iteration; once more ends the program at once", flush=True)
            signal.signal(signum, signal.SIG_DFL)

    def on_log(self, _, state, control, logs, **kwargs):
        iteration = state.global_step // self.args.minibatches
        broken = [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]
        require(not broken, f"{broken} not finite in iteration {iteration}; {self.folder} keeps its checkpoint.", 1)
        for name, value in logs.items():
            tag = TAGS.get(name, name)
            if tag.startswith(("charts/", "losses/", "offpolicy/", "eval/")):
                self.writer.add_scalar(tag, value, iteration)
        self.writer.flush()  # before the checkpoint, which must not be ahead of the log
        if "eval_reward" in logs:
            print(f"iteration {iteration}: mean reward {logs['eval_reward']:.3f} on held-out prompts", flush=True)

    def on_step_end(self, _, state, control, **kwargs):
        if self.stops and state.global_step % self.args.minibatches == 0:
            control.should_save = control.should_training_stop = True


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # most are deprecations among the libraries
    transformers.utils.logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # two runs with more threads wait for each other, and one gains little
    args, checkpoint = read_args()
    held_out, rows = read_rows(args)
    reward = read_reward(args)
    transformers.set_seed(args.seed)
    model, tokenizer = read_model(args, checkpoint)
    first_iteration = int(checkpoint.name.split("-")[1]) // args.minibatches if checkpoint else 0
    require(args.evaluate or args.iterations > first_iteration, f"--iterations: give more than {first_iteration}.")

    run_name = f"{args.data.stem if args.data else 'sorting'}__{args.exp_name}__{args.seed}__{time.time_ns()}"
    folder = args.evaluate or args.resume or Path("runs", re.sub(r"[^\w.-]", "-", run_name))
    with exit_on_error(f"{folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
    trainer = GIPOTrainer(model, reward, make_config(args, folder), rows, held_out, tokenizer)
    trainer.remove_callback(transformers.ProgressCallback)
    if args.evaluate:
        print(f"mean reward {trainer.evaluate()['eval_reward']:.3f} on {len(held_out)} held-out prompts")
        sys.exit()
    flags = {name: value for name, value in vars(args).items() if name not in ("resume", "evaluate")}
    (folder / "args.json").write_text(json.dumps(flags, default=str))
    log = Log(args, folder, first_iteration)
    trainer.add_callback(log)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP under nohup
            signal.signal(number, log.stop)
    print(f"{folder}: {'goes on' if args.resume else 'starts'} after iteration {first_iteration}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if log.stops:
        print(f"stopped; --resume {folder} goes on if iterations are left")
        sys.exit(128 + log.stops[0])
