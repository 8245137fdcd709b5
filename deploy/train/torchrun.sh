#!/usr/bin/env bash
# maskgen on several hosts: the same command on each of them, with --out on a disk that all share.
#
#   HEAD=host0 NODES=2 NODE=0 deploy/train/torchrun.sh run maskllm --model DENSE --data TEXTS --out /shared/OUT --shard
#
# HEAD       address of host 0, where all meet                NODES, NODE   how many hosts, and which this is, from 0
# PORT       of the meeting point (29400)                     PROCESSES     on this host (auto: one for each GPU)
# RESTARTS   how often to start again when a host or a process has failed, from the last checkpoint (3); a Ctrl-C or a
#            SIGTERM ends it for good
# INTERFACE  of the network, where it is not the one that the host's name leads to
# ADDRESS    of this host, where the others do not reach it by its name
set -euo pipefail
: "${HEAD:?the address of host 0}" "${NODES:?the number of hosts}" "${NODE:?the number of this host, from 0}"

if [[ -n ${INTERFACE:-} ]]; then
  export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
address=${ADDRESS:-}
head=false
if ((NODE == 0)); then
  head=true address=${address:-$HEAD}
fi
# c10d, not a fixed rank for each host: a host that comes back while the meeting point of before is still there has to
# wait for the new one, and not to read there who was in the last start
torchrun=("${PYTHON:-python3}" -m torch.distributed.run --nnodes "$NODES" --max-restarts 0
  --nproc-per-node "${PROCESSES:-auto}" --rdzv-backend c10d --rdzv-id maskgen --rdzv-endpoint "$HEAD:${PORT:-29400}"
  --rdzv-conf "is_host=$head,read_timeout=900,join_timeout=900" ${address:+--local-addr "$address"})

# who is asked to end passes it on, and does not start again: a Ctrl-C, a scheduler's or kubelet's SIGTERM, a terminal that is closed
end() {
  trap '' INT TERM HUP
  if [[ -n $running ]]; then
    kill -s "$1" -- "-$running" 2>/dev/null || true
    wait "$running" || true
  fi
  exit "$2"
}
running=
trap 'end INT 130' INT
trap 'end TERM 143' TERM
trap 'end HUP 129' HUP
set -m # what runs beside this script has a process group of its own, and does not ignore SIGINT

# every host starts anew, and meets the others: torchrun's own restarts end with the head
starts=0
while true; do
  "${torchrun[@]}" -m maskgen "$@" &
  running=$!
  ! wait "$running" || exit 0
  running=
  ((starts++ < ${RESTARTS:-3})) || exit 1
  echo "host $NODE: failed; starting again in 5 s ($starts of ${RESTARTS:-3})" >&2
  sleep 5
done
