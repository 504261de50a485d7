"""Environments that behave as those of users do, each with one trait that could end or spoil a run.

`fault_envs:Name-v0` is a continuous one, NameFrames-v0 and NameGrid-v0 have the shapes of Atari and of MiniGrid.
"""

import random

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from probes import Bar, BarFrames, BarGrid

OPEN = set()  # copies that nobody has closed, as a simulator's processes would be


class Plain(gym.Wrapper):
    """Episodes of 7 steps, the first one of 3 to 5, so that parallel environments are not in step."""

    def __init__(self, env):
        super().__init__(env)
        OPEN.add(self)

    def close(self):
        OPEN.discard(self)

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


# ----------------------------------------------- what the info reports -----------------------------------------------
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


class OwnSuccess(Plain):
    """Paid in every step, and no episode is a success."""

    def reward(self, reward):
        return 0.1

    def info(self):
        return {"success": False}


class LifeLost(Plain):
    """Another game's lives, and not a bool."""

    def info(self):
        return {"life_lost": np.bool_(True)} if self.time == 2 else {}


# -------------------------------------------------- what steps return ------------------------------------------------
class NumpyReward(Plain):
    def reward(self, reward):
        return np.float64(reward) - 0.5


class NanReward(Plain):
    when = 70

    def reward(self, reward):
        return np.nan if self.steps == self.when else reward


class NanEarly(NanReward):
    when = 2


class InfiniteReward(Plain):
    def reward(self, reward):
        return -np.inf if self.steps == 70 else reward


class NanObservation(Plain):
    def observation(self, obs):
        return obs * np.float32(np.nan if self.steps == 70 else 1)


class Broken(Plain):
    """A simulator that fails."""

    def reward(self, reward):
        return reward if self.steps < 20 else 1 / 0


class Unending(Plain):
    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        return obs, reward, False, False, info


class GlobalRandom(Plain):
    """Draws from the generators of the whole program."""

    def reward(self, reward):
        return reward + random.random() + np.random.random()


class Noise(Plain):
    """What is observed first shows the stream of random numbers."""

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        noise = self.unwrapped.np_random.random((7, 7))
        if isinstance(obs, dict):
            walls = np.stack([np.full((7, 7), 2), 6 * noise, np.zeros((7, 7))], 2)  # in six colors
            return obs | {"image": walls.astype(np.uint8)}, info
        return np.resize(10 * noise, obs.shape).astype(obs.dtype), info


# ------------------------------------------------------ pictures -----------------------------------------------------
class Drawn(Plain):
    """Pictures, but no word on how many of them make a second."""

    def render(self):
        return np.full((64, 64, 3), 30 * self.time, np.uint8)


class NoPicture(Plain):
    """Accepts the render mode and draws nothing."""

    def render(self):
        return None


class Alpha(Plain):
    def render(self):
        return np.full((64, 64, 4), 255, np.uint8)


class Bright(Plain):
    """Pictures of floating point numbers."""

    def render(self):
        return np.ones((64, 64, 3))


class DrawnAtFirst(Drawn):
    """The renderer fails in the middle of an episode."""

    def render(self):
        return super().render() if self.time < 2 else 1 / 0


class Resized(Drawn):
    """A window that someone makes larger."""

    def render(self):
        return super().render() if self.time < 2 else np.zeros((80, 80, 3), np.uint8)


# ------------------------------------------------------- spaces ------------------------------------------------------
class Ranged(Plain):
    """Actions of some range and type; no reward depends on them."""

    def __init__(self, env, bound, dtype=np.float32):
        super().__init__(env)
        self.action_space = Box(-bound, bound, (2,), dtype)


class Empty(Plain):
    observation_space = Box(-1, 1, (0,), np.float32)

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return np.zeros(0, np.float32), {}


class Few(gym.ActionWrapper):
    """Three actions from some number on; any other is an error."""

    def __init__(self, env, start):
        super().__init__(env)
        self.action_space = Discrete(3, start=start)

    def action(self, action):
        assert self.action_space.contains(np.int64(action))
        return action - self.action_space.start


class Mission(Plain):
    """The word of the mission from the sixth episode on."""

    episodes = 0

    def __init__(self, env, word):
        super().__init__(env)
        self.word = word

    def reset(self, *, seed=None, options=None):
        self.episodes += 1
        obs, info = super().reset(seed=seed)
        return obs | {"mission": f"go to the {self.word if self.episodes > 5 else 'door'}"}, info


def register(name, make, metadata=None):
    """Registers what `make` makes; without `metadata` there is no render mode to ask for."""

    def with_mode(render_mode=None):
        env = make()
        env.unwrapped.metadata, env.unwrapped.render_mode = metadata, render_mode
        return env

    gym.register(f"{name}-v0", with_mode if metadata else make)


for kind, base in {"": Bar, "Frames": BarFrames, "Grid": BarGrid}.items():
    for cls in (
        Plain, NumpySuccess, SuccessAtEnd, SuccessSometimes, OwnSuccess, LifeLost, NumpyReward, NanReward, NanEarly,
        InfiniteReward, Broken, Unending, GlobalRandom, Noise,
    ):  # fmt: skip
        register(cls.__name__ + kind, lambda cls=cls, base=base: cls(base()))
    for cls in (Plain, Drawn, NoPicture, Alpha, Bright, DrawnAtFirst, Resized):
        name = "Undrawn" if cls is Plain else cls.__name__
        metadata = {"render_modes": ["rgb_array"], "render_fps": None if cls is Drawn else 30}
        register(name + kind, lambda cls=cls, base=base: cls(base()), metadata)
    register(f"Recorded{kind}", lambda base=base: gym.wrappers.RecordEpisodeStatistics(Plain(base())))
    register(f"Start5{kind}", lambda base=base: Few(Plain(base()), 5))
register("NanObservation", lambda: NanObservation(Bar()))
register("Empty", lambda: Empty(Bar()))
register("Wide", lambda: Ranged(Bar(), 1000))
register("Tiny", lambda: Ranged(Bar(), 0.01))
register("Integers", lambda: Ranged(Bar(), 10, np.int64))
register("Bytes", lambda: Ranged(Bar(), 1, np.int8))
register("FewGrid", lambda: Few(Plain(BarGrid()), 0))
for name, word in {"Late": "elephant", "Digits": "3", "Greek": "πόρτα"}.items():
    register(f"{name}WordGrid", lambda word=word: Mission(BarGrid(), word))
