"""GIPO for language models: TRL's GRPO with a Gaussian weight instead of its clip, to learn from old completions too.

    You use GRPOTrainer, which generates and learns in turn:   take GIPOTrainer and GIPOConfig of this file.
    You use AsyncGRPOTrainer, where vLLM goes on writing:      take those of gipo_trl_async.py.

Import them, or copy the sections Loss and Trainer with the imports above them. On fresh completions every ratio is
close to 1, and nothing changes.

    loss = -mean(w * r * A) + kl_coef * KL(mu || pi),  r = pi(token) / mu(token),  w = exp(-(log r)^2 / (2 sigma^2))

mu is the policy that wrote the completion, by the log-probabilities that the sampler reports. Each token has its own
ratio; A is the advantage of its completion within the group of its prompt. The KL term pulls pi back towards mu; it is
estimated by mean(r - 1 - log r). No gradient flows through w. (Lu et al. 2026, arXiv:2603.03955)

The rest of the file is an example, which sorts digits and takes all flags of TRL:

    pip install -r requirements-trl.txt                     # in its own virtual environment
    python gipo_trl.py                                      # a tiny model, three minutes; downloads nothing
    python gipo_trl.py --buffer_epochs 8                    # learn from the completions of the last 8 generations
    python gipo_trl.py --resume_from_checkpoint runs/RUN/checkpoint-400    # with the flags of that run
    tensorboard --logdir runs
    python gipo_trl.py --model PATH_OR_ID --data FILE.jsonl --reward module:function --learning_rate 1e-6 \\
        --max_completion_length 256 --per_device_train_batch_size 8 --steps_per_generation 16
"""

import contextlib
import inspect
import math
import os
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would report each run

import torch
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer


# -------------------------------------------------------- Loss --------------------------------------------------------
def gipo_coefficient(logratio, sigma):
    """The importance ratio times a Gaussian of its logarithm: c in the gradient -c A grad log pi; of any shape.

    logratio = log pi - log mu. c is at most exp(sigma^2 / 2), so it cannot overflow.
    """
    return torch.exp(logratio - 0.5 * (logratio / sigma) ** 2)


def kl_estimate(logratio):
    """r - 1 - log r of each token, whose mean over tokens of mu estimates KL(mu || pi). r - 1 lowers the variance.

    r is taken as at most exp(2), because single tokens far above would decide the gradient.
    """
    ratio = torch.exp(logratio - (logratio - 2).clamp(min=0).detach())
    return ratio - 1 - logratio


def diagnostics(logratio, coef):
    """Scalars: how far pi is from the policies that wrote the tokens (n,), and how many still have a gradient."""
    ratio = logratio.clamp(max=20).exp()  # float32 ends at exp(88)
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
def check(config, **smallest):
    """Raises ValueError if a number of the config is below its smallest value, NaN or infinite.

    TRL's default, bfloat16, fails on a CPU, so float32 is the default there.
    """
    for name, least in smallest.items():
        value = getattr(config, name)
        if not least <= value < math.inf:
            raise ValueError(f"{name} {value}: give {least:g} or more.")
    if config.bf16 is None and (config.use_cpu or not torch.accelerator.is_available()):
        config.bf16 = False


@dataclass
class GIPOConfig(GRPOConfig):
    """TRL's GRPOConfig and GIPO's flags. Raises ValueError for what GIPO cannot do."""

    loss_type: str = field(default="gipo", metadata={"help": "gipo; GRPOTrainer has the other losses"})
    sigma: float = field(
        default=0.5, metadata={"help": "width of the weight in units of a token's log-ratio (0.2 to 2)"}
    )
    kl_coef: float = field(
        default=0.1, metadata={"help": "weight of KL(mu || pi) (0 to 0.3); beta pulls to a fixed reference model"}
    )
    buffer_epochs: int = field(
        default=1,
        metadata={
            "help": "newest generations K in the replay buffer (1 to 32); the number of gradient steps stays, so raise "
            "num_iterations with it to use each completion more often"
        },
    )
    policy_lag: int = field(
        default=0, metadata={"help": "generate with the policy from L generations ago, for experiments (0 to 32)"}
    )

    use_bias_correction_kl: bool = field(
        default=False,
        metadata={"help": "weigh the KL term of beta by the ratio, which has no bound on old completions"},
    )

    def __post_init__(self):
        if self.loss_type != "gipo":
            raise ValueError(f"loss_type {self.loss_type}: GIPOTrainer has gipo alone; use GRPOTrainer.")
        if self.importance_sampling_level != "token":
            raise ValueError("importance_sampling_level: GIPO has a ratio for each token; give token.")
        check(self, sigma=1e-3, kl_coef=0, buffer_epochs=1, policy_lag=0)
        if self.policy_lag and self.use_vllm:
            raise ValueError("policy_lag swaps the trainer's weights, and vLLM has its own; leave one of them out.")
        # TRL's correction cuts the ratio to the sampler off; here it is part of r
        self.vllm_importance_sampling_correction = False
        super().__post_init__()


class GIPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with GIPO's loss, a buffer of the last K generations and a delay of L generations.

    TRL computes the loss in its branch `vespo`, -c A log pi with c of `get_gamma_weights`. Each pass over a generation
    draws as many minibatches as without a buffer, from the whole buffer.
    """

    def __init__(self, model, reward_funcs=None, args=None, *more, **kwargs):
        if not isinstance(args, GIPOConfig):
            raise ValueError("args: give a GIPOConfig.")
        if args.policy_lag and is_deepspeed_zero3_enabled():
            raise ValueError("policy_lag copies whole weights, and ZeRO-3 splits them; leave one of them out.")
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        self.loss_type = "vespo"  # the branch that TRL takes
        self.generation = -1
        self.rollouts = deque(maxlen=args.buffer_epochs)  # each a list of minibatches
        self.policies = deque(maxlen=args.policy_lag + 1)  # trained parameters by name, the oldest first
        self.drawn = None  # the minibatches of this pass
        self.buffer_file = f"buffer-{args.process_index}.pt"

    def get_gamma_weights(self, advantages, log_ratio_per_token, **_):
        """The c of each token. TRL calls it inside `_compute_loss`, which also needs the log-ratios."""
        self.logratio = log_ratio_per_token
        self.coef = gipo_coefficient(log_ratio_per_token.detach(), self.args.sigma)
        return self.coef

    def _compute_loss(self, model, inputs):
        """TRL's loss and the KL term, both divided by the tokens of a mean minibatch."""
        loss = super()._compute_loss(model, inputs)
        if not self.model.training:
            return loss
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        self._log_diagnostics(mask.bool())
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return loss + self.args.kl_coef * (kl_estimate(self.logratio) * mask).sum() / tokens

    def _log_diagnostics(self, mask):
        """Means over the tokens of all processes."""
        count = mask.sum()
        # all processes must reduce, so one without a token gives any with a weight of 0
        kept = mask if count else torch.ones_like(mask)
        found = diagnostics(self.logratio[kept].detach(), self.coef[kept])
        sums = torch.stack([*found.values(), torch.ones_like(self.coef[0, 0])]).float() * count
        *sums, total = self.accelerator.reduce(sums, "sum").tolist()
        for tag, value in zip(found, sums):
            if total:
                self._metrics["train"][tag].append(value / total)

    def _generate_and_score_completions(self, inputs):
        """Completions by the policy from L generations ago, with log mu."""
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        with self._behaviour_policy():
            batch = super()._generate_and_score_completions(inputs)
            self._set_log_mu(batch)
        return batch

    @contextlib.contextmanager
    def _behaviour_policy(self):
        """The weights of L generations ago; only trained ones, because adapters leave the others as they are."""
        if not self.args.policy_lag:
            yield
            return
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.policies.append({name: weight.detach().clone() for name, weight in trained.items()})
        self._load(trained, self.policies[0])
        try:
            yield
        finally:
            self._load(trained, self.policies[-1])

    @torch.no_grad()
    def _load(self, trained, policy):
        for name, weight in trained.items():
            weight.copy_(policy[name])

    @torch.no_grad()
    def _set_log_mu(self, batch):
        """The sampler's log-probabilities where it reports them, else those of the trainer's weights."""
        if "old_per_token_logps" not in batch:  # TRL leaves it out if a generation has a single step
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            size, length = self.args.per_device_train_batch_size, batch["completion_ids"].shape[1]
            compute = self._get_per_token_logps_and_entropies
            # its other parameters, as far as the batch has them
            pictures = {name: batch[name] for name in inspect.signature(compute).parameters if name in batch}
            batch["old_per_token_logps"] = compute(self.model, ids, mask, length, batch_size=size, **pictures)[0]
        sampled = batch.get("sampling_per_token_logps")
        if sampled is not None:
            batch["old_per_token_logps"] = sampled.where(sampled.isfinite(), batch["old_per_token_logps"])

    def _prepare_inputs(self, generation_batch):
        """The next minibatch. A new generation enters the buffer; each pass then draws from all of it."""
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return inputs
        is_new = self._buffered_inputs is not self.drawn  # TRL has generated
        if is_new:
            self.generation += 1
            version = self.generation - max(0, len(self.policies) - 1)  # of the policy that generated
            self.rollouts.append([minibatch | {"version": version} for minibatch in self._buffered_inputs])
            ages = [self.generation - rollout[0]["version"] for rollout in self.rollouts]
            self._metrics["train"]["offpolicy/age_mean"].append(sum(ages) / len(ages))
            self._metrics["train"]["offpolicy/age_max"].append(max(ages))
        step = self._step % self.args.steps_per_generation
        if is_new or step == 0:
            stored = [minibatch for rollout in self.rollouts for minibatch in rollout]
            self._buffered_inputs = self.drawn = random.sample(stored, self.args.steps_per_generation)
        return self.drawn[step]

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.buffer_epochs == 1 and not self.args.policy_lag:
            return
        path = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}", self.buffer_file)
        state = {"generation": self.generation, "rollouts": list(self.rollouts), "policies": list(self.policies)}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and Path(checkpoint, self.buffer_file).exists():  # a checkpoint of GRPOTrainer has no buffer
            state = torch.load(Path(checkpoint, self.buffer_file), self.accelerator.device.type, weights_only=True)
            self.generation = state["generation"]
            self.policies.extend(state["policies"])
            # minibatches of another size would have another weight
            fitting = [one for one in state["rollouts"] if len(one) == self.args.steps_per_generation]
            self.rollouts.extend(fitting)


