"""GIPO for TRL's AsyncGRPOTrainer, where a sampler goes on writing while the trainer learns, so completions are stale.

    from gipo_trl_async import AsyncGIPOConfig, AsyncGIPOTrainer  # instead of AsyncGRPOConfig and AsyncGRPOTrainer

gipo_trl.py has the loss, and the trainer for TRL's GRPOTrainer. mu is the policy that wrote the completion, by the
log-probabilities that the sampler reports. TRL drops completions that are older than `max_staleness` steps, and its
default stays; GIPO fades the others by their ratio. TRL's set-up needs two GPUs, one of them for vLLM.
"""

from dataclasses import dataclass, field

import torch
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from gipo_trl import check, diagnostics, gipo_coefficient, kl_estimate


@dataclass
class AsyncGIPOConfig(AsyncGRPOConfig):
    """TRL's AsyncGRPOConfig and GIPO's flags. Raises ValueError if they are out of range."""

    sigma: float = field(
        default=0.5, metadata={"help": "width of the weight in units of a token's log-ratio (0.2 to 2)"}
    )
    kl_coef: float = field(default=0.1, metadata={"help": "weight of KL(mu || pi) (0 to 0.3)"})

    def __post_init__(self):
        check(self, sigma=1e-3, kl_coef=0)
        super().__post_init__()


class AsyncGIPOTrainer(AsyncGRPOTrainer):
    """TRL's AsyncGRPOTrainer with GIPO's loss. `ratio`, `kl` and `clip_ratio/*` in the log are of TRL's own loss."""

    def __init__(self, model, reward_funcs=None, args=None, *more, **kwargs):
        if not isinstance(args, AsyncGIPOConfig):
            raise ValueError("args: give an AsyncGIPOConfig.")
        super().__init__(model, reward_funcs, args, *more, **kwargs)

    def token_losses(self, logratio, advantages):
        """-c A log pi of each token (n,), up to a constant, and the c."""
        coef = gipo_coefficient(logratio.detach(), self.args.sigma)
        return -coef * advantages * logratio, coef

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss as a mean over the tokens of the global batch, as TRL's own."""
        outputs = []

        def recorded(**tokens):
            outputs.append(model(**tokens))
            return outputs[-1]

        super().compute_loss(recorded, inputs)  # for its log, and for the one forward pass, which it does not return
        (output,) = outputs
        chosen = inputs["token_index"] >= 0
        logprobs = output.log_probs.flatten()[inputs["token_index"][chosen]]
        logratio = logprobs - inputs["old_log_probs"][chosen]
        losses, coef = self.token_losses(logratio, inputs["advantages"][chosen])
        losses = losses + self.args.kl_coef * kl_estimate(logratio)

        found = diagnostics(logratio.detach(), coef)
        means = self.accelerator.reduce(torch.stack(list(found.values())).float(), "mean")  # over processes
        for tag, value in zip(found, means.tolist()):
            self._metrics["train"][tag].append(value)

        tokens = (inputs["global_n_tokens"][0] / self.accelerator.num_processes).clamp(min=1)  # of each process
        loss = losses.sum() / tokens
        if self.aux_loss_enabled:  # of a mixture of experts
            loss = loss + self.router_aux_loss_coef * output.aux_loss
        return loss / self.current_gradient_accumulation_steps
