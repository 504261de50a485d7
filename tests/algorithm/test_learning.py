"""Real learning, short, well above chance; and the methods' first gradients, which must agree on-policy."""

import numpy as np
import pytest
import torch
from harness import ENTRIES, load, run, scalars

ON_POLICY = {
    "atari": "--env-id probes:Frames-v0 --num-envs 2 --num-steps 8 --total-timesteps 16".split(),
    "continuous": "--env-id Hopper-v5 --num-envs 4 --num-steps 32 --total-timesteps 128".split(),
    "minigrid": "--num-envs 2 --num-steps 16 --total-timesteps 32".split(),
}


def last(folder, tag, share=0.2):
    """Mean of the last share of a logged curve."""
    values = [value for _, value in scalars(folder)[tag]]
    return np.mean(values[-max(1, int(len(values) * share)) :])


@pytest.mark.parametrize("epochs", [1, 8])
def test_continuous(epochs, monkeypatch, tmp_path):
    """InvertedPendulum-v5: the pole stands for 1,000 steps at most; random actions keep it up for about 6."""
    argv = ["--env-id", "InvertedPendulum-v5", "--total-timesteps", 60_000, "--buffer-epochs", epochs]
    run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    assert last(tmp_path, "charts/episodic_return") > 300


def test_minigrid(monkeypatch, tmp_path):
    """Walk to the goal of an empty room: random actions earn about 0.4, the shortest ways 0.95."""
    argv = "--env-id MiniGrid-Empty-5x5-v0 --total-timesteps 16384".split()
    run(load("gipo_minigrid_vision"), monkeypatch, tmp_path, argv)
    assert last(tmp_path, "charts/episodic_return") > 0.85
    assert last(tmp_path, "charts/success_rate") > 0.95


@pytest.mark.parametrize(("name", "domain"), [("gipo_atari", []), ("ppo_baseline", ["atari"])])
def test_atari(name, domain, monkeypatch, tmp_path):
    """Frames: chance earns 8 of 16."""
    flags = "--env-id probes:Frames-v0 --num-steps 32 --total-timesteps 3840 --learning-rate 1e-3".split()
    run(load(name), monkeypatch, tmp_path, [*domain, *flags])
    assert last(tmp_path, "charts/episodic_return") > 14


def first_gradient(name, argv, monkeypatch, folder):
    """Gradient of the first minibatch as the optimizer gets it."""

    class FirstStep(Exception):
        pass

    def stop(self, *args, **kwargs):
        raise FirstStep

    module = load(name)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stop)
        with pytest.raises(FirstStep):
            run(module, patch, folder, argv)
    return torch.cat([parameter.grad.flatten() for parameter in module.agent.parameters()])


@pytest.mark.parametrize(("gipo", "baseline"), list(zip(ENTRIES[:3], ENTRIES[3:], strict=True)))
def test_first_gradient_is_ppo_s(gipo, baseline, monkeypatch, tmp_path):
    (name, _), (_, (domain,)) = gipo, baseline
    gradients = [first_gradient(name, ON_POLICY[domain], monkeypatch, tmp_path)]
    for surrogate in ("clip", "dual-clip", "none", "sapo", "tis", "spo"):
        argv = [domain, *ON_POLICY[domain], "--surrogate", surrogate]
        gradients.append(first_gradient("ppo_baseline", argv, monkeypatch, tmp_path))
    assert gradients[0].norm() > 0.01
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-6 * max(1.0, gradients[0].norm())
