#!/usr/bin/env bash
# Measures the scripts and makes the evidence. --help after a subcommand lists its flags (costs has none).
#
#   ./benchmark.sh quick        GIPO and PPO-clip on fresh and stale data, in about five minutes on two cores
#   ./benchmark.sh speed        steps per second next to the bare environments, and where the time goes
#
# The evidence, in benchmark/results/*.csv. Runs with a row there are skipped: move the file elsewhere to repeat them.
# random, peers-time and costs always measure anew.
#
#   ./benchmark.sh random       random actions, the zero of the scores
#   ./benchmark.sh tune         bandwidths with and without KL, on environments that are not reported; run this first
#   ./benchmark.sh staleness    return against the size K of the replay buffer
#   ./benchmark.sh ablation     GIPO's V-trace, KL term and sigma, one at a time
#   ./benchmark.sh width-tune   candidate widths; run this before width
#   ./benchmark.sh width        GIPO's weight with a width per dimension of an action
#   ./benchmark.sh freeze       nothing enters the buffer after a third of the training
#   ./benchmark.sh lag          the behaviour policy is up to 8 iterations old
#   ./benchmark.sh ant          return against K on Ant, 300,000 steps
#   ./benchmark.sh metaworld    five tasks, and the stale regime of the method's authors on two of them
#   ./benchmark.sh minigrid     pixels and words, large buffers and a policy lag
#   ./benchmark.sh atari        Pong and Breakout from pixels
#   ./benchmark.sh peers        Stable-Baselines3's PPO and SAC, in an environment of their own: .venv-peers
#   ./benchmark.sh peers-time   time per step of these, GIPO and PPO-clip; needs an idle machine
#   ./benchmark.sh rllib-tune   learning rates for rllib
#   ./benchmark.sh rllib        APPO with GIPO's loss and with its own loss, in its own virtual environment: .venv-rllib
#   ./benchmark.sh llm          a tiny language model, in its own virtual environment: .venv-trl
#   ./benchmark.sh costs        what a message and a gradient step cost in gipo_rllib.py, to estimate many actors
#   ./benchmark.sh report       figures, tables and verdicts from these files
set -euo pipefail
cd "$(dirname "$0")"
check='import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))'
if ! python -c "$check" torch gymnasium tyro tensorboard scipy matplotlib 2>/dev/null; then
  echo "error: activate the environment of requirements.txt first (source .venv/bin/activate)." >&2
  exit 2
fi
subcommand=${1:-}
case $subcommand in
  quick | speed | report) module=$subcommand; shift ;;
  random) module=random_returns; shift ;;
  peers | peers-time | rllib | rllib-tune | costs | llm)
    module=experiments
    case $subcommand in
      peers | peers-time) name=peers requirements=benchmark/requirements-peers.txt ;;
      llm) name=trl requirements=requirements-trl.txt ;;
      *) name=rllib requirements=requirements-rllib.txt ;;
    esac
    if [[ ! -e .venv-$name/installed ]]; then
      python -m venv ".venv-$name"
      ".venv-$name/bin/pip" install --quiet -r "$requirements"
      touch ".venv-$name/installed"
    fi
    [[ $subcommand == peers-time ]] && { module=peer_times; shift; }
    [[ $subcommand == costs ]] && exec ".venv-$name/bin/python" benchmark/rllib_costs.py
    ;;
  tune | staleness | ablation | width-tune | width | freeze | lag | ant | metaworld | minigrid | atari) module=experiments ;;
  *) echo "error: give a subcommand: $(sed -n 's|^#  *./benchmark.sh \([a-z-]*\).*|\1|p' "$0" | paste -sd ' ')" >&2; exit 2 ;;
esac
exec python -m "benchmark.$module" "$@"
