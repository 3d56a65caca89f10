#!/usr/bin/env bash
# @{title}
# Start it on a machine that stays on, in tmux for example: @{submit}
#
# Makes the TPU VM where there is none, prepares its hosts, and runs the same command on all of them; they find each other.
# A machine that was taken away is made again, and the run goes on from its last checkpoint on the shared storage.
# The machine is left as it is at the end; delete it: gcloud compute tpus tpu-vm delete @{name} --zone=@{zone}
set -u

machine=(@{name} --zone=@{zone})
machine+=(--project=@{project})
tpu() { gcloud compute tpus tpu-vm "$1" "${machine[@]}" "${@:2}"; }

state() { tpu describe --format='value(state)' 2>/dev/null || echo NONE; }

# Add --spot for a machine that costs less and may be taken away.
create() { tpu create --accelerator-type=@{tpu_type} --version=@{tpu_runtime}; }

# On every host: storage that all of them share (NFS, for example Filestore), and maejax.
prepare=$(
  cat <<'HOST'
set -e
if ! mountpoint -q @{mount}; then
  sudo apt-get install -y -qq nfs-common
  sudo mkdir -p @{mount}
  sudo mount -t nfs @{storage} @{mount}
fi
@{install}
HOST
)

# On every host: 75 (interrupted and saved) and 124 (stalled) start the same command again.
run=$(
  cat <<'HOST'
set -o pipefail
mkdir -p @{logs}
for ((start = 0; start <= @{restarts}; start++)); do
  code=0
  @{command} 2>&1 | tee -a "@{logs}/tpu-vm-$(hostname).log" || code=$?
  case $code in 75 | 124) ;; *) break ;; esac
done
exit "$code"
HOST
)

for ((start = 0; start <= @{restarts}; start++)); do
  case $(state) in
    READY) ;;
    NONE) create ;;
    *) tpu delete --quiet && create ;;
  esac || exit
  if tpu ssh --worker=all --command="$prepare" && tpu ssh --worker=all --command="$run"; then exit 0; fi
  if [ "$(state)" = READY ]; then
    echo "the run failed; its logs are in @{logs} on the shared storage" >&2
    exit 1
  fi
  echo "the machine was taken away; making it again"
done
exit 75
