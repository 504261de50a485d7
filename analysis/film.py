"""The README's film of learning: one run of each domain, filmed early, midway and at its end.

    python -m analysis.film        # trains in runs/film, writes docs/figures/learning.gif; an hour or two on a CPU

The scripts make the videos themselves: each run stops at a number of steps, is filmed by --capture-video and resumed.
A video that is there is not made again, so delete a run's folder if it was interrupted. MuJoCo's need EGL on a machine
without a screen.
"""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
from moviepy import VideoFileClip
from PIL import Image, ImageDraw, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gipo_minigrid_vision import seed_everything  # it also registers MiniGrid

ROOT = Path(__file__).parents[1]
# script, environment, seed, and the steps after which it is filmed
RUNS = (
    ("gipo_atari.py", "ALE/Pong-v5", 1, (1_024, 512_000, 1_024_000)),
    ("gipo_continuous.py", "Hopper-v5", 1, (2_048, 204_800, 1_024_000)),
    ("gipo_minigrid_vision.py", "MiniGrid-GoToObject-6x6-N2-v0", 2, (1_024, 51_200, 153_600)),
)
SECONDS, FPS = 5, 10  # of each of the three parts
HEIGHT, GAP, TITLE, COLORS = 320, 12, 60, 64  # pixels; colors of the palette


def record(folder: Path, script: str, env_id: str, seed: int, stops: tuple[int, ...]):
    """Train and film up to each of the stops. The run's folder is folder/runs/*."""
    folder.mkdir(parents=True, exist_ok=True)
    for steps in stops:
        if list(folder.glob(f"runs/*/{steps}.mp4")):
            continue
        known = [str(path.relative_to(folder)) for path in folder.glob("runs/*")]
        new = ["--env-id", env_id, "--seed", str(seed), "--buffer-epochs", "8", "--no-anneal-lr"]
        flags = ["--resume", *known] if known else new
        command = [sys.executable, ROOT / script, *flags, "--total-timesteps", str(steps), "--capture-video"]
        subprocess.run(command, cwd=folder, env={"MUJOCO_GL": "egl"} | os.environ, check=True)


def frames(path: Path) -> list[Image.Image]:
    """The first SECONDS of a video, all of one height. A shorter one rests on its last picture."""
    with VideoFileClip(str(path)) as clip:
        pictures = [Image.fromarray(frame) for frame, _ in zip(clip.iter_frames(fps=FPS), range(SECONDS * FPS))]
    pictures += pictures[-1:] * (SECONDS * FPS - len(pictures))
    return [one.resize((round(one.width * HEIGHT / one.height), HEIGHT)) for one in pictures]


def mission(env_id: str, seed: int) -> str:
    """What the agent is told in the episode of the evaluation; empty without words."""
    if not env_id.startswith("MiniGrid"):
        return ""
    with gym.make(env_id) as env:
        obs, _ = env.reset(seed=seed_everything(seed, 10**9))
    return f"“{obs['mission']}”"


def compose(folders: list[Path], path: Path):
    """Write a GIF of the videos of some runs, side by side.

    Above each stand environment, steps, the return of the episode, and the mission.
    """
    font, parts = ImageFont.load_default(15), []
    for folder in folders:
        (run,) = folder.glob("runs/*")
        log = EventAccumulator(str(run)).Reload()
        returns = {event.step: event.value for event in log.Scalars("eval/episodic_return")}
        env_id, _, seed, *_ = run.name.split("__")
        name = env_id.removeprefix("ALE-").removeprefix("MiniGrid-")
        told = mission(env_id, int(seed))
        titles = {step: f"{name}\n{step:,} steps: {value:.2f}\n{told}" for step, value in returns.items()}
        parts.append([(title, frames(run / f"{step}.mp4")) for step, title in titles.items()])
    shots = []
    for columns in zip(*parts):
        for pictures in zip(*(clip for _, clip in columns)):
            width = sum(one.width + GAP for one in pictures) + GAP
            shot = Image.new("RGB", (width, TITLE + HEIGHT + GAP), "white")
            left = GAP
            for (title, _), one in zip(columns, pictures):
                ImageDraw.Draw(shot).text((left, 3), title, "black", font)
                shot.paste(one, (left, TITLE))
                left += one.width + GAP
            shots.append(shot)
    strip = Image.fromarray(np.concatenate([np.asarray(shot) for shot in shots[:: SECONDS * FPS // 5]]))
    palette = strip.quantize(COLORS)  # one for all frames, and no dithering, because GIF stores what has changed
    shots = [shot.quantize(palette=palette, dither=Image.Dither.NONE) for shot in shots]
    shots[0].save(path, save_all=True, append_images=shots[1:], duration=1000 // FPS, loop=0, optimize=True)


if __name__ == "__main__":
    places = [ROOT / "runs" / "film" / Path(script).stem for script, *_ in RUNS]
    for place, run in zip(places, RUNS):
        record(place, *run)
    compose(places, ROOT / "docs" / "figures" / "learning.gif")
