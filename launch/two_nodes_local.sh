#!/usr/bin/env bash
# Shows on one Linux machine what happens on two: a pipeline runs over two network namespaces, once
# undisturbed, and once more with the second node killed in a training stage and both restarted. The
# models in the end must be the same files.
# usage: launch/two_nodes_local.sh PIPELINE FOLDER [--key=value ...]
#   FOLDER    gets undisturbed/ and killed/; nothing is overwritten
#   KILL_IN   names of the stages in which the second node is killed after a checkpoint; "grpo" by
#             default
# Needs root, or a kernel that lets users make namespaces.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9s/^# \?//p' "$0"; exit 2; }
here="$(cd "$(dirname "$0")" && pwd)"
if [ "$(id -u)" -ne 0 ]; then
  exec unshare --user --map-root-user --net "$0" "$@"
fi
pipeline=$1 folder=$2
shift 2
read -ra stages <<<"${KILL_IN:-grpo}"
mkdir -p "$folder"
space=()
for _ in 0 1; do
  unshare --net sleep infinity &
  space+=($!)
done
trap 'kill "${space[@]}" 2>/dev/null; wait 2>/dev/null' EXIT
in_node() { # N COMMAND...: in the namespace of a node
  local number=$1
  shift
  nsenter --net="/proc/${space[$number]}/ns/net" "$@"
}
for _ in $(seq 100); do # until both have left this namespace
  [ "$(readlink /proc/self/ns/net)" != "$(readlink "/proc/${space[0]}/ns/net")" ] &&
    [ "$(readlink /proc/self/ns/net)" != "$(readlink "/proc/${space[1]}/ns/net")" ] && break
  sleep 0.1
done
ip link add mmemo0 netns "${space[0]}" type veth peer name mmemo1 netns "${space[1]}"
for number in 0 1; do
  in_node "$number" ip link set lo up
  in_node "$number" ip addr add "10.77.0.$((number + 1))/24" dev "mmemo$number"
  in_node "$number" ip link set "mmemo$number" up
done

node() { # N RUN ARGUMENTS...: the pipeline on one node
  local number=$1 run=$2
  shift 2
  in_node "$number" env NNODES=2 NODE_RANK="$number" MASTER_ADDR=10.77.0.1 \
    "$here/pipeline.sh" "$pipeline" --output_dir="$run" "$@" >>"$run.node$number.log" 2>&1
}
pair() { # RUN ARGUMENTS...: on both, in the background
  node 0 "$@" &
  first=$!
  node 1 "$@" &
  second=$!
}
both() { # waits for both; the exit code of the first that failed
  local code=0
  wait "$first" || code=$?
  wait "$second" || code=${code/#0/$?}
  return "$code"
}
tree() { # PID: it and all that it has started
  local child
  for child in $(pgrep -P "$1"); do tree "$child"; done
  echo "$1"
}

echo "undisturbed: $folder/undisturbed"
pair "$folder/undisturbed" "$@"
both || { tail -n 20 "$folder"/undisturbed.node*.log >&2; exit 1; }

run="$folder/killed"
for stage in "${stages[@]}"; do
  echo "killing the second node in $stage"
  pair "$run" "$@"
  until compgen -G "$run/$stage/checkpoint-*" >/dev/null; do
    kill -0 "$first" 2>/dev/null || { tail -n 20 "$run".node*.log >&2; exit 1; }
    sleep 0.05
  done
  # shellcheck disable=SC2046
  kill -KILL $(tree "$second") 2>/dev/null || true
  if both 2>/dev/null; then
    echo "$stage had ended before the kill; give it more steps" >&2
    exit 1
  fi
done
echo "restarted, to the end"
pair "$run" "$@"
both || { tail -n 20 "$run".node*.log >&2; exit 1; }

code=0
for file in "$folder"/undisturbed/*/final/*.safetensors; do
  name="${file#"$folder/undisturbed/"}"
  if cmp -s "$file" "$run/$name"; then
    echo "$name: equal"
  else
    echo "$name: differs" >&2
    code=1
  fi
done
exit "$code"
