#!/usr/bin/env bash
# A cluster on this machine, to try what a real one does: a head, a second node and an S3 server.
#
#   cluster/local.sh ray job submit --working-dir . -- python jobs/nightly.py \
#       --archive /data/films --model /data/model --results /data/results
#
# The command runs with RAY_ADDRESS and the AWS variables set. At its end, everything that was started
# here ends. The S3 server has an empty bucket, s3://films, which is gone at the end, too, unless
# LOCAL_S3_FOLDER=DIR keeps it in DIR. If AWS_ENDPOINT_URL is set, that server is used and none is
# started.
# Research use only. Not a medical device.
set -euo pipefail

if (($# == 0)); then
    sed -n '2,11s/^# \?//p' "$0" >&2
    exit 2
fi
home=$(cd "$(dirname "$0")/.." && pwd)
if [[ -d $home/.venv/bin ]]; then
    export PATH=$home/.venv/bin:$PATH
fi
if [[ -z ${AWS_ENDPOINT_URL:-} ]]; then
    exec python "$home/cluster/local_s3.py" ${LOCAL_S3_FOLDER:+--folder "$LOCAL_S3_FOLDER"} \
        --bucket films -- "$0" "$@"
fi

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

unset RAY_ADDRESS
export RAY_USAGE_STATS_ENABLED=0
# By default `ray start` asks for a token and `ray job` gives none, so both are told what to do.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
# Nothing is running any more when the nodes end, so there is no need to drain them for 30 s.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
# A folder for Ray alone. A submitted job reads its Ray's address from this folder; the default folder
# has the address of whatever Ray was started last on this machine.
folder=$(mktemp -d "${TMPDIR:-/tmp}/ray.XXXXXX")
started=()

# By pid, to leave other Rays on this machine alone. A node ends its own children.
end() {
    trap - EXIT
    exec 2>/dev/null # Bash at times complains that it has no record of a process that has ended
    for job in $(jobs -pr); do
        if [[ " ${started[*]} " != *" $job "* ]]; then # the command, if a signal came before its end
            kill -TERM "$job" 2>/dev/null || true
            wait "$job" 2>/dev/null || true
        fi
    done
    if ((${#started[@]})); then
        kill -TERM "${started[@]}" 2>/dev/null || true
        wait "${started[@]}" 2>/dev/null || true
    fi
    rm -rf "$folder"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

gcs=$(free_port)
dashboard=$(free_port)
ray start --head --block --num-cpus="${HEAD_CPUS:-1}" --port="$gcs" --temp-dir="$folder" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
    --dashboard-agent-listen-port="$(free_port)" --ray-client-server-port="$(free_port)" \
    >"$folder/head" 2>&1 &
started+=($!)
tries=0
until ray job list --address "http://127.0.0.1:$dashboard" >/dev/null 2>&1; do
    why="did not start"
    if kill -0 "${started[0]}" 2>/dev/null; then
        why="gave no answer in $((++tries)) tries"
        if ((tries < 60)); then
            sleep 1
            continue
        fi
    fi
    echo "the head $why:" >&2
    tail -n 20 "$folder/head" >&2
    exit 2
done
ray start --address="127.0.0.1:$gcs" --block --num-cpus="${NODE_CPUS:-1}" \
    --dashboard-agent-listen-port="$(free_port)" >"$folder/node" 2>&1 &
started+=($!)
if ! python - "127.0.0.1:$gcs" <<'END'
import logging, sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
for _ in range(120):
    if sum(node["Alive"] for node in ray.nodes()) == 2:
        sys.exit(0)
    time.sleep(0.5)
sys.exit(1)
END
then
    echo "the second node did not join:" >&2
    tail -n 20 "$folder/node" >&2
    exit 2
fi
echo "a Ray cluster of two nodes at http://127.0.0.1:$dashboard, S3 at $AWS_ENDPOINT_URL" >&2

export RAY_ADDRESS=http://127.0.0.1:$dashboard
# In the background, because Bash heeds no signal while a command runs in the foreground: whoever then
# killed it would leave the nodes behind.
"$@" <&0 &
wait $!