# --------------------------------------------------- Example: the task ------------------------------------------------
import json
import pkgutil
import signal
import sys
import time
import traceback
import warnings

import transformers
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from trl import TrlParser


def sorting(n, rng, shortest=3, longest=6):
    """n rows of digits to sort, such as 3142= and 1234."""
    digits = [rng.choices("0123456789", k=rng.randint(shortest, longest)) for _ in range(n)]
    return [{"prompt": "".join(d) + "=", "answer": "".join(sorted(d))} for d in digits]


def exact(completions, answer, **_):
    """1 for each completion, a text or the messages of a chat, that equals its answer, else 0."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(text == right) for text, right in zip(texts, answer, strict=True)]


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


def warm_up(model, tokenizer, rng, steps=350, **lengths):
    """Supervised steps on the task, which stand in for pretraining; about 7 in 10 completions are right after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        texts = [row["prompt"] + row["answer"] + tokenizer.eos_token for row in sorting(64, rng, **lengths)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        equals = batch["input_ids"] == tokenizer.convert_tokens_to_ids("=")
        answer = (equals.cumsum(1) > 0) & ~equals
        loss = model(**batch, labels=batch["input_ids"].where(answer, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# -------------------------------------------------- Example: the command ----------------------------------------------
@dataclass
class ExampleArgs:
    model: str | None = field(
        default=None,
        metadata={"help": "folder or hub id of a causal language model; without it a tiny one sorts digits"},
    )
    data: str | None = field(
        default=None, metadata={"help": "file with a JSON object per line: prompt, a text or messages, and answer"}
    )
    reward: str = field(
        default="exact",
        metadata={"help": "exact, 1 for a completion that equals its answer; or module:function of yours, as in TRL"},
    )
    eval_prompts: int = field(default=256, metadata={"help": "prompts to hold out, the first of --data (64 to 1024)"})
    lora_rank: int = field(default=0, metadata={"help": "train adapters of this rank instead of the model (8 to 64)"})


# of TRL's flags: 200 generations of 256 completions, four gradient steps each
DEFAULTS = {
    "max_steps": 800,
    "per_device_train_batch_size": 64,
    "steps_per_generation": 4,
    "num_generations": 8,
    "max_completion_length": 8,
    "learning_rate": 2e-4,
    "disable_dropout": True,  # because it makes fresh completions look old
    "logging_steps": 4,
    "logging_nan_inf_filter": False,
    "eval_strategy": "steps",
    "eval_steps": 40,
    "eval_on_start": True,
    "num_generations_eval": 1,
    "per_device_eval_batch_size": 256,
    "save_steps": 200,
    "save_total_limit": 2,
    "report_to": "tensorboard",
}


class InputError(ValueError):
    """A mistake in the flags or in what they name."""


def require(condition, message):
    if not condition:
        raise InputError(message)


def place(error):
    """Where an error comes from, if that is no library: the innermost file and line."""
    libraries = (sys.prefix, sys.base_prefix, "<", __file__)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    return f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""


@contextlib.contextmanager
def input_error(what):
    """Turn any error into an InputError, because each library has its own exceptions."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300] or "it failed"
        raise InputError(f"{what}: {text} ({type(error).__name__}{place(error)}).") from error


def read_rows(args, config):
    """Rows to hold out, and rows to train on."""
    per_generation = config.generation_batch_size // config.num_generations
    least = args.eval_prompts + per_generation
    if args.data is None:
        generations = config.max_steps // config.steps_per_generation
        total = args.eval_prompts + per_generation * max(1, generations)
        rows = sorting(total, random.Random(f"prompts {config.seed}"))
    else:
        with input_error(f"--data {args.data}"):
            lines = Path(args.data).read_text("utf-8-sig").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
            fits = [isinstance(row["prompt"], str | list) and isinstance(row["answer"], str) for row in rows]
            require(all(fits), f"--data {args.data}: prompt must be a text or messages, and answer a text.")
        require(len(rows) >= least, f"--data {args.data}: {len(rows)} rows; give {least}, or fewer --eval_prompts.")
    return Dataset.from_list(rows[: args.eval_prompts]), Dataset.from_list(rows[args.eval_prompts :])


def read_reward(args):
    """The reward function."""
    if args.reward == "exact":
        return exact
    sys.path.insert(0, os.getcwd())
    with input_error(f"--reward {args.reward}: give exact or module:function"):
        found = pkgutil.resolve_name(args.reward)
        require(callable(found), f"--reward {args.reward}: it is no function.")
        return found


def read_model(args, config):
    """Model and tokenizer: those of --model, or new ones that have seen the task."""
    if args.model is None:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # a model this small gains nothing by more, and two runs would wait for each other
        model, tokenizer = tiny_model()
        if not config.resume_from_checkpoint:
            print("a tiny model first sees sorted digits, which takes half a minute", flush=True)
            warm_up(model, tokenizer, random.Random(f"warm-up {config.seed}"))
        return model, tokenizer
    with input_error(f"--model {args.model}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        require(tokenizer.eos_token, f"--model {args.model}: its tokenizer has no end-of-sequence token.")
        return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), tokenizer


def adapters(args):
    """The settings of LoRA, or None."""
    if not args.lora_rank:
        return None
    from peft import LoraConfig  # slow to import

    return LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")


class Progress(transformers.ProgressCallback):
    """A bar, and a line for each evaluation; the rest is in TensorBoard. A signal saves and stops."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.stopped = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number, _):
        signal.signal(number, signal.SIG_DFL)  # before the line, whose reader may answer at once
        self.stopped = number
        print("\nsaves and stops after this step; once more ends the program at once", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs, **kwargs):
        broken = [name for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0))]
        if broken:
            raise FloatingPointError(f"{broken} not finite at step {state.global_step}; the last checkpoint stays.")
        if logs.get("reward") is not None:  # rewards may be None
            self.training_bar.set_postfix(reward=logs["reward"])
        if logs.get("eval_reward") is not None:
            self.training_bar.write(f"step {state.global_step}: reward {logs['eval_reward']:.3f} on held-out prompts")


def check_flags(args, config):
    """Raises InputError for what would fail only after the warm-up."""
    require(config.world_size == 1, "this example takes one process; GIPOTrainer in your own script takes several.")
    require(args.model or not args.data, "--data: give --model too, because the tiny model knows digits only.")
    require(
        args.model or args.lora_rank or not config.beta, "--beta: give --model, whose first weights are the reference."
    )
    require(args.eval_prompts >= 1, f"--eval_prompts {args.eval_prompts}: give 1 or more.")
    checkpoint = config.resume_from_checkpoint
    require(not checkpoint or Path(checkpoint, "trainer_state.json").exists(), f"{checkpoint} is no checkpoint.")


def main():
    """Train as the command line says; the model lies in --output_dir at the end. Returns the exit code."""
    warnings.simplefilter("ignore")  # most are deprecations among the libraries
    transformers.utils.logging.disable_progress_bar()
    parser = TrlParser((ExampleArgs, GIPOConfig), description=__doc__, usage="gipo_trl.py [--help] [flags]")
    parser.set_defaults(**DEFAULTS, output_dir=f"runs/{Path(__file__).stem}__{time.time_ns()}")
    try:
        with input_error("flags"):
            args, config = parser.parse_args_and_config()
        check_flags(args, config)
        held_out, rows = read_rows(args, config)
        reward = read_reward(args)
        with input_error(f"--output_dir {config.output_dir}"):
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        transformers.set_seed(config.seed)
        model, tokenizer = read_model(args, config)
        has_chats = any(isinstance(row["prompt"], list) for row in held_out)
        require(tokenizer.chat_template or not has_chats, f"--data {args.data}: the model has no template for chats.")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    trainer = GIPOTrainer(model, reward, config, rows, held_out, tokenizer, peft_config=adapters(args))
    trainer.remove_callback(transformers.ProgressCallback)
    progress = Progress()
    trainer.add_callback(progress)
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    trainer.save_model()
    print(f"{config.output_dir} has the model")
    if progress.stopped:
        checkpoint = f"{config.output_dir}/checkpoint-{trainer.state.global_step}"
        print(f"which is not finished; --resume_from_checkpoint {checkpoint} goes on")
        return 128 + progress.stopped
    return 0


if __name__ == "__main__":
    sys.exit(main())
