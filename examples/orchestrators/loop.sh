#!/bin/bash
# Runs until all steps are finished, on a machine that may kill the run at any time. After a stop or a crash the loop
# waits and resumes, as long as new checkpoints appear. Errors that only a person can fix end the loop at once.
#   ./loop.sh RUN config.toml [OPTIONS...]      RUN is the run's directory: training.output_dir
set -u
directory=${1:?usage: loop.sh RUN config.toml [OPTIONS...]}
shift
pause=${PAUSE:-10}
most=${MOST_IDLE:-5} # launches in a row that may end without a new checkpoint
idle=0
asked=0
run=
trap 'asked=1; [ -n "$run" ] && kill -TERM "$run"' TERM INT

newest() {
  ls "$directory/checkpoints" 2>/dev/null | grep -E '^step-[0-9]+$' | sort -V | tail -n 1
}

while :; do
  before=$(newest)
  gpt-simple run "$@" --training.output_dir "$directory" &
  run=$!
  wait "$run"
  code=$?
  while kill -0 "$run" 2>/dev/null; do # a trap ends the first wait before the run has ended
    wait "$run"
    code=$?
  done
  run=

  case $code in
    0) exit 0 ;;                              # all steps are finished
    2 | 3 | 4 | 5 | 76 | 130) exit "$code" ;; # needs a person
  esac
  # 75: stopped by this script, a time budget or a signal. Others: killed, out of memory, a device failure.
  [ "$asked" -eq 1 ] && exit "$code"
  idle=$((idle + 1))
  [ "$(newest)" != "$before" ] && idle=0
  if [ "$idle" -gt "$most" ]; then
    echo "loop.sh: $idle launches in a row ended without a new checkpoint, the last with exit code $code" >&2
    exit "$code"
  fi
  sleep $((pause * (idle + 1))) &
  wait $! # a signal ends it, unlike sleep alone
  [ "$asked" -eq 1 ] && exit "$code"
done
