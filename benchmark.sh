#!/usr/bin/env bash
# Measurements of the scripts and the evidence. --help after a subcommand lists its flags (costs has none).
#
#   ./benchmark.sh quick        GIPO and PPO-clip on fresh and stale data, in about ten minutes of two cores
#   ./benchmark.sh speed        steps per second next to the bare environments, and where the time goes
#
# The evidence, in benchmark/results/*.csv; what is there already is not run again, so move a file away to make it anew:
#
#   ./benchmark.sh tune         bandwidth and learning rate of every surrogate, on environments that are not reported
#   ./benchmark.sh random       random actions, the zero of the scores
#   ./benchmark.sh staleness    return against the size K of the replay buffer
#   ./benchmark.sh remedies     what may keep GIPO from running away from its data
#   ./benchmark.sh search       rollouts and buffer for half the steps, on environments that are not reported
#   ./benchmark.sh efficiency   GIPO after half the steps, PPO-clip after half and after all
#   ./benchmark.sh ant          return against K on Ant, 300,000 steps
#   ./benchmark.sh freeze       nothing enters the buffer after a third of the training
#   ./benchmark.sh lag          the policy that acts is up to 16 iterations old
#   ./benchmark.sh sigma        the width of GIPO's weight
#   ./benchmark.sh minigrid     pixels and words
#   ./benchmark.sh metaworld    close to the stale regime of the method's authors
#   ./benchmark.sh atari        Pong, Breakout and Freeway from pixels
#   ./benchmark.sh rllib        APPO with GIPO's loss and its own, in an environment of its own: .venv-rllib
#   ./benchmark.sh costs        what a message and a gradient step cost there, for an estimate at many actors
#   ./benchmark.sh peers        Stable-Baselines3's PPO and SAC, in an environment of their own: .venv-peers
#   ./benchmark.sh report       figures and tables from these files
set -euo pipefail
cd "$(dirname "$0")"
subcommand=${1:-}
case $subcommand in
  quick | speed | report) module=$subcommand; shift ;;
  random) module=random_returns; shift ;;
  peers | rllib | costs)
    module=experiments
    name=${subcommand/costs/rllib}
    requirements=$([[ $name == peers ]] && echo benchmark/requirements-peers.txt || echo requirements-rllib.txt)
    if [[ ! -e .venv-$name/installed ]]; then
      python -m venv ".venv-$name"
      ".venv-$name/bin/pip" install --quiet -r "$requirements"
      touch ".venv-$name/installed"
    fi
    [[ $subcommand == costs ]] && exec ".venv-$name/bin/python" benchmark/rllib_costs.py
    ;;
  tune | staleness | remedies | search | efficiency | ant | freeze | lag | sigma | minigrid | metaworld | atari) module=experiments ;;
  *) echo "error: give a subcommand: $(sed -n 's|^#  *./benchmark.sh \([a-z]*\).*|\1|p' "$0" | paste -sd ' ')" >&2; exit 2 ;;
esac
exec python -m "benchmark.$module" "$@"
