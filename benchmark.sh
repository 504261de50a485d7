#!/usr/bin/env bash
# Measures the scripts and makes the evidence. --help after a subcommand lists its flags.
#
#   ./benchmark.sh quick        GIPO and PPO-clip on fresh and stale data, in about five minutes on two cores
#   ./benchmark.sh speed        steps per second next to the bare environments, and where the time goes
#
# The evidence, in benchmark/rows/*.csv. Runs with a row there are skipped: move the file elsewhere to repeat them.
# random and peers-time always measure anew.
#
#   ./benchmark.sh random       random actions, the zero of the scores; run this first
#   ./benchmark.sh tune         a grid of one shape for each method, on seeds of its own; run this second
#   ./benchmark.sh staleness    return against the size K of the replay buffer; run this third
#   ./benchmark.sh updates      more update epochs per iteration, with fresh and with old data
#   ./benchmark.sh million      four tasks, a million steps
#   ./benchmark.sh ablation     from GIPO's choice one thing at a time
#   ./benchmark.sh lag          the behaviour policy is up to 8 iterations old
#   ./benchmark.sh freeze       nothing enters the buffer after a third of the training
#   ./benchmark.sh metaworld    two tasks with the ratio per dimension and per action
#   ./benchmark.sh minigrid     pixels and words
#   ./benchmark.sh pong         Atari on the CPU
#   ./benchmark.sh peers        Stable-Baselines3's PPO and SAC, in an environment of their own: .venv-peers
#   ./benchmark.sh peers-time   time per step of these, GIPO and PPO-clip; needs an idle machine
#   ./benchmark.sh rllib-tune   learning rates for rllib
#   ./benchmark.sh rllib        APPO with GIPO's loss and with its own loss, in its own virtual environment: .venv-rllib
#   ./benchmark.sh llm-tune     rates, KL weights and widths for a tiny language model, in .venv-trl
#   ./benchmark.sh llm          the same model on stale completions
#   ./benchmark.sh llm-rates    the learning rates that each loss stands
#   ./benchmark.sh report       figures, tables and differences from these files
set -euo pipefail
cd "$(dirname "$0")"
check='import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))'
if ! python -c "$check" torch gymnasium tyro tensorboard scipy matplotlib pandas tabulate 2>/dev/null; then
  echo "error: activate the environment of requirements.txt first (source .venv/bin/activate)." >&2
  exit 2
fi

# makes a virtual environment for others' packages, and brings it up to date when its list has changed
environment() {
  if ! cmp -s "$2" ".venv-$1/installed"; then
    echo "installs $2 into .venv-$1" >&2
    python -m venv ".venv-$1"
    ".venv-$1/bin/pip" install --quiet -r "$2"
    cp "$2" ".venv-$1/installed"
  fi
}

subcommand=${1:-}
if [[ " $* " != *" --dry-run "* ]]; then
  case $subcommand in
    peers | peers-time | million) environment peers benchmark/requirements-peers.txt ;;
    rllib | rllib-tune) environment rllib requirements-rllib.txt ;;
    llm | llm-tune | llm-rates) environment trl requirements-trl.txt ;;
  esac
fi
case $subcommand in
  quick | speed) module=$subcommand; shift ;;
  random) module=random_returns; shift ;;
  peers-time) module=peer_times; shift ;;
  report) module=pages; shift ;;
  tune | staleness | updates | million | ablation | lag | freeze | metaworld | minigrid | pong) module=experiments ;;
  peers | rllib | rllib-tune | llm | llm-tune | llm-rates) module=experiments ;;
  *)
    known=$(sed -n 's|^#  *./benchmark.sh \([a-z-]*\).*|\1|p' benchmark.sh | paste -sd ' ')
    echo "error: give a subcommand: $known" >&2
    exit 2
    ;;
esac
exec python -m "benchmark.$module" "$@"
