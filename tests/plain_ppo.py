"""A PPO with the names that CleanRL's have, on CartPole; the README has the lines that turn it into GIPO."""

from collections import deque

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Categorical

num_envs, num_steps, iterations, update_epochs, minibatch_size = 8, 128, 25, 10, 128
gamma, gae_lambda, clip_coef = 0.99, 0.95, 0.2

torch.manual_seed(1)
envs = gym.make_vec("CartPole-v1", num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": "SameStep"})
actor = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=2.5e-3)
next_obs, lengths = envs.reset(seed=1)[0], np.zeros(num_envs)
finished = deque(maxlen=20)  # lengths of the last episodes

for _ in range(iterations):
    obs, actions, logprobs, rewards, dones, values, clipfracs = [], [], [], [], [], [], []
    for _ in range(num_steps):
        obs.append(torch.as_tensor(next_obs))
        with torch.no_grad():
            probs, value = Categorical(logits=actor(obs[-1])), critic(obs[-1]).squeeze(-1)
        action = probs.sample()
        next_obs, reward, terminated, truncated, infos = envs.step(action.numpy())
        reward, done = torch.as_tensor(reward, dtype=torch.float32), terminated | truncated
        for i in np.flatnonzero(truncated):  # a time limit is worth the value of what follows
            reward[i] += gamma * critic(torch.as_tensor(infos["final_obs"][i])).item()
        lengths += 1
        finished.extend(lengths[done])
        lengths[done] = 0
        actions.append(action), logprobs.append(probs.log_prob(action)), rewards.append(reward)
        dones.append(torch.as_tensor(done)), values.append(value)
    with torch.no_grad():
        values.append(critic(torch.as_tensor(next_obs)).squeeze(-1))
    gae, advantages = 0.0, []
    for t in reversed(range(num_steps)):
        gae = rewards[t] + ~dones[t] * gamma * (values[t + 1] + gae_lambda * gae) - values[t]
        advantages.insert(0, gae)
    advantages, values = torch.cat(advantages), torch.cat(values[:-1])
    b_obs, b_actions, b_logprobs = torch.cat(obs), torch.cat(actions), torch.cat(logprobs)
    b_advantages, b_returns = advantages, advantages + values
    for _ in range(update_epochs):
        for mb_inds in torch.randperm(num_steps * num_envs).split(minibatch_size):
            newlogprob = Categorical(logits=actor(b_obs[mb_inds])).log_prob(b_actions[mb_inds])
            logratio = newlogprob - b_logprobs[mb_inds]
            ratio = logratio.exp()
            clipfracs.append(((ratio - 1).abs() > clip_coef).float().mean().item())
            mb_advantages = b_advantages[mb_inds]
            mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)

            # Policy loss
            clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
            pg_loss = -torch.min(ratio * mb_advantages, clipped * mb_advantages).mean()

            # Value loss
            v_loss = ((critic(b_obs[mb_inds]).squeeze(-1) - b_returns[mb_inds]) ** 2).mean()
            optimizer.zero_grad()
            (pg_loss + 0.5 * v_loss).backward()
            optimizer.step()

print(f"mean length of the last {len(finished)} episodes: {np.mean(finished):.1f}")
