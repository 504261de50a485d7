"""--compile and --bfloat16 change the speed and the last digits, and nothing else."""

import pytest
import torch
from harness import watch
from torch._dynamo.utils import counters

import gipo_atari
import gipo_continuous
from gipo_atari import Atari


@pytest.mark.slow
def test_the_compiled_update_is_the_update(monkeypatch):
    """It ends at the same weights and moments; it is compiled at the start, not once for each learning rate."""
    torch._dynamo.reset()
    counters.clear()

    def note(buffer, slots, agent, args):
        return [p.clone() for p in agent.parameters()], counters["stats"]["unique_graphs"]

    noted = watch(monkeypatch, gipo_continuous, "refresh_advantages", note)
    sizes = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 5, "eval_episodes": 0}
    ends = []
    for compiled in (False, True):
        args = gipo_continuous.Continuous("probes:Bar-v0", 160, compile=compiled, **sizes)
        agent, folder = gipo_continuous.train(args)
        ends.append(list(agent.parameters()))
        moments = gipo_continuous.load_checkpoint(folder, gipo_continuous.Continuous)["optimizer"]["state"].values()
        assert {state["step"].item() for state in moments} == {50}
    for first, eager, compiled in zip(noted[0][0], *ends, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=0)
        assert (eager - first).abs().max() > 1e-3
    graphs = [count for _, count in noted]
    assert graphs[5] == 0 < graphs[6] and graphs[7] == graphs[9] == counters["stats"]["unique_graphs"]
    assert not any("backward()" in reason for reason in counters["graph_break"])  # it is in the graph of the loss


def test_bfloat16_ends_at_the_features():
    agents = []
    for bfloat16 in (False, True):
        args = Atari(num_envs=2, bfloat16=bfloat16)
        agents.append(args.Agent(args.make_envs(args, 2, seed=0), args))
    agents[1].load_state_dict(agents[0].state_dict())
    obs, action = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8), torch.arange(8) % 4
    exact, rounded = (agent.get_action_and_value(obs, action) for agent in agents)
    assert all(output.dtype == torch.float32 for output in rounded[1:])
    assert not torch.equal(exact[3], rounded[3])
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.01)


def test_bfloat16_acts_as_it_learns(monkeypatch):
    largest = watch(monkeypatch, gipo_atari, "policy_loss", lambda logratio, *_: logratio.abs().max().item())
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "eval_episodes": 0}
    gipo_atari.train(Atari("probes:Frames-v0", 16, bfloat16=True, **sizes))
    assert largest[0] < 1e-4
