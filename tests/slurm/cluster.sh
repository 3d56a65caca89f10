#!/usr/bin/env bash
# A Slurm cluster of one node on this machine, for tests: real daemons with their state in one folder.
#
#   tests/slurm/cluster.sh install        Debian's packages, as root; exits with 3 where they cannot be had
#   tests/slurm/cluster.sh start FOLDER   then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm/cluster.sh stop FOLDER
set -euo pipefail
PATH=$PATH:/usr/sbin

install() {
  local program missing=
  for program in munged slurmctld slurmd srun; do
    command -v "$program" >/dev/null || missing=$program
  done
  if [ -z "$missing" ]; then return; fi
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "$missing is not installed, and this is not root on Debian or Ubuntu: install slurm-wlm and munge" >&2
    exit 3
  fi
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >/dev/null; then
    echo "apt-get cannot install slurm-wlm and munge" >&2
    exit 3
  fi
}

start() {
  local folder host munge cores port
  mkdir -p "$1/state" "$1/spool" "$1/log"
  folder=$(cd "$1" && pwd) host=$(hostname -s)
  cores=$(($(nproc) > 2 ? $(nproc) : 2)) # two tasks run anywhere; Slurm need not know
  port=$((20000 + 2 * ($$ % 5000))) # clusters of two test runs do not meet
  munge=$(mktemp -d -t munge.XXXXXX) # names of sockets are short
  echo "$munge" >"$folder/munge"
  chmod 755 "$munge"
  (umask 077 && head -c 1024 /dev/urandom >"$munge/key")
  munged --force --socket="$munge/socket" --key-file="$munge/key" --pid-file="$munge/pid" --log-file="$munge/log" \
    --seed-file="$munge/seed" 2>>"$munge/log"
  # Processes are followed without control groups, which containers seldom let one have. A requeued job waits until its
  # first credentials have expired (2 minutes unless AuthInfo says otherwise).
  cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(localhost)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$munge/socket,cred_expire=10
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
KillWait=30
ReturnToService=2
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmdParameters=config_overrides
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
NodeName=$host NodeAddr=localhost CPUs=$cores State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
  export SLURM_CONF="$folder/slurm.conf"
  slurmctld -i
  slurmd
  for _ in $(seq 60); do
    if [ "$(sinfo -h -o %t 2>/dev/null)" = idle ]; then return; fi
    sleep 0.5
  done
  echo "the node does not come up; see $folder/log" >&2
  exit 1
}

stop() {
  local munge pid
  if [ ! -f "$1/munge" ]; then return; fi
  munge=$(cat "$1/munge")
  export SLURM_CONF="$1/slurm.conf"
  # Jobs that a failed test has left: first their processes, then those that wait.
  scancel --quiet --signal=KILL --user="$(id -un)" || true
  scancel --quiet --user="$(id -un)" || true
  for _ in $(seq 100); do
    if [ -z "$(squeue -h 2>/dev/null)" ]; then break; fi
    sleep 0.1
  done
  for pid in "$1/slurmd.pid" "$1/slurmctld.pid" "$munge/pid"; do
    if [ -f "$pid" ]; then kill "$(cat "$pid")" || true; fi
  done
  for _ in $(seq 100); do # each removes the file of its number
    if ! compgen -G "$1/*.pid" >/dev/null && [ ! -f "$munge/pid" ]; then break; fi
    sleep 0.1
  done
  rm -rf "$munge"
}

"$@"
