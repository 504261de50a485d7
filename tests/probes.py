"""Tiny environments with known answers, registered as `probes:Name-v0`."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Text


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


class Bar(gym.Env):
    """Seven steps and one for the reset make a bar of eight rows: episodes end where rollouts of 8, 16, ... rows do.

    Deterministic: the reward and the next observation follow from the action and the time.
    """

    observation_space = Box(-10, 10, (2,), np.float32)
    action_space = Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time += 1
        obs = np.array([self.time / 7, float(action[0])], np.float32)
        return obs, float(1 - abs(action[0] - 0.3)), self.time == 7, False, {}


class BarFrames(Bar):
    """The same with Atari's shapes."""

    observation_space = Box(0, 255, (4, 84, 84), np.uint8)
    action_space = Discrete(3)

    def frame(self, value):
        return np.full((4, 84, 84), value, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.frame(0), {}

    def step(self, action):
        *_, reward, terminated, truncated, info = super().step([action / 2, 0])
        return self.frame(10 * self.time + int(action)), reward, terminated, truncated, info


class BarGrid(Bar):
    """The same with MiniGrid's observations."""

    observation_space = Dict(image=Box(0, 255, (7, 7, 3), np.uint8), mission=Text(40))
    action_space = Discrete(7)

    def view(self, door):
        image = np.zeros((7, 7, 3), np.uint8)
        image[..., 0] = 1  # empty cells
        image[door, 3, 0] = 4
        return {"image": image, "mission": "go to the red door"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.view(0), {}

    def step(self, action):
        *_, reward, terminated, truncated, info = super().step([action / 6, 0])
        return self.view(int(action)), reward, terminated, truncated, info


class Uneven(Bar):
    """Episodes of 3 and of 30 steps in turn, the first one of either kind by the seed."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.length = 30 if seed % 2 else 3
        else:
            self.length = 33 - self.length
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, *_, info = super().step(action)
        return obs, reward, self.time == self.length, False, info


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
gym.register("Bar-v0", Bar)
gym.register("Uneven-v0", Uneven)
gym.register("BarFrames-v0", BarFrames)
gym.register("BarGrid-v0", BarGrid)
