#!/usr/bin/env bash
# Measurements of the scripts. Each subcommand is a module under benchmark/; --help after it lists its flags.
#
#   ./benchmark.sh speed     steps per second next to the bare environments, and where the time goes
set -euo pipefail
cd "$(dirname "$0")"
subcommand=${1:-}
case $subcommand in
  speed) shift; exec python -m "benchmark.$subcommand" "$@" ;;
  *) echo "error: give a subcommand: speed" >&2; exit 2 ;;
esac
