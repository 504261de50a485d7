"""Tiny environments with known answers, registered as `probes:Name-v0`."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete


class Endless(gym.Env):
    """Always the same observation, reward 1 for every step; only the time limit ends it."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


class Clock(gym.Env):
    """Observes (episode, step) and pays the step; episodes end by death or by truncation in turn.

    Success is reported at step 2 alone, so only a tracker that remembers it sees every episode succeed.
    """

    observation_space = Box(0, np.inf, (2,), np.float32)
    action_space = Box(-1, 1, (2,), np.float32)
    length = 5
    episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.time = 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), "actions must arrive clipped"
        reward = float(self.time)
        self.time += 1
        over = self.time == self.length
        death = bool(over and self.episode % 2)
        info = {"success": float(self.time == 2)}
        return np.array([self.episode, self.time], np.float32), reward, death, over and not death, info


class Frames(gym.Env):
    """Atari's shapes: the half of the screen that is bright names the action that is paid; 16 steps an episode."""

    observation_space = Box(0, 255, (4, 84, 84), np.uint8)
    action_space = Discrete(2)

    def draw(self):
        self.side = int(self.np_random.integers(2))
        frames = np.zeros((4, 84, 84), np.uint8)
        frames[:, :, 42 * self.side : 42 * (self.side + 1)] = 255
        return frames

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.draw(), {}

    def step(self, action):
        reward = float(action == self.side)
        self.time += 1
        return self.draw(), reward, self.time == 16, False, {}


gym.register("Endless-v0", Endless, max_episode_steps=20)
gym.register("Clock-v0", Clock)
gym.register("Frames-v0", Frames)
