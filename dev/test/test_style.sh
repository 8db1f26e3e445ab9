#!/bin/bash
# House rules that a script can hold: the names that a header's opening comment lists are defined in it; no assembly outside
# curia/cuda/ptx.cuh; no leftovers; every README file name exists. Prints failures, then "N passed, N failed".
#
#   dev/test/test_style.sh    from the top of the repository
set -u
passed=0 failed=0
good() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "failed: $*"; }

for file in dataloader.h curia/*.h curia/cuda/*.cuh prep/*.h; do
    # "  name, other_name   what it is": the words before three spaces or more, up to the end of the opening comment
    for name in $(awk '/\*\// { exit } /^  [A-Za-z_*].*  / { sub(/^  /, ""); sub(/  +.*/, ""); gsub(/[,;]/, " "); print }' "$file"); do
        name=${name%%\**}
        name=${name##/}
        [[ $name =~ ^[A-Za-z_][A-Za-z_0-9]{2,}$ ]] || continue
        if awk 'body { print } /\*\// { body = 1 }' "$file" | grep -q "$name"; then good; else bad "$file lists $name, which is not in it"; fi
    done
done
sources=$(find . -path ./build -prune -o \( -name '*.c' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name Makefile -o -name '*.py' \) -print)
leftovers=$(grep -nE 'TO''DO|FIX''ME|XX''X' $sources | head -3)
[ -z "$leftovers" ] && good || bad "leftovers: $leftovers"
assembly=$(grep -lE '\basm\b *(volatile)? *\(' $(echo "$sources" | grep -v ptx.cuh) | head -3)
[ -z "$assembly" ] && good || bad "assembly outside curia/cuda/ptx.cuh: $assembly"
for name in $(grep -oE '`(curia/|prep/|dev/)?[a-z_]+(\.[ch]|/)`' README.md | tr -d '`' | sort -u); do
    if [ -e "$name" ]; then good; else bad "README names $name, which is not there"; fi
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
