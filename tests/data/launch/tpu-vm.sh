#!/usr/bin/env bash
# maejax pretrain, made by `maejax launch --on=tpu-vm`; change what your machines want otherwise.
# Start it on a machine that stays on, in tmux for example: bash tpu-vm.sh
#
# Makes the TPU VM where there is none, prepares its hosts, and runs the same command on all of them; they find each other.
# A machine that was taken away is made again, and the run goes on from its last checkpoint on the shared storage.
# The machine is left as it is at the end; delete it: gcloud compute tpus tpu-vm delete b16 --zone=us-west4-a
set -u

machine=(b16 --zone=us-west4-a)
tpu() { gcloud compute tpus tpu-vm "$1" "${machine[@]}" "${@:2}"; }

state() { tpu describe --format='value(state)' 2>/dev/null || echo NONE; }

# Add --spot for a machine that costs less and may be taken away.
create() { tpu create --accelerator-type=v5litepod-32 --version=v2-alpha-tpuv5-lite; }

# On every host: storage that all of them share (NFS, for example Filestore), and maejax.
prepare=$(
  cat <<'HOST'
set -e
if ! mountpoint -q /mnt/runs; then
  sudo apt-get install -y -qq nfs-common
  sudo mkdir -p /mnt/runs
  sudo mount -t nfs 10.0.0.2:/runs /mnt/runs
fi
python3 -m pip install 'maejax[tpu]==0.1.0'
HOST
)

# On every host: 75 (interrupted and saved) and 124 (stalled) start the same command again.
run=$(
  cat <<'HOST'
set -o pipefail
mkdir -p /mnt/runs/b16/launch
for ((start = 0; start <= 100; start++)); do
  code=0
  python3 -m maejax pretrain --config=pretrain_vit_b16_imagenet '--config.data.dir=it'"'"'s here' --workdir=/mnt/runs/b16 2>&1 | tee -a "/mnt/runs/b16/launch/tpu-vm-$(hostname).log" || code=$?
  case $code in 75 | 124) ;; *) break ;; esac
done
exit "$code"
HOST
)

for ((start = 0; start <= 100; start++)); do
  case $(state) in
    READY) ;;
    NONE) create ;;
    *) tpu delete --quiet && create ;;
  esac || exit
  if tpu ssh --worker=all --command="$prepare" && tpu ssh --worker=all --command="$run"; then exit 0; fi
  if [ "$(state)" = READY ]; then
    echo "the run failed; its logs are in /mnt/runs/b16/launch on the shared storage" >&2
    exit 1
  fi
  echo "the machine was taken away; making it again"
done
exit 75
