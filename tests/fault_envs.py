"""Environments that behave as those of users do, each with one trait that could end or spoil a run.

`fault_envs:Name-v0` is a continuous one, NameFrames-v0 and NameGrid-v0 have the shapes of Atari and of MiniGrid.
"""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from probes import Bar, BarFrames, BarGrid


class Plain(gym.Wrapper):
    """Episodes of 7 steps, the first one of 3 to 5, so that parallel environments are not in step."""

    def reset(self, *, seed=None, options=None):
        if seed is None:
            self.limit = 7
        else:
            self.limit, self.steps = 3 + seed % 3, 0
        self.time = 0
        return self.env.reset(seed=seed)

    def step(self, action):
        obs, reward, terminated, _, info = self.env.step(action)
        self.time += 1
        self.steps += 1  # since the reset with a seed
        truncated = self.time == self.limit and not terminated
        return self.observation(obs), self.reward(reward), terminated, truncated, info | self.info()

    def observation(self, obs):
        return obs

    def reward(self, reward):
        return reward

    def info(self):
        return {}


class NumpySuccess(Plain):
    """Numpy's bool, of which gymnasium makes an array of objects, with None where an environment resets."""

    def info(self):
        return {"success": np.float64(self.time) > 1}


class SuccessAtEnd(Plain):
    def info(self):
        return {"success": np.bool_(True)} if self.time == self.limit else {}


class SuccessSometimes(Plain):
    """Only a success is reported: the first episode in every other environment."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.lucky = seed % 2
        return super().reset(seed=seed)

    def info(self):
        return {"success": True} if self.lucky and self.steps == 2 else {}


class TextSuccess(Plain):
    def info(self):
        return {"success": "yes"}


class DictSuccess(Plain):
    def info(self):
        return {"success": {"door": True}}


class NumpyReward(Plain):
    def reward(self, reward):
        return np.float64(reward) - 0.5


class Unending(gym.Wrapper):
    def step(self, action):
        obs, reward, _, _, info = self.env.step(action)
        return obs, reward, False, False, info


class InfiniteReward(Plain):
    def reward(self, reward):
        return -np.inf if self.steps == 70 else reward


class NanReward(Plain):
    def reward(self, reward):
        return np.nan if self.steps == 70 else reward


class NanObservation(Plain):
    def observation(self, obs):
        return obs * np.float32(np.nan if self.steps == 70 else 1)


class Noise(Plain):
    """What is observed first shows the stream of random numbers."""

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        random = self.unwrapped.np_random.random((7, 7))
        if isinstance(obs, dict):
            walls = np.stack([np.full((7, 7), 2), 6 * random, np.zeros((7, 7))], 2)  # in six colors
            return obs | {"image": walls.astype(np.uint8)}, info
        return np.resize(10 * random, obs.shape).astype(obs.dtype), info


class Drawn(Plain):
    """Pictures, but no word on how many of them make a second."""

    def render(self):
        return np.full((64, 64, 3), 30 * self.time, np.uint8)


class NoPicture(Plain):
    """Accepts the render mode and draws nothing."""

    def render(self):
        return None


class OwnSuccess(Plain):
    """Paid in every step, and no episode is a success."""

    def reward(self, reward):
        return 0.1

    def info(self):
        return {"success": False}


class LateWord(Plain):
    episodes = 0

    def reset(self, *, seed=None, options=None):
        self.episodes += 1
        obs, info = super().reset(seed=seed)
        return obs | {"mission": "go to the elephant" if self.episodes > 5 else "go to the door"}, info


class Wide(Plain):
    """The best action is 500, far outside of what a Gaussian of mean 0 and deviation 1 tries."""

    action_space = Box(0, 1000, (2,), np.float32)

    def reward(self, reward):
        return 0.0


class Few(gym.ActionWrapper):
    """Three actions; any other is an error."""

    action_space = Discrete(3)

    def action(self, action):
        assert self.action_space.contains(np.int64(action))
        return action


class Start5(gym.ActionWrapper):
    action_space = Discrete(3, start=5)

    def action(self, action):
        assert self.action_space.contains(np.int64(action))
        return action - 5


class Wishes(gym.ObservationWrapper):
    """A mission in digits or in another script."""

    def __init__(self, env, mission):
        super().__init__(env)
        self.mission = mission

    def observation(self, obs):
        return obs | {"mission": self.mission}


def register(name, make, metadata=None):
    """Registers what `make` makes; without `metadata` there is no render mode to ask for."""

    def with_mode(render_mode=None):
        env = make()
        env.unwrapped.metadata, env.unwrapped.render_mode = metadata, render_mode
        return env

    gym.register(f"{name}-v0", with_mode if metadata else make)


for kind, base in {"": Bar, "Frames": BarFrames, "Grid": BarGrid}.items():
    for cls in (
        Plain, NumpySuccess, SuccessAtEnd, SuccessSometimes, TextSuccess, DictSuccess, NumpyReward, Unending,
        InfiniteReward, NanReward, Noise, OwnSuccess,
    ):  # fmt: skip
        register(cls.__name__ + kind, lambda cls=cls, base=base: cls(base()))
    for cls, fps in ((Drawn, None), (NoPicture, 30), (Plain, 30)):
        name = "Undrawn" if cls is Plain else cls.__name__
        metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
        register(name + kind, lambda cls=cls, base=base: cls(base()), metadata)
    register(f"Recorded{kind}", lambda base=base: gym.wrappers.RecordEpisodeStatistics(Plain(base())))
for kind, base in {"Frames": BarFrames, "Grid": BarGrid}.items():
    register(f"Start5{kind}", lambda base=base: Start5(base()))
register("NanObservation", lambda: NanObservation(Bar()))
register("Wide", lambda: Wide(Bar()))
register("FewGrid", lambda: Few(BarGrid()))
register("LateWordGrid", lambda: LateWord(BarGrid()))
register("DigitsGrid", lambda: Wishes(BarGrid(), "go to room 3"))
register("GreekGrid", lambda: Wishes(BarGrid(), "go to the πόρτα"))
