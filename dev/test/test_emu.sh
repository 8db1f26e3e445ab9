#!/bin/bash
# ./train_curia on the CUDA backend under the emulator: whole runs, resuming, memory that does not suffice, no device.
# Prints a line for each failure, then "N passed, N failed"; exit status 1 where one failed.
#
#   dev/test/test_emu.sh    from the top of the repository, after make emu
set -u
train=$(realpath "${EMU:-build/emu}/train_curia")
cpu=$(realpath ./train_curia)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -d data ] && ln -s "$(realpath data)" "$work/data"
cd "$work" || exit 1
export OMP_NUM_THREADS=1
passed=0 failed=0
good() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "failed: $*"; }
expect() { # STATUS TEXT NAME COMMAND...
    local status=$1 text=$2 name=$3 got
    shift 3
    "$@" > out 2> err
    got=$?
    if [ $got != "$status" ]; then bad "$name: exit status $got, expected $status: $(tail -1 err)"
    elif ! grep -Eq -- "$text" out err; then bad "$name: no '$text' in: $(tail -2 err)"
    else good; fi
}
# A model of the smallest width, all losses, drop path.
small=(--set model.dim=64 --set model.heads=1 --set model.depth=2 --set optim.batch_size=4 --set sigreg.slices=32 --set optim.steps=40
       --set optim.warmup_steps=4 --set model.drop_path=0.2 --set dino.hidden=64 --set dino.prototypes=32 --set dino.bottleneck=16)

expect 0 'step 40/40' 'a run on the CPU' "$cpu" --device cpu "${small[@]}" --out cpu
expect 0 'device cuda .the GPU answers' 'a run on the device' "$train" "${small[@]}" --out cuda
awk -F'\t' 'NR == FNR { a[$1] = $2; next } FNR > 1 { d = $2 / a[$1] - 1; n++; s += d; if (d * d > worst) worst = d * d }
            END { exit !(n == 40 && worst < 0.02 ^ 2 && (s / n) ^ 2 < 0.005 ^ 2) }' cpu/log.tsv cuda/log.tsv &&
    good || bad "losses of 40 steps on the device are not the CPU's within 2 %"
expect 0 'step 20/40|step 20/20' 'half a run' "$train" "${small[@]}" --out halves --steps 20
expect 0 'resumed after step 20' 'the other half' "$train" --out halves --resume
for file in student.safetensors optimizer.safetensors teacher/model.safetensors; do
    cmp -s "cuda/step-00000040/$file" "halves/step-00000040/$file" && good || bad "resumed run: $file differs"
done
cmp -s <(cut -f1-18 cuda/log.tsv) <(cut -f1-18 halves/log.tsv) && good || bad "resumed run: log.tsv differs"
expect 0 'step 3/' 'blocks computed again' "$train" "${small[@]}" --out again --steps 3 --set run.recompute=block
cmp -s <(head -4 cuda/log.tsv | cut -f1-18) <(cut -f1-18 again/log.tsv) && good || bad "recomputed blocks: log.tsv differs"
expect 2 'largest that fits is [0-9]+' 'a batch that does not fit' \
    env CURIA_EMU_MEMORY=120000000 "$train" --batch-size 512 --out none
expect 2 'no GPU answers' 'no device, asked for by name' env CURIA_EMU_DEVICES=0 "$train" --device cuda --out none
expect 0 'device cpu .no GPU answers' 'no device' env CURIA_EMU_DEVICES=0 "$train" "${small[@]}" --out none --steps 1
expect 2 'heads of 64' 'heads of another width' "$train" --device cuda --set model.heads=4 --out none2
expect 1 'step [0-9]+.*(loss is|CUDA error)' 'a loss that is no number' \
    "$train" "${small[@]}" --out broken --set optim.lr=10 --set optim.scaling=none --set optim.clip=0 --set optim.warmup_steps=0 --set optim.eps=0 --set student.temp=0.001
echo "$passed passed, $failed failed"
[ $failed = 0 ]
