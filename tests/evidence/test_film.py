"""The film of learning shows each stop of a run for as long as the others, and its committed copy is small."""

import pytest
from harness import ROOT
from PIL import Image

import gipo_minigrid_vision
from analysis import film
from gipo_minigrid_vision import seed_everything, start_envs


@pytest.mark.slow
def test_a_run_is_filmed_at_each_stop_once(tmp_path):
    run = ("gipo_minigrid_vision.py", "MiniGrid-Fetch-5x5-N2-v0", 1, (1024, 2048))
    film.record(tmp_path, *run)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*.mp4")}
    assert {path.name for path in made} == {"1024.mp4", "2048.mp4"}
    film.record(tmp_path, *run)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*.mp4")} == made
    film.compose([tmp_path, tmp_path], tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as picture:
        duration = 0
        for i in range(picture.n_frames):  # equal frames are stored as one that lasts longer
            picture.seek(i)
            duration += picture.info["duration"]
        assert duration == 2 * 1000 * film.SECONDS
        assert picture.size == (2 * (film.HEIGHT + film.GAP) + film.GAP, film.TITLE + film.HEIGHT + film.GAP)


def test_the_mission_is_that_of_the_evaluation():
    args = gipo_minigrid_vision.Minigrid("MiniGrid-GoToObject-6x6-N2-v0", seed=2)
    with start_envs(args, 1, seed_everything(2, 10**9)) as (envs, _):
        (expected,) = envs.unwrapped.get_attr("mission")
    assert film.mission("MiniGrid-GoToObject-6x6-N2-v0", 2) == f"“{expected}”" and len(expected.split()) > 3
    assert film.mission("Hopper-v5", 1) == ""


def test_the_film_of_the_readme_is_small():
    assert (ROOT / "docs" / "figures" / "learning.gif").stat().st_size < 2_000_000
