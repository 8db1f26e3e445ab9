#!/bin/bash
# Runs every command that the README shows, in its order, in a fresh copy of the project, as a new user would. `make test`
# itself is left out. Prints a line for each failure, then "N passed, N failed, N skipped".
#
#   dev/test/test_readme.sh SHARED_DIR    from the top of the repository; without SHARED_DIR/data commands on scans are skipped
set -u
scans=$(realpath -m "${1:?usage: dev/test/test_readme.sh SHARED_DIR}")/data/mr_seq
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0
if git rev-parse --git-dir > /dev/null 2>&1; then git ls-files -z | xargs -0 cp --parents -t "$work"; else cp -r . "$work"; fi
cd "$work" || exit 1
[ -d "$scans" ] && ln -s "$scans" scans
export I=0 N=2    # the README's node 0 of 2
# the lines of fenced blocks that begin with make, head or ./, without their comments
mapfile -t commands < <(awk '/^```/ { fence = !fence; next } fence && /^(make|head|\.\/)/ { sub(/ +#.*/, ""); print }' README.md)
for command in "${commands[@]}"; do
    case $command in
        'make test') continue ;;
        *scans*|*shards*) if [ ! -e scans ]; then skipped=$((skipped + 1)); echo "skipped: $command: no scans here"; continue; fi ;;
    esac
    if bash -c "$command" > out 2> err; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "failed: $command: $(tail -1 err)"; fi
    case $command in
        'make run') grep -E '^(model|random|runs)' out | cut -f1,4,13,14,16 >&2
            # the trained encoder is at least ten points above the untrained one
            awk -F'\t' '$4 == "knn" { score[++n] = $14 } END { exit !(n == 2 && score[1] >= score[2] + 0.1) }' out &&
                passed=$((passed + 1)) || { failed=$((failed + 1)); echo "failed: make run: the score: $(grep knn out | cut -f1,14 | tr '\t\n' '  ')"; } ;;
    esac
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
