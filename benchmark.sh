#!/usr/bin/env bash
# Measurements of the scripts and the evidence. --help after a subcommand lists its flags.
#
#   ./benchmark.sh speed        steps per second next to the bare environments, and where the time goes
#   ./benchmark.sh tune         bandwidth and learning rate of every surrogate, on environments that are not reported
#   ./benchmark.sh staleness    return against the size K of the replay buffer
#   ./benchmark.sh freeze       nothing enters the buffer after a third of the training
#   ./benchmark.sh lag          the policy that acts is up to 16 iterations old
#   ./benchmark.sh sigma        the width of GIPO's weight
#   ./benchmark.sh random       returns of random actions, the zero of the scores
#   ./benchmark.sh report       figures and tables from benchmark/results/*.csv
set -euo pipefail
cd "$(dirname "$0")"
subcommand=${1:-}
case $subcommand in
  speed | report) module=$subcommand; shift ;;
  random) module=random_returns; shift ;;
  tune | staleness | freeze | lag | sigma) module=experiments ;;
  *) echo "error: give a subcommand: speed, tune, staleness, freeze, lag, sigma, random, report" >&2; exit 2 ;;
esac
exec python -m "benchmark.$module" "$@"
