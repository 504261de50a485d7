"""TRL's AsyncGRPOTrainer on a CPU, without vLLM: a sampler in the same process, whose queue sets the staleness.

The trainer takes completions from the sampler when it needs them, so a seeded run repeats.
"""

import queue
import time
from types import SimpleNamespace

import numpy as np
import torch
import transformers
import trl.experimental.async_grpo.async_grpo_trainer as async_trainer
import trl.experimental.async_grpo.packing as packing
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample


def packed_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=True, window_size=None
):
    """What flash_attn_varlen_func of FlashAttention does, by plain attention; causal, without a window.

    q, k and v are (tokens, heads, dim), with sequences end to end. The last query of a sequence sees all its keys.
    """
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    q = pad_sequence(q.split(lengths_q), batch_first=True)
    k, v = (pad_sequence(x.split(lengths_k), batch_first=True) for x in (k, v))
    before = torch.tensor(lengths_k) - torch.tensor(lengths_q)  # keys that all queries of a sequence see
    last = torch.arange(q.shape[1]) + before.unsqueeze(1)
    visible = torch.arange(k.shape[1]) <= last.unsqueeze(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found = scaled_dot_product_attention(q, k, v, visible.unsqueeze(1), scale=softmax_scale, enable_gqa=True)
    return torch.cat([rows[:n] for rows, n in zip(found.transpose(1, 2), lengths_q)])


def use_cpu():
    """Replace what TRL's asynchronous trainer needs a GPU for."""
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=packed_attention)
    async_trainer.get_peak_flops_per_device = lambda *_: None


class Sampler:
    """TRL's rollout worker and its weight transfer: a copy of the model, and completions that wait in a queue.

    `waiting` completions lie between a completion and the trainer.
    """

    def __init__(self, folder, rows, reward, prompts, group, max_new_tokens, waiting):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.rows, self.reward, self.prompts, self.group = rows, reward, prompts, group
        self.max_new_tokens, self.waiting = max_new_tokens, waiting
        self.samples, self.version, self.groups = [], 0, 0
        self.metrics_queue = queue.Queue()
        self.rollout_buffer = SimpleNamespace(get=self.get, qsize=lambda: len(self.samples))

    def get(self, timeout=None):
        """The oldest completion; new ones are written while fewer than `waiting` would remain."""
        while len(self.samples) <= self.waiting:
            self.samples += self.write()
        return self.samples.pop(0)

    @torch.no_grad()
    def generate(self, rows):
        """Prompts, completions and log-probabilities of completions: lists of lists, to their end of sequence."""
        batch = self.tokenizer(
            [row["prompt"] for row in rows], return_tensors="pt", padding=True, return_token_type_ids=False
        )
        found = self.model.generate(
            **batch,
            max_new_tokens=self.max_new_tokens,
            do_sample=True,
            top_k=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logprobs = self.model.compute_transition_scores(found.sequences, found.logits, normalize_logits=True)
        completions = found.sequences[:, batch["input_ids"].shape[1] :]
        is_end = completions == self.tokenizer.eos_token_id
        lengths = (is_end.cumsum(1) - is_end.long() == 0).sum(1).tolist()
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
        cut = [(ids[:n].tolist(), own[:n].tolist()) for ids, own, n in zip(completions, logprobs, lengths)]
        return prompts, *zip(*cut)

    def score(self, rows):
        """Prompts, completions, log-probabilities and rewards."""
        prompts, completions, logprobs = self.generate(rows)
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return prompts, completions, logprobs, self.reward(completions=texts, answer=[row["answer"] for row in rows])

    def write(self):
        """Completions of the next prompts."""
        first = self.groups % (len(self.rows) - self.prompts + 1)
        rows = [row for row in self.rows[first : first + self.prompts] for _ in range(self.group)]
        prompts, completions, logprobs, rewards = self.score(rows)
        rewards = np.array(rewards).reshape(self.prompts, self.group)
        advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
        found = []
        for i, (prompt, completion, own) in enumerate(zip(prompts, completions, logprobs)):
            found.append(
                RolloutSample(
                    prompt=[],
                    completion=[],
                    input_ids=np.array(prompt + completion),
                    completion_mask=np.array([0] * len(prompt) + [1] * len(completion)),
                    old_log_probs=np.array([0.0] * len(prompt) + own, dtype=np.float32),
                    advantage=float(advantages.flat[i]),
                    model_version=self.version,
                    group_id=self.groups + i // self.group,
                    metrics={"reward": float(rewards.flat[i])},
                    enqueued_at=time.time(),
                )
            )
        self.groups += self.prompts
        return found

    # what TRL calls on a worker
    def start(self):
        pass

    def stop(self):
        pass

    def check_health(self, stale_after_s):
        pass

    def update_model_version(self, version):
        self.version = version

    # what TRL calls on a weight transfer
    def init_weight_transfer(self):
        pass

    def pause(self):
        pass

    def resume(self):
        pass

    def destroy(self):
        pass

    @torch.no_grad()
    def send_weights(self, weights):
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            if name in own:  # tied weights come twice
                own[name].copy_(weight)
