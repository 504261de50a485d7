"""--compile and --bfloat16 change the speed and the last digits, and nothing else."""

import sys

import pytest
import torch
from harness import load, run, scalars


def test_compiled_loss_is_the_loss(monkeypatch, tmp_path):
    flags = "--env-id probes:Bar-v0 --num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 2".split()
    logged = []
    for extra in ([], ["--compile"]):
        folder = tmp_path / f"run{len(logged)}"
        folder.mkdir()
        end = run(load("gipo_continuous"), monkeypatch, folder, [*flags, "--total-timesteps", "64", *extra])
        assert (end.loss_of is end.minibatch_loss) == (not extra)
        logged.append(scalars(folder))
    for tag, points in logged[0].items():
        if tag != "charts/SPS":
            assert logged[1][tag] == [(step, pytest.approx(value, rel=1e-3, abs=1e-5)) for step, value in points], tag


def test_bfloat16_ends_at_the_features(monkeypatch):
    module = load("gipo_atari")
    agents = []
    for flags in ([], ["--bfloat16"]):
        monkeypatch.setattr(sys, "argv", ["gipo_atari", "--num-envs", "2", *flags])
        args = module.parse_args()
        agents.append(module.AtariAgent(module.make_atari_envs(args), args))
    agents[1].load_state_dict(agents[0].state_dict())
    obs, action = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8), torch.arange(8) % 4
    exact, rounded = (agent.get_action_and_value(obs, action) for agent in agents)
    assert all(output.dtype == torch.float32 for output in rounded[1:])
    assert not torch.equal(exact[3], rounded[3])
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.01)


def test_bfloat16_acts_as_it_learns(monkeypatch, tmp_path):
    module = load("gipo_atari")
    largest = []
    policy_loss = module.policy_loss

    def spy(logratio, *rest):
        largest.append(logratio.detach().abs().max().item())
        return policy_loss(logratio, *rest)

    module.policy_loss = spy
    flags = "--env-id probes:Frames-v0 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 16 --bfloat16"
    run(module, monkeypatch, tmp_path, flags.split())
    assert largest[0] < 1e-4
