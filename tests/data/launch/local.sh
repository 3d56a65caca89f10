#!/usr/bin/env bash
# maejax pretrain, made by `maejax launch --on=local`; change what your machines want otherwise.
# Start it in the folder where it was made: bash local.sh
#
# 75 (interrupted and saved) and 124 (stalled) start the same command again; anything else is the end. SIGTERM and Ctrl-C to
# this script stop the run, which saves, and start nothing again.
set -m # the run gets its own process group: Ctrl-C reaches this script alone, which passes it on once

signals=0
# shellcheck disable=SC2317 # the trap calls it
stop() {
  signals=$((signals + 1))
  kill -TERM "$run" 2>/dev/null || true
}
trap stop TERM INT

for ((start = 0; start <= 100; start++)); do
  /usr/bin/python3 -m maejax pretrain --config=pretrain_vit_b16_imagenet '--config.data.dir=it'"'"'s here' --workdir=runs/b16 &
  run=$!
  while
    before=$signals code=0
    wait "$run" || code=$?
    [ "$signals" != "$before" ] # a signal cut the wait short
  do :; done
  case $code in 75 | 124) ;; *) break ;; esac
  if [ "$signals" != 0 ]; then break; fi
  echo "ended with $code; starting again"
done
exit "$code"
