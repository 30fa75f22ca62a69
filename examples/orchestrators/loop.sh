#!/bin/bash
# Runs until all steps are made, on a machine that may kill it at any time. Crashes are tried again, with growing pauses,
# as long as steps are made between them; mistakes that only a person can mend end the loop at once.
#   ./loop.sh config.toml [OPTIONS...]
set -u
pause=${PAUSE:-10}
most=${MOST_CRASHES:-5}
crashes=0
asked=0
run=
trap 'asked=1; [ -n "$run" ] && kill -TERM "$run"' TERM INT

while :; do
  begun=$SECONDS
  gpt-simple run "$@" &
  run=$!
  wait "$run"
  code=$?
  while kill -0 "$run" 2>/dev/null; do # a trap ends the first wait before the run has ended
    wait "$run"
    code=$?
  done
  run=

  case $code in
    0) exit 0 ;;                                # all steps are made
    75) [ "$asked" -eq 1 ] && exit 75 ;;        # stopped: by us for good, else by a time budget or somebody's signal
    2 | 3 | 4 | 5 | 76 | 130) exit "$code" ;;   # a person must look
    *)
      # A crash: killed, out of memory, a device that fell off.
      [ "$asked" -eq 1 ] && exit "$code"
      [ $((SECONDS - begun)) -gt 600 ] && crashes=0
      crashes=$((crashes + 1))
      [ "$crashes" -gt "$most" ] && exit "$code"
      sleep $((pause * crashes)) &
      wait $! # unlike sleep alone it is ended by a signal
      [ "$asked" -eq 1 ] && exit "$code"
      ;;
  esac
done
