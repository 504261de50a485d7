"""Environments on which gipo_rllib.py must stop with a sentence, as `rllib_probes:Name-v0`; actors import them too."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiBinary


class Probe(gym.Env):
    """Two observations, episodes of ten steps."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(2)
    time = steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        self.steps += 1
        return self.observe(), self.reward(), self.time == 10, False, {}

    def observe(self):
        return np.array([self.time / 10, 0], np.float32)

    def reward(self):
        return 1.0


class NanObservation(Probe):
    """A single NaN, from which no discrete action can be drawn."""

    def observe(self):
        return np.array([np.nan if self.steps == 25 else self.time / 10, 0], np.float32)


class NanReward(Probe):
    action_space = Box(-1, 1, (1,), np.float32)

    def reward(self):
        return np.nan if self.steps == 25 else 1.0


class Raises(Probe):
    """No step ever succeeds."""

    def reward(self):
        raise RuntimeError("simulator lost")


class IntObservations(Probe):
    observation_space = Box(0, 255, (3,), np.uint8)

    def observe(self):
        return np.array([self.time, 100, 255], np.uint8)


class IntActions(Probe):
    action_space = Box(0, 9, (2,), np.int64)


class From5(Probe):
    action_space = Discrete(3, start=5)


class Bits(Probe):
    action_space = MultiBinary(3)


for cls in (NanObservation, NanReward, Raises, IntObservations, IntActions, From5, Bits):
    gym.register(f"{cls.__name__}-v0", cls)
