"""--compile and --bfloat16 change the speed and the last digits, and nothing else."""

import pytest
import torch
from harness import flags, load, run, watch
from torch._dynamo.utils import counters


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gipo_continuous", "ppo_baseline"])
def test_compiled_gradient_step_is_the_gradient_step(name, monkeypatch, tmp_path):
    argv = ["continuous"] if name == "ppo_baseline" else []
    argv += "--env-id probes:Bar-v0 --num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 5".split()
    torch._dynamo.reset()
    counters.clear()
    starts, ends = [], []
    for extra in ([], ["--compile"]):
        module = load(name)
        start = watch(
            monkeypatch, module, "refresh_advantages", lambda *args: [p.clone() for p in args[3].parameters()]
        )
        end = run(module, monkeypatch, tmp_path / f"run{len(ends)}", [*argv, "--total-timesteps", 160, *extra])
        starts.append(start[0])
        ends.append(list(end.agent.parameters()))
        assert {state["step"].item() for state in end.optimizer.state.values()} == {50}
        assert hasattr(end.gradient_step, "_torchdynamo_orig_callable") == bool(extra)
    for first, eager, compiled in zip(starts[0], *ends, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=0)
        assert (eager - first).abs().max() > 1e-3
    # our code is one graph and is compiled once; torch itself breaks it before the step of an optimizer, a second one
    assert counters["stats"]["unique_graphs"] == 2
    (reason,) = counters["graph_break"]
    assert "torch._dynamo.graph_break()" in reason


def test_bfloat16_ends_at_the_features():
    module = load("gipo_atari")
    agents = []
    for bfloat16 in (False, True):
        args = flags(module, num_envs=2, bfloat16=bfloat16)
        agents.append(module.AtariAgent(module.make_atari_envs(args, 2, seed=0), args))
    agents[1].load_state_dict(agents[0].state_dict())
    obs, action = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8), torch.arange(8) % 4
    exact, rounded = (agent.get_action_and_value(obs, action) for agent in agents)
    assert all(output.dtype == torch.float32 for output in rounded[1:])
    assert not torch.equal(exact[3], rounded[3])
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.01)


def test_bfloat16_acts_as_it_learns(monkeypatch, tmp_path):
    module = load("gipo_atari")
    largest = watch(monkeypatch, module, "policy_loss", lambda logratio, *_: logratio.abs().max().item())
    argv = "--env-id probes:Frames-v0 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 16 --bfloat16"
    run(module, monkeypatch, tmp_path, argv.split())
    assert largest[0] < 1e-4
