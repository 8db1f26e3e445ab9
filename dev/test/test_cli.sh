#!/bin/bash
# Tests of ./train_curia and ./evaluate as their users call them: command lines, checkpoints, interrupted runs, bad input.
# Prints a line for each failure, then "N passed, N failed, N skipped"; exit status 1 where one failed.
#
#   dev/test/test_cli.sh SHARED_DIR [--quick]    from the top of the repository, after make; BIN names another folder of programs
#
# PYTHON names a python3 with transformers and torch; without them the comparison with AutoModel is skipped.
set -u
shared=${1:?usage: dev/test/test_cli.sh SHARED_DIR [--quick]}
quick=${2:-}
bin=$(realpath "${BIN:-.}")
python=${PYTHON:-python3}
oracle=$(realpath dev/oracle)
[ -d "$shared" ] && shared=$(realpath "$shared")
work=$(mktemp -d)
trap 'umount "$work/small" 2>/dev/null; rm -rf "$work"' EXIT
cd "$work" || exit 1
passed=0 failed=0 skipped=0
good() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "failed: $*"; }
skip() { skipped=$((skipped + 1)); echo "skipped: $*"; }

# expect STATUS TEXT NAME COMMAND...: the command ends with STATUS, TEXT (an extended expression) is in its output, and a
# failure is one error line.
expect() {
    local status=$1 text=$2 name=$3 got
    shift 3
    "$@" > out 2> err
    got=$?
    if [ $got != "$status" ]; then bad "$name: exit status $got, expected $status: $(tail -1 err)"
    elif [ -n "$text" ] && ! grep -Eq -- "$text" out err; then bad "$name: no '$text' in: $(tail -2 err)"
    elif [ "$status" != 0 ] && [ "$(grep -c '^error: ' err)" != 1 ]; then bad "$name: not one line: $(head -3 err)"
    else good; fi
}
same() { if cmp -s "$2" "$3"; then good; else bad "$1: $2 and $3 differ"; fi; }
same_tree() { if diff -rq "$2" "$3" > out 2>&1; then good; else bad "$1: $(head -1 out)"; fi; }
flip() { # FILE OFFSET: one bit of one byte
    local byte
    byte=$(od -An -tu1 -j"$2" -N1 "$1" | tr -d ' ')
    printf "\\x$(printf %x $((byte ^ 4)))" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}

train() { "$bin/train_curia" "$@"; }
small="--set model.dim=32 --set model.heads=2 --set model.depth=2 --set model.drop_path=0.3 --set crops.global_size=32 --set crops.local_size=16 \
 --set crops.local_count=2 --set dino.prototypes=48 --set dino.bottleneck=16 --set dino.hidden=40 --set sigreg.slices=16 --set teacher.centering=softmax \
 --set optim.batch_size=4 --set optim.steps=20 --set run.save_every=5 --set run.keep=10"
expect 0 '' 'phantom shards' "$bin/prep/prep" -o made --phantom --patients 4
ln -s made/train phantom

# --- command lines
expect 0 'optim.batch_size' 'help lists the keys' train --help
expect 0 'curia2-g' 'recipes are listed' train --recipe list
expect 2 "no such recipe; there are tiny" 'unknown recipe' train --recipe huge
expect 2 'nonsense: unknown option' 'unknown option' train --nonsense
expect 2 "unknown key 'optim.learning_rate'" 'unknown key' train --set optim.learning_rate=1
expect 2 'optim.lr=-1: expected a number from 0' 'value out of range' train --set optim.lr=-1
expect 2 'model.depth=2.5: expected an integer' 'not an integer' train --set model.depth=2.5
expect 2 'optim.lr=fast: expected a number' 'not a number' train --set optim.lr=fast
expect 2 'model.ffn=relu: expected one of mlp.swiglu' 'not a choice' train --set model.ffn=relu
expect 2 'multiples of model.patch' 'crop no multiple of the patch' train --set crops.global_size=65
expect 2 'multiple of model.heads' 'width no multiple of the heads' train --set model.heads=3
expect 2 'expected key=value' 'set without a value' train --set optim.lr
expect 2 'built without the CUDA backend|no GPU answers' 'no CUDA' train --device cuda
expect 2 '--resume needs --out' 'resume without a folder' train --resume
expect 2 'expected a number of steps' 'bad number of steps' train --steps none
expect 3 'nowhere' 'no such data' train --data nowhere --out no-data
expect 0 '"model.dim": 32' 'print-config' train $small --print-config
[ -e no-data ] && bad 'a run that could not start left a folder'

