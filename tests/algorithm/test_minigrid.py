"""The agent's view is the library's picture, pixel by pixel, and its words are the mission's."""

import gymnasium as gym
import numpy as np
import pytest
from minigrid.wrappers import RGBImgPartialObsWrapper

from gipo_minigrid_vision import PIXELS, VOCABULARY, InputError, PixelsAndWords

FETCH = "MiniGrid-Fetch-5x5-N2-v0"
IDS = [
    FETCH,
    "MiniGrid-DoorKey-5x5-v0",
    "MiniGrid-GoToDoor-5x5-v0",
    "MiniGrid-LavaCrossingS9N1-v0",
    "MiniGrid-ObstructedMaze-1Dlhb-v0",
    "MiniGrid-Playground-v0",
    "BabyAI-BossLevel-v0",
]


class Mission(gym.ObservationWrapper):
    """The fetch task with another mission."""

    def __init__(self, mission):
        super().__init__(gym.make(FETCH))
        self.mission = mission

    def observation(self, obs):
        return obs | {"mission": self.mission}


def words_of(obs):
    return [VOCABULARY[i - 1] for i in obs[PIXELS:] if i]


@pytest.mark.parametrize("env_id", IDS)
def test_pixels_and_words(env_id):
    packed, pictures = PixelsAndWords(gym.make(env_id), ""), RGBImgPartialObsWrapper(gym.make(env_id))
    assert packed.action_space.n == 7
    rng = np.random.default_rng(0)
    for seed in range(3):
        (obs, _), (picture, _) = packed.reset(seed=seed), pictures.reset(seed=seed)
        for _ in range(100):
            np.testing.assert_array_equal(obs[:PIXELS].reshape(56, 56, 3), picture["image"])
            assert words_of(obs) == picture["mission"].replace(",", "").split()
            action = rng.integers(7)
            obs, *_, terminated, truncated, _ = packed.step(action)
            picture, *_ = pictures.step(action)
            if terminated or truncated:
                break


def test_missions_of_every_level_are_covered():
    # the WFC levels need patterns that the library's wheel does not bring
    ids = [env_id for env_id in gym.registry if env_id.startswith(("MiniGrid-", "BabyAI-")) and "WFC" not in env_id]
    assert len(ids) > 150
    for env_id in ids:
        env = PixelsAndWords(gym.make(env_id, disable_env_checker=True), env_id)
        for seed in range(5):
            env.reset(seed=seed)  # an unknown word would raise


def test_an_unknown_word_is_one_clear_sentence():
    with pytest.raises(InputError, match=r"^--env-id Foreign-v0: .*zeppelin.*VOCABULARY.*\.$"):
        PixelsAndWords(Mission("fetch the zeppelin"), "Foreign-v0").reset()


def test_a_long_mission_loses_its_end():
    obs, _ = PixelsAndWords(Mission("go to the red ball " * 9), "").reset()
    assert words_of(obs) == ("go to the red ball " * 8).split()


@pytest.mark.parametrize(
    ("env_id", "count"), [(FETCH, 4), ("MiniGrid-GoToDoor-5x5-v0", 4), ("BabyAI-GoTo-v0", 7), (IDS[1], 7)]
)
def test_actions_by_task(env_id, count):
    """The last of the four of GoToDoor is `done`, which ends the episode there."""
    env = PixelsAndWords(gym.make(env_id), env_id)
    assert env.action_space.n == count
    env.reset(seed=0)
    assert env.step(3)[2] == ("GoToDoor" in env_id)
