"""A mistake in the command line: one sentence that names the flag, exit code 2, and nothing created."""

import pytest
from harness import load, run

CASES = [
    ("gipo_continuous", "--sigma 0"),
    ("gipo_continuous", "--sigma -1"),
    ("gipo_continuous", "--sigma nan"),
    ("gipo_continuous", "--sigma-neg 0"),
    ("gipo_continuous", "--buffer-epochs 0"),
    ("gipo_continuous", "--policy-lag -1"),
    ("gipo_continuous", "--total-timesteps 2047"),
    ("gipo_continuous", "--total-timesteps 1e6"),
    ("gipo_continuous", "--num-minibatches 7"),
    ("gipo_continuous", "--num-minibatches 0"),
    ("gipo_continuous", "--num-minibatches 2048"),
    ("gipo_continuous", "--minibatch-size 1"),
    ("gipo_continuous", "--num-steps 1"),
    ("gipo_continuous", "--num-envs 0"),
    ("gipo_continuous", "--update-epochs 0"),
    ("gipo_continuous", "--learning-rate inf"),
    ("gipo_continuous", "--learning-rate 0"),
    ("gipo_continuous", "--gamma 1.1"),
    ("gipo_continuous", "--gae-lambda nan"),
    ("gipo_continuous", "--ent-coef -0.1"),
    ("gipo_continuous", "--vf-coef inf"),
    ("gipo_continuous", "--kl-coef -0.1"),
    ("gipo_continuous", "--max-grad-norm 0"),
    ("gipo_continuous", "--seed -1"),
    ("gipo_continuous", "--freeze-buffer-at 0"),
    ("gipo_continuous", "--checkpoint-interval 0"),
    ("gipo_continuous", "--capture-video --eval-episodes 0"),
    ("gipo_continuous", "--device tpu"),
    ("gipo_continuous", "--learning-rate 2"),
    ("gipo_continuous", "--seed 2147483647"),
    ("gipo_continuous", "--env-id HalfCheetah-v3"),
    ("gipo_continuous", "--advantage-source fresh"),
    ("gipo_continuous", "--env-id HalfCheeta-v5"),
    ("gipo_continuous", "--env-id Meta-World/reech-v3"),
    ("gipo_continuous", "--env-id nowhere:HalfCheetah-v5"),
    ("gipo_continuous", "--env-id CartPole-v1"),
    ("gipo_atari", "--env-id ALE/Brekout-v5"),
    ("gipo_atari", "--env-id CartPole-v1"),
    ("gipo_atari", "--sticky-actions 1.5"),
    ("gipo_minigrid_vision", "--env-id MiniGrid-Fetsh-5x5-N2-v0"),
    ("gipo_minigrid_vision", "--env-id CartPole-v1"),
    ("ppo_baseline", "continuous --clip-coef 0"),
    ("ppo_baseline", "continuous --clip-coef nan"),
]
NEAR = {
    "HalfCheeta-v5": "HalfCheetah",
    "Meta-World/reech-v3": "reach-v3",
    "ALE/Brekout-v5": "Breakout",
    "MiniGrid-Fetsh-5x5-N2-v0": "MiniGrid-Fetch-5x5-N2",
}


@pytest.mark.parametrize(("name", "flags"), CASES)
def test_refused(name, flags, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        run(load(name), monkeypatch, tmp_path, flags.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    *_, flag, value = flags.split()
    assert flag in message and NEAR.get(value, "") in message
    assert "Traceback" not in message
    if message.startswith("error"):  # ours; the others come in the frame that tyro draws
        assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_cuda(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "--device cuda:77" in refused(load("gipo_atari"), ["--device", "cuda:77"])
    assert list(tmp_path.iterdir()) == []


def test_a_domain_must_be_named(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(load("ppo_baseline"), monkeypatch, tmp_path, [])
    assert stop.value.code == 2
    assert "continuous" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