# --- a run, its checkpoints, resuming
expect 0 'done after step 20' 'twenty steps' train $small --data phantom --out whole
[ "$(wc -l < whole/log.tsv)" = 21 ] && good || bad 'log.tsv does not have a header and twenty rows'
[ "$(ls whole | grep -c '^step-')" = 4 ] && good || bad "checkpoints: $(ls whole)"
expect 0 'done after step 10' 'ten steps' train $small --data phantom --out parts --steps 10
expect 2 'holds a run already' 'a folder with a run is refused' train $small --data phantom --out parts
expect 0 'resumed after step 10' 'and ten more' train --data phantom --out parts --resume
same_tree '20 steps = 10 + resume + 10' whole/step-00000020 parts/step-00000020
same 'log of both, without times' <(cut -f1-18 whole/log.tsv) <(cut -f1-18 parts/log.tsv)
expect 0 'done after step 20' 'resume from the start where there is none' train $small --data phantom --out fresh --resume
same_tree 'a resumed fresh run is a run' whole/step-00000020 fresh/step-00000020
OMP_NUM_THREADS=1 train $small --data phantom --out one --steps 5 2> err
OMP_NUM_THREADS=2 train $small --data phantom --out two --steps 5 2> err
same_tree 'one thread and two' one/step-00000005 two/step-00000005
"$bin/train_curia" $small --data phantom --out killed 2> err &
for i in $(seq 1000); do [ -d killed/step-00000005 ] || sleep 0.02; done
kill -STOP $!
expect 1 'another process' 'two processes in one folder' train --data phantom --out killed --resume
kill -9 $!
wait 2> /dev/null
expect 0 'done after step 20' 'resume after kill -9' train --data phantom --out killed --resume
same_tree 'killed and resumed' whole/step-00000020 killed/step-00000020
expect 2 'optim.lr=.*was made with' 'resume with another value' train --data phantom --out parts --resume --set optim.lr=0.5
expect 3 'not the shards that the run' 'resume with other data' train --data made/eval --out parts --resume

# --- starting from a model
expect 0 'done after step 1' 'init from a run' train $small --data phantom --out from-run --init whole --steps 1 --set optim.lr=0 --set optim.lr_min=0 --set teacher.momentum=1
same 'the teacher is the folder' whole/step-00000020/teacher/model.safetensors from-run/step-00000001/teacher/model.safetensors
expect 3 'another shape' 'init of another model' train $small --data phantom --out x --init whole --set model.ffn_hidden=64
expect 3 'neither a model folder' 'init from nothing' train --data phantom --out x --init phantom

# --- damage
cp -r whole damaged
flip damaged/step-00000020/student.safetensors 40000
expect 3 'student.safetensors: checksum.*damaged' 'flipped byte in a checkpoint' train --data phantom --out damaged --resume
rm -r damaged/step-00000020
expect 0 'resumed after step 15' 'an earlier checkpoint goes on' train --data phantom --out damaged --resume
same_tree 'to the same end' whole/step-00000020 damaged/step-00000020
truncate -s 100 damaged/step-00000020/state.json
expect 3 'state.json' 'state cut short' train --data phantom --out damaged --resume
shard=$(ls phantom/*.shard | head -1)
mkdir cut flipped
head -c $(($(stat -c %s "$shard") - 1000)) "$shard" > cut/a.shard
expect 3 'cut/a.shard' 'shard cut short' train $small --data cut --out x
cp "$shard" flipped/a.shard
for at in 5000 400000 900000; do flip flipped/a.shard $at; done
expect 3 'flipped/a.shard' 'flipped bytes in a shard' train $small --data flipped --out flipped-run --set optim.batch_size=64
mkdir small
room=$(($(du -sk whole/step-00000020 | cut -f1) * 5 / 2))       # two checkpoints and a half
if mount -t tmpfs -o size=${room}k tmpfs small 2> /dev/null; then
    expect 1 'No space left' 'full disk' train $small --data phantom --out small/run
    [ -e small/run/step-00000020 ] && bad 'a checkpoint on a full disk'
    newest=$(ls small/run | grep '^step-' | tail -1)
    if [ -n "$newest" ]; then same_tree 'the checkpoint before a full disk is whole' whole/"$newest" small/run/"$newest"; else bad 'no checkpoint fitted at all'; fi
    umount small
else
    skip 'full disk: no tmpfs can be mounted here'
fi

# --- evaluate
expect 0 'knn' 'evaluate' "$bin/evaluate" --model whole --data phantom --protocol knn --size 32 --extract features
[ -s features.npy ] && [ -s features.tsv ] && good || bad 'no features'
expect 3 'config.json|neither' 'evaluate without a model' "$bin/evaluate" --model phantom --data phantom
if [ -n "$quick" ]; then
    skip 'real scans, AutoModel: not in the quick form'
else
    # --- real scans
    if [ -d "$shared/data" ] && "$bin/prep/prep" -o real "$shared/data" > out 2> err; then
        expect 0 'done after step 200' '200 steps on real scans' train --data real --out real-run --set optim.steps=200
        awk -F'\t' 'NR > 1 && NR <= 21 { first += $2 } NR > 181 { last += $2 } END { exit !(last < first) }' real-run/log.tsv && good || bad 'the loss on real scans does not fall'
        grep -q warning err && bad "a warning on real scans: $(grep warning err | head -1)"
    else
        skip 'real scans: no shared data, or prep without NIfTI'
    fi
    # --- Hugging Face
    if "$python" -c 'import torch, transformers' 2> /dev/null; then
        expect 0 'features agree' 'AutoModel gives the same features' "$python" "$oracle/hf_oracle.py" "$bin/evaluate" whole phantom
    else
        skip 'AutoModel: no python3 with torch and transformers'
    fi
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
