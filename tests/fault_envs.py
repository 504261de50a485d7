"""Environments that behave as those of users do, each with one trait that could end or spoil a run.

`fault_envs:Name-v0` is a continuous one, NameFrames-v0 and NameGrid-v0 have the shapes of Atari and of MiniGrid.
"""

import random

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from probes import Bar, BarFrames, BarGrid

OPEN = set()  # copies that nobody has closed, as a simulator's processes would be


class Odd(gym.Wrapper):
    """Episodes of 7 steps, the first one of 3 to 5, so that parallel environments are not in step.

    Traits change what it observes, pays, reports and draws; each is a function of this environment.
    """

    def __init__(self, env, actions=None, observations=None, unending=False, **traits):
        super().__init__(env)
        self.action_space, self.observation_space = actions or env.action_space, observations or env.observation_space
        self.unending, self.traits, self.episodes = unending, traits, 0
        OPEN.add(self)

    def close(self):
        OPEN.discard(self)

    def trait(self, name, value):
        return self.traits[name](self, value) if name in self.traits else value

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.first_seed, self.steps = seed, 0
        self.limit = self.trait("limit", 7 if seed is None else 3 + seed % 3)
        self.time = 0
        self.episodes += 1
        obs, info = self.env.reset(seed=seed)
        return self.trait("observe", obs), info

    def step(self, action):
        if isinstance(self.action_space, Discrete):
            assert self.action_space.contains(np.int64(action))
            action = action - self.action_space.start
        obs, reward, terminated, _, info = self.env.step(action)
        self.time += 1
        self.steps += 1  # since the reset with a seed
        truncated = self.time == self.limit and not terminated
        ends = (False, False) if self.unending else (terminated, truncated)
        return self.trait("observe", obs), self.trait("pay", reward), *ends, self.trait("report", info)

    def render(self):
        return self.traits["draw"](self) if "draw" in self.traits else self.env.render()


def noise(env, obs):
    """What is observed shows the stream of random numbers."""
    drawn = env.unwrapped.np_random.random((7, 7))
    if isinstance(obs, dict):
        walls = np.stack([np.full((7, 7), 2), 6 * drawn, np.zeros((7, 7))], 2)  # in six colors
        return obs | {"image": walls.astype(np.uint8)}
    return np.resize(10 * drawn, obs.shape).astype(obs.dtype)


def mission(word):
    """A word that comes in the sixth episode."""
    return lambda env, obs: obs | {"mission": f"go to the {word if env.episodes > 5 else 'door'}"}


def frame(env, channels=3):
    return np.full((64, 64, channels), 30 * env.time, np.uint8)


TRAITS = {
    "Plain": {},
    # numpy's bool, of which gymnasium makes an array of objects, with None where an environment resets
    "NumpySuccess": {"report": lambda env, _: {"success": np.float64(env.time) > 1}},
    "SuccessAtEnd": {"report": lambda env, _: {"success": np.bool_(True)} if env.time == env.limit else {}},
    # only a success is reported: the first episode in every other environment
    "SuccessSometimes": {"report": lambda env, _: {"success": True} if env.first_seed % 2 and env.steps == 2 else {}},
    "SuccessLate": {"report": lambda env, _: {"success": True} if env.first_seed % 2 and env.steps == 12 else {}},
    # paid in every step, and no episode is a success
    "OwnSuccess": {"pay": lambda *_: 0.1, "report": lambda *_: {"success": False}},
    "LifeLost": {"report": lambda env, _: {"life_lost": np.bool_(True)} if env.time == 2 else {}},
    "NumpyReward": {"pay": lambda env, reward: np.float64(reward) - 0.5},
    "NanReward": {"pay": lambda env, reward: np.nan if env.steps == 70 else reward},
    "NanEarly": {"pay": lambda env, reward: np.nan if env.steps == 2 else reward},
    "InfiniteReward": {"pay": lambda env, reward: -np.inf if env.steps == 70 else reward},
    "Broken": {"pay": lambda env, reward: reward if env.steps < 20 else 1 / 0},
    "Unending": {"unending": True},
    "Uneven": {"limit": lambda env, _: 3 if env.first_seed % 2 else 7},
    # draws from the generators of the whole program
    "GlobalRandom": {"pay": lambda env, reward: reward + random.random() + np.random.random()},
    "Noise": {"observe": noise},
}
PICTURES = {
    "Undrawn": {},
    "Drawn": {"draw": frame},
    "NoPicture": {"draw": lambda env: None},
    "Alpha": {"draw": lambda env: frame(env, channels=4)},
    "Bright": {"draw": lambda env: np.ones((64, 64, 3))},
    "DrawnAtFirst": {"draw": lambda env: frame(env) if env.time < 2 else 1 / 0},
}


def register(name, make, metadata=None):
    """Registers what `make` makes; without `metadata` there is no render mode to ask for."""

    def with_mode(render_mode=None):
        env = make()
        env.unwrapped.metadata, env.unwrapped.render_mode = metadata, render_mode
        return env

    gym.register(f"{name}-v0", with_mode if metadata else make)


for kind, base in {"": Bar, "Frames": BarFrames, "Grid": BarGrid}.items():
    for name, traits in (TRAITS | PICTURES).items():
        fps = None if name == "Drawn" else 30  # how many pictures make a second; some do not say it
        metadata = {"render_modes": ["rgb_array"], "render_fps": fps} if name in PICTURES else None
        register(name + kind, lambda base=base, traits=traits: Odd(base(), **traits), metadata)
    register(f"Recorded{kind}", lambda base=base: gym.wrappers.RecordEpisodeStatistics(Odd(base())))
    register(f"Start5{kind}", lambda base=base: Odd(base(), Discrete(3, start=5)))
register("NanObservation", lambda: Odd(Bar(), observe=lambda env, obs: obs * np.nan if env.steps == 70 else obs))
register("Empty", lambda: Odd(Bar(), None, Box(-1, 1, (0,), np.float32), observe=lambda *_: np.zeros(0, np.float32)))
register("Wide", lambda: Odd(Bar(), Box(0, 1000, (2,), np.float32)))
register("Tiny", lambda: Odd(Bar(), Box(-0.01, 0.01, (2,), np.float32)))
register("Integers", lambda: Odd(Bar(), Box(-10, 10, (2,), np.int64)))
register("Bytes", lambda: Odd(Bar(), Box(-1, 1, (2,), np.int8)))
register("FewGrid", lambda: Odd(BarGrid(), Discrete(3)))
for name, word in {"Late": "elephant", "Digits": "3", "Greek": "πόρτα"}.items():
    register(f"{name}WordGrid", lambda word=word: Odd(BarGrid(), observe=mission(word)))
