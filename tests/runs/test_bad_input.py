"""A mistake in the input: one sentence that names the flag, exit code 2, and nothing created."""

import re

import pytest
import torch
from short_runs import ATARI, BASELINES, CONTINUOUS, MINIGRID, SIX, three

FLAGS = """--sigma 0; --sigma -1; --sigma nan; --buffer-epochs 0; --policy-lag -1; --total-timesteps 2047;
    --total-timesteps 1e6; --num-minibatches 7; --num-minibatches 0; --num-minibatches 2048; --minibatch-size 0;
    --minibatch-size 1; --num-steps 0; --num-steps 1; --num-envs 0; --update-epochs 0; --learning-rate 0; --gamma -0.1;
    --gamma 1.01; --gae-lambda nan; --gae-lambda 1.01; --ent-coef -0.1; --vf-coef -1; --kl-coef -0.1;
    --max-grad-norm 0; --seed -1; --freeze-buffer-at 0; --checkpoint-interval 0;
    --eval-episodes -1; --device tpu; --device cuda:77; --advantage-source fresh; --kl-to start; --ratio joint;
    --env-id HalfCheetah-v3; --env-id Meta-World/reech-v3; --env-id nowhere:HalfCheetah-v5""".split(";")
CASES = [(CONTINUOUS, flags) for flags in FLAGS]
CASES += [(ATARI, "--sticky-actions 1.5"), (BASELINES[0], "--clip-coef 0"), (BASELINES[2], "--clip-coef nan")]
CASES += [(entry, "--env-id CartPole-v1") for entry in SIX] + [(entry, "--buffer-epochs -1") for entry in SIX]
NEAR = {"Meta-World/reech-v3": "reach-v3", "ALE/Brekout-v5": "Breakout", "MiniGrid-Fetsh-5x5-N2-v0": "MiniGrid-Fetch"}
CASES += [(ATARI, "--env-id ALE/Brekout-v5"), (MINIGRID, "--env-id MiniGrid-Fetsh-5x5-N2-v0")]


@pytest.mark.parametrize(("entry", "flags"), CASES, ids=str)
def test_refused(entry, flags, monkeypatch, tmp_path, capsys):
    assert entry.main(monkeypatch, *flags.split()) == 2
    message = capsys.readouterr().err
    flag, value = flags.split()
    assert flag in message and NEAR.get(value, "") in message and "Traceback" not in message
    if message.startswith("error"):  # ours; the others come in the frame that tyro draws
        assert message.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_a_domain_must_be_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(type(BASELINES[0]), "domain", [])
    assert BASELINES[0].main(monkeypatch) == 2
    assert "continuous" in capsys.readouterr().err and not [*tmp_path.iterdir()]


ENVS = [(entry, env, "actions that count from 0") for env in ("Start5",) for entry in SIX if entry.kind]
ENVS += [(entry, env, "floating point") for env in ("Integers", "Bytes") for entry in (CONTINUOUS, BASELINES[0])]
ENVS += [(entry, "Empty", "flat boxes") for entry in (CONTINUOUS, BASELINES[0])]
ENVS += [(entry, path, "--env-id") for path in (".fault_envs:Plain-v0", "./fault_envs.py:Plain-v0") for entry in SIX]
NO_PICTURES = "Plain", "Undrawn", "NoPicture", "Alpha", "Bright"


@pytest.mark.parametrize(("entry", "env", "why"), ENVS, ids=str)
def test_environments_that_cannot_be_learned_are_refused(entry, env, why, tmp_path):
    """By train(), with an error that every caller can catch as a ValueError."""
    with pytest.raises(ValueError, match=why) as error:
        entry.train(env)
    assert isinstance(error.value, entry.module.InputError) and "--env-id" in str(error.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("entry", SIX, ids=str)
def test_an_error_in_a_module_of_the_user_s_comes_with_its_line(entry, monkeypatch, tmp_path):
    (tmp_path / "of_a_user.py").write_text("\n\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    sentence = re.escape(f"division by zero (ZeroDivisionError in {tmp_path / 'of_a_user.py'}, line 3).")
    with pytest.raises(entry.module.InputError, match=sentence):
        entry.train("of_a_user:Mine-v0")


@pytest.mark.parametrize("entry", SIX, ids=str)
@pytest.mark.parametrize("env", NO_PICTURES)
def test_a_video_that_cannot_be_drawn_is_refused_before_training(env, entry, tmp_path):
    """No render mode, no `render`, no picture from it, one with transparency, one of floating point numbers."""
    with pytest.raises(entry.module.InputError, match="--capture-video"):
        entry.train(env, capture_video=True, eval_episodes=1)
    assert not [*tmp_path.iterdir()]


@three
def test_a_video_is_refused_in_the_evaluation_and_before_a_run_goes_on(entry, refused):
    _, folder = entry.train("NoPicture")
    for flags in (["--evaluate", folder], ["--resume", folder, "--total-timesteps", 99]):
        assert "--capture-video" in refused(entry, *flags, "--capture-video", "--eval-episodes", 1)
    assert torch.load(folder / "checkpoint.pt")["iteration"] == 4


@pytest.mark.parametrize(("name", "word"), [("LateWord", "elephant"), ("DigitsWord", "3"), ("GreekWord", "πόρτα")])
@pytest.mark.parametrize("entry", [MINIGRID, BASELINES[2]], ids=str)
def test_words_outside_of_the_vocabulary(entry, name, word):
    with pytest.raises(entry.module.InputError, match="VOCABULARY") as error:
        entry.train(name, 90)
    assert f"'{word}'" in str(error.value)
