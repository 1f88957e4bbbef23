#!/usr/bin/env bash
# A Ray cluster of several nodes on this computer (Linux), for tests: its own token, which Ray's
# ports demand, its own ports and folder, the dashboard on loopback. The ports of metrics, and
# those of a training's collectives, demand none: use it where the computer's network is trusted. It
# ends only processes that it started.
#
#   cluster/local.sh start [KIND ...]   a head and a node for each KIND: `cpu`, or a kind of GPU as
#                                       Ray names it (L4, H100), which the node then claims to have,
#                                       for `accelerator_type` (with gpus: 0); default: cpu cpu
#   cluster/local.sh add KIND           one more node
#   cluster/local.sh kill NUMBER        kill a node without notice, as a spot market does
#   eval "$(cluster/local.sh env)"      `ray job submit` then uses it
#   cluster/local.sh stop               end it, and remove its folder
#
# RAYFUSE_LOCAL (default ~/.rayfuse-local) is its folder; CPUS (4) and OBJECT_STORE (200000000 bytes)
# are those of each node.
set -euo pipefail

folder=$(realpath -m -- "${RAYFUSE_LOCAL:-$HOME/.rayfuse-local}") # absolute: jobs run in another folder and read the token
cpus=${CPUS:-4}
object_store=${OBJECT_STORE:-200000000}

fail() {
    echo "cluster/local.sh: $1" >&2
    exit 2
}

free_ports() { # COUNT: prints that many unused ports
    python3 - "$1" <<'PYTHON'
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for opened in sockets:
    opened.bind(("127.0.0.1", 0))
print(*(opened.getsockname()[1] for opened in sockets))
PYTHON
}

set_environment() {
    [[ -e $folder/head ]] || fail "no cluster in $folder; run: cluster/local.sh start"
    # shellcheck source=/dev/null
    source "$folder/head" # temp, gcs, dashboard
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
    unset RAY_AUTH_TOKEN RAY_ADDRESS
}

begins() { # PID: prints its start time, to detect a reused process id
    ps -o lstart= -p "$1" 2>/dev/null || true
}

is_alive() { # GROUP: succeeds if any process of the group is not a zombie
    ps -eo pgid=,stat= | awk -v group="$1" '$1 == group && $2 !~ /^Z/ {alive = 1} END {exit !alive}'
}

start_node() { # NAME ARGUMENT ...: starts it in its own process group, and records the process
    local name=$1 agent grpc runtime metrics process
    shift
    read -r agent grpc runtime metrics <<<"$(free_ports 4)"
    # Another cluster of this machine may use the default ports: jobs would not start.
    setsid ray start --block --disable-usage-stats --node-ip-address=127.0.0.1 \
        --dashboard-agent-listen-port="$agent" --dashboard-agent-grpc-port="$grpc" \
        --runtime-env-agent-port="$runtime" --metrics-export-port="$metrics" \
        --num-gpus=0 --object-store-memory="$object_store" "$@" \
        >"$folder/$name.log" 2>&1 </dev/null &
    process=$!
    printf '%s\n%s\n' "$process" "$(begins "$process")" >"$folder/$name.process"
    for _ in {1..240}; do
        grep -q "Ray runtime started" "$folder/$name.log" && return
        kill -0 "$process" 2>/dev/null || break
        sleep 0.5
    done
    tail -n 20 "$folder/$name.log" >&2
    fail "$name did not start; the complete log is $folder/$name.log"
}

add_node() { # KIND
    local kind=$1 number=1 name resources='{}' labels=ray.io/market-type=spot
    while [[ -e $folder/node-$number.log ]]; do number=$((number + 1)); done
    name=node-$number
    if [[ $kind != cpu ]]; then
        resources="{\"accelerator_type:$kind\": 1}"
        labels+=,ray.io/accelerator-type=$kind
    fi
    # Its own folder: nodes that share one would overwrite a job's files while another uses them.
    start_node "$name" --address="127.0.0.1:$gcs" --temp-dir="$temp/$number" --num-cpus="$cpus" \
        --resources="$resources" --labels="$labels"
    echo "$name: $kind, $cpus CPUs"
}

find_group() { # NAME: prints a node's process group if it is still the one that was started
    local process began
    [[ -e $folder/$1.process ]] || fail "there is no $1 in $folder"
    {
        read -r process
        read -r began
    } <"$folder/$1.process"
    if [[ -n $began && $(begins "$process") == "$began" ]]; then echo "$process"; fi
}

end_nodes() { # SIGNAL NAME ...: signals all of them, then waits for each
    local signal=$1 name group groups=()
    shift
    for name in "$@"; do
        group=$(find_group "$name")
        rm -f "$folder/$name.process"
        [[ -n $group ]] || continue
        kill -"$signal" -- "-$group"
        groups+=("$group")
    done
    for group in "${groups[@]}"; do
        for _ in {1..80}; do
            is_alive "$group" || break
            sleep 0.25
        done
        if is_alive "$group"; then kill -KILL -- "-$group"; fi
    done
}

start() {
    local gcs dashboard temp kind
    command -v ray >/dev/null || fail "no ray here; activate the environment of rayfuse"
    [[ ! -e $folder/head ]] || fail "a cluster is in $folder; run: cluster/local.sh stop"
    mkdir -p "$folder"
    chmod 700 "$folder"
    (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$folder/token")
    temp=$(mktemp -d /tmp/rf.XXXXXX) # short: a socket's path has at most about 100 characters
    read -r gcs dashboard <<<"$(free_ports 2)"
    printf 'temp=%q\ngcs=%q\ndashboard=%q\n' "$temp" "$gcs" "$dashboard" >"$folder/head"
    set_environment
    # As in the cloud files: only drivers run on the head.
    start_node head --head --port="$gcs" --temp-dir="$temp/head" --num-cpus=0 \
        --dashboard-host=127.0.0.1 --dashboard-port="$dashboard"
    echo "head: http://127.0.0.1:$dashboard, token in $folder/token"
    for kind in "${@:-cpu}"; do add_node "$kind"; done
    echo "now: eval \"\$(cluster/local.sh env)\"; ray job submit --working-dir . -- python jobs/run.py RECIPE"
}

stop() {
    local file temp names=()
    set_environment
    for file in "$folder"/node-*.process "$folder"/head.process; do
        if [[ -e $file ]]; then names+=("$(basename "$file" .process)"); fi
    done
    end_nodes TERM "${names[@]}"
    rm -rf "${temp:?}"
    rm -f "$folder"/{head,token,head.log,node-*.log}
    rmdir "$folder" 2>/dev/null || echo "$folder holds other files, so it is kept"
}

case ${1:-} in
start)
    shift
    if (($# == 0)); then set -- cpu cpu; fi
    start "$@"
    ;;
add)
    set_environment
    add_node "${2:?which KIND?}"
    ;;
kill)
    set_environment
    end_nodes KILL "node-${2:?which NUMBER?}"
    ;;
env)
    set_environment
    printf 'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%q RAY_API_SERVER_ADDRESS=%q\n' \
        "$folder/token" "http://127.0.0.1:${dashboard:?}"
    ;;
stop) stop ;;
*)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
    ;;
esac
