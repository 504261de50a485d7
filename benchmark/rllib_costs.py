"""What a message of an actor and a gradient step cost in gipo_rllib.py, at its defaults on an idle machine.

./benchmark.sh costs        # writes benchmark/results/costs.csv

There is one actor, so that on two cores it and the learner do not wait for each other. Times are in seconds. A message
is what an actor sends at a time: --num-steps steps of --num-envs environments.
"""

import csv
import os
import sys
import time
from pathlib import Path
from statistics import median

import ray
import torch
from ray import cloudpickle

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import gipo_rllib  # noqa: E402 (found by the path above)

TRAINING = 60  # seconds
MESSAGES = 100


def costs() -> dict[str, float]:
    """The measured costs by name, and the sizes that an estimate needs."""
    args = gipo_rllib.Args(num_env_runners=1, iteration_seconds=TRAINING)
    algorithm = gipo_rllib.make_config(args).build_algo()
    result = algorithm.train()
    learners = result["learners"]["__all_modules__"]
    (actor,) = algorithm.env_runner_group._worker_manager.actors().values()
    received, sizes = [], []
    for _ in range(MESSAGES):
        reference = actor.sample_get_state_and_metrics.remote()
        ray.wait([reference])
        start = time.perf_counter()
        message = ray.get(reference)
        algorithm.metrics.aggregate([message[2]], key="costs")
        received.append(time.perf_counter() - start)
        sizes.append(len(cloudpickle.dumps(message)))
    algorithm.stop()
    return {
        "play_seconds": result["env_runners"]["sample"],
        "receive_seconds": median(received),
        "batch_seconds": learners["learner_connector"]["connector_pipeline_timer"],
        "update_seconds": learners["learner_thread_update_timer"],
        "message_bytes": median(sizes),
        "message_steps": args.num_envs * args.num_steps,
        "batch_steps": args.batch_size,
        "reuse": args.buffer_reuse,
    }


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(ROOT)  # so that the actors find gipo_rllib
    torch.set_num_threads(1)  # as the script does
    ray.init(include_dashboard=False, log_to_driver=False)
    found = costs()
    with (ROOT / "benchmark" / "results" / "costs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("quantity", "value"), *((name, f"{value:.4g}") for name, value in found.items())])
    for name, value in found.items():
        print(f"{name:20} {value:.4g}")
