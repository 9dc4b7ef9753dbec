#!/usr/bin/env bash
# Runs a stage or a pipeline on several machines ("nodes"), which share the folder of the run.
# Start it on each node, the same but for NODE_RANK:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/multi_node.sh sft CONFIG [--key=value ...]
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/multi_node.sh sft CONFIG [--key=value ...]
# or once, with a DeepSpeed hostfile ("HOST slots=N" in each line), which logs in to each by ssh:
#   HOSTFILE=hosts launch/multi_node.sh sft CONFIG [--key=value ...]
#   MASTER_PORT   29500 by default; the port after it is used as well
#   PROCESSES     ranks on each node; by default, as many as there are GPUs
#   DEEPSPEED     ds_configs/zero2.json by default; empty trains without DeepSpeed
#   LAUNCHER      torchrun: its launcher instead of mmemo's, which also passes on exit codes
# Run the same command again to resume from the last checkpoint. SIGTERM to a node's own command saves
# one first; with a hostfile, the other nodes' commands end with their ssh, without saving.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ -n "${HOSTFILE:-}" ]; then
  mapfile -t lines < <(grep -vE '^[[:space:]]*(#|$)' "$HOSTFILE")
  [ "${#lines[@]}" -gt 0 ] || { echo "$HOSTFILE names no host" >&2; exit 2; }
  read -r first _ <<<"${lines[0]}"
  pids=()
  trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
  for number in "${!lines[@]}"; do
    read -r host slots <<<"${lines[$number]}"
    command=$(printf '%q ' env -u HOSTFILE NNODES="${#lines[@]}" NODE_RANK="$number" \
      MASTER_ADDR="${MASTER_ADDR:-$first}" MASTER_PORT="${MASTER_PORT:-29500}" \
      PROCESSES="${slots#slots=}" DEEPSPEED="${DEEPSPEED-ds_configs/zero2.json}" \
      "$here/multi_node.sh" "$@")
    # -tt: an ssh that ends hangs up its terminal, which ends the command there.
    ${SSH:-ssh -tt -o BatchMode=yes} "$host" "cd $(printf '%q' "$PWD") && $command" </dev/null &
    pids+=($!)
  done
  code=0
  for pid in "${pids[@]}"; do
    wait "$pid" || { one=$?; [ "$code" -ne 0 ] || code=$one; }
  done
  exit "$code"
fi
: "${NNODES:?set NNODES, NODE_RANK and MASTER_ADDR on each node, or HOSTFILE on one}"
command -v mmemo >/dev/null || . "$here/setup.sh" "" # the active environment, or .venv
. "$here/ranks.sh"
if [ "${LAUNCHER:-mmemo}" = torchrun ]; then
  nodes=$NNODES rank=$NODE_RANK
  unset NNODES NODE_RANK
  exec torchrun --nnodes "$nodes" --node-rank "$rank" --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" \
    -m mmemo.cli "$@" "${ranks[@]:2}"
fi
exec mmemo "$@" "${ranks[@]}"
