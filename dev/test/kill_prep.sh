#!/bin/bash
# Kills prep at random moments and calls it again until it ends, RUNS times; each time the output is that of a run which was
# not killed, byte for byte, and no finished shard has been written twice. Prints "N passed, N failed".
#
#   dev/test/kill_prep.sh PREP DATA RUNS [DIR]     DIR: where to work; whole/ is left in it
set -u
prep=$(realpath "$1") data=$(realpath "$2") runs=$3 work=${4:-}
[ -n "$work" ] || { work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; }
passed=0 failed=0
pack() { exec "$prep" -o "$work/$1" --shard-size 2 --split patient:0.6/0.4 --planes all --jobs 2 "$data/ct_seg" "$data/dicom" "$data/orient" "$data/bad"; }

begin=$(date +%s%3N)
(pack whole 2>/dev/null)
length=$(($(date +%s%3N) - begin))
for run in $(seq "$runs"); do
    rm -rf "$work/killed" "$work/before"
    kills=0 again=0 round=0
    while [ ! -e "$work/killed/summary.json" ] && [ $round -lt 60 ]; do
        round=$((round + 1))
        (pack killed 2>/dev/null) &
        sleep "$(awk "BEGIN { print $length * (0.1 + 0.3 * $RANDOM / 32768 + 0.02 * $round) / 1000 }")"
        kill -9 $! 2>/dev/null && kills=$((kills + 1))
        wait $! 2>/dev/null
        find "$work/killed" -name '*.shard' -printf '%p %i %T@ %s\n' 2>/dev/null | sort >"$work/now"
        [ -e "$work/before" ] && again=$((again + $(comm -23 "$work/before" "$work/now" | wc -l)))
        mv "$work/now" "$work/before"
    done
    if diff -rq "$work/whole" "$work/killed" >"$work/difference" && [ $kills -ge 2 ] && [ $again = 0 ]; then passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "failed: run $run: $kills kills in $round rounds, $again finished shards written again; $(head -2 "$work/difference")"
    fi
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
