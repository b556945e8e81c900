#!/usr/bin/env bash
# The runs, figures and checkpoints behind README.md and report/README.md. Run this script from the repository's root:
# it skips what is finished and resumes what was interrupted. With OMP_NUM_THREADS=1 on one core, a laptop run takes 5
# to 10 minutes, one with 12 layers 7 to 18 (with three times the steps, up to 60), a chain run 2, and one of the
# paper's size 1 to 3 hours. The tables say which seeds have been run, and the column `commit` of results.csv with which
# code.
set -eu
into() {    # into NAME PROGRAM FLAGS...: one seed of a run, in out/NAME-s$seed
    local folder=out/$1-s$seed
    shift
    if [ -e "$folder/result.json" ]; then
        return
    elif [ -e "$folder/ckpt.pt" ]; then
        case $2 in
            --*) python -m $1 --resume "$folder" ;;             # train
            *) python -m $1 $2 --resume "$folder" ;;            # report.variants NAME
        esac
    else
        rm -rf "$folder"        # of a run that was killed before it had saved anything
        python -m "$@" --device cpu --dtype bfloat16 --seed $seed --out_dir "$folder"
    fi
    git rev-parse --short HEAD > "$folder/commit"
}
run() { into $1 train "${@:2}"; }                               # run NAME FLAGS...
variant() { into $1 report.variants "${@:2}"; }                 # variant NAME VARIANT FLAGS...
score() { python -m report.depth "$@" --device cpu; }

for seed in 0 1 2; do
    # Chains
    for n in 1 2 3 6; do run chain-plain$n --data chain --model plain --n_layer $n; done
    run chain-tsa --data chain --lam 0.01
    run chain-exit --data chain --model exit
    for lam in 0.03 0.05; do run chain-halt-lam$lam --data chain --model halt --lam $lam; done
    variant chain-straight straight --data chain --lam 0.01
    for lam in 0.03 0.1; do run chain-stretch-lam$lam --data chain --gate stretch --lam $lam; done
    run chain-halt3 --data chain --model halt --n_layer 3

    # Copy and sort
    for task in copy sort; do
        run $task-plain1 --data $task --model plain --n_layer 1
        run $task-tsa --data $task
    done

    # Two texts, 6 layers
    for text in shakespeare stdlib; do
        for n in 3 4 5 6; do run $text-plain$n --data $text --model plain --n_layer $n; done
        run $text-tsa --data $text
        run $text-stretch --data $text --gate stretch
        run $text-exit --data $text --model exit
        run $text-halt-lam0.03 --data $text --model halt
        variant $text-halt-shares.4-lam0.03 shares.4 --data $text
        variant $text-exit-heavy exit-heavy --data $text
        variant $text-constant constant --data $text
    done
    for n in 1 2; do run shakespeare-plain$n --data shakespeare --model plain --n_layer $n; done
    variant shakespeare-straight straight --data shakespeare --lam 0.01

    # Python, 12 layers
    for n in 6 9 10 12; do run deep-plain$n --preset deep --model plain --n_layer $n; done
    run deep-halt-lam0.03 --preset deep --model halt
    for n in 8 10 12; do run deep-several$n --preset deep --model halt --lam 0 --n_layer $n; done
    run deep-tsa --preset deep --gate skip --threshold 0.9      # trained as with the paper's gate
    run deep-stretch --preset deep --gate stretch               # deep-stretch-full: the same with the code at 1609593
    variant deep-exit-heavy exit-heavy --preset deep
done

# Python, 12 layers, three times as long; and with dropout
seed=0
long="--preset deep --max_iters 7200 --eval_interval 600"
for n in 9 12; do run long-plain$n $long --model plain --n_layer $n; done
run long-tsa $long --gate skip --threshold 0.9
variant long-constant constant $long
for seed in 0 1 2; do
    for n in 9 12; do run drop-plain$n $long --dropout 0.1 --model plain --n_layer $n; done
    run drop-tsa $long --dropout 0.1 --gate skip --threshold 0.9
done
seed=1      # whose drop-tsa saves more than 9 layers
run drop-plain8 $long --dropout 0.1 --model plain --n_layer 8

# Shakespeare, seeds that no setting was chosen on; then fine-tuning with switches, and plain models for as many steps
for seed in 3 4 5; do
    for n in 4 5 6; do run fresh-plain$n --data shakespeare --model plain --n_layer $n; done
    run fresh-halt-lam0.03 --data shakespeare --model halt
    run fresh-tsa --data shakespeare
    tune="--data shakespeare --max_iters 400 --learning_rate 5e-4"
    variant repair-straight straight --init_from out/fresh-tsa-s$seed/ckpt.pt $tune
    variant repair-plain5 same --init_from out/fresh-plain5-s$seed/ckpt.pt $tune --model plain --n_layer 5
done

# The learning rate of 12 layers on Python
seed=0
for flags in "2e-3 100" "3e-3 100" "4e-3 300" "3e-3 600"; do
    set -- $flags
    run rate-plain12-lr$1-w$2 --data stdlib --model plain --n_layer 12 --learning_rate $1 --warmup_iters $2
done
run rate-plain12-drop0.1 --preset deep --model plain --dropout 0.1

# Other settings, one seed
for lam in 0.015 0.045; do run deep-halt-lam$lam --preset deep --model halt --lam $lam; done
run shakespeare-tsa-lam0 --data shakespeare --lam 0
run shakespeare-tsa-lam0.05 --data shakespeare --lam 0.05
run shakespeare-tsa-bias-3 --data shakespeare --gate_bias -3
run shakespeare-tsa-bias1 --data shakespeare --gate_bias 1
run shakespeare-halt-lam0.06 --data shakespeare --model halt --lam 0.06
for text in shakespeare stdlib; do
    run $text-halt-lam0 --data $text --model halt --lam 0
    run $text-halt-lam0.015 --data $text --model halt --lam 0.015
    variant $text-halt-shares.4-lam0.015 shares.4 --data $text --lam 0.015
    for lam in 0.015 0.03; do variant $text-halt-shares.1-lam$lam shares.1 --data $text --lam $lam; done
done

# The paper's size
for seed in 0 1 2; do
    for n in 5 6; do run paper-plain$n --data shakespeare --preset paper --model plain --n_layer $n; done
    run paper-tsa --data shakespeare --preset paper
done
for seed in 0 1; do run paper-halt-lam0.03 --data shakespeare --preset paper --model halt; done
seed=0
run paper-exit --data shakespeare --preset paper --model exit
tune="--init_from out/paper-tsa-s0/ckpt.pt --data shakespeare --preset paper --max_iters 200 --learning_rate 1e-4"
variant paper-straight-from-tsa straight $tune --eval_interval 100
for lam in 0.01 0.03; do variant paper-straight-from-tsa-lam$lam straight $tune --eval_interval 100 --lam $lam; done

# Scores beside result.json: other gates and thresholds, and hops of chains
for folder in out/{shakespeare,stdlib}-tsa-s? out/shakespeare-tsa-lam*-s0; do
    score $folder/ckpt.pt --gate skip --threshold 0.9
done
for folder in out/{shakespeare,stdlib}-exit-s? out/{shakespeare,stdlib}-exit-heavy-s?; do
    score $folder/ckpt.pt --threshold .75
done
for folder in out/{copy,sort}-*; do score $folder/ckpt.pt; done
score out/shakespeare-exit-s0/ckpt.pt --threshold .6 .55 .5 .4
score out/paper-exit-s0/ckpt.pt --threshold .95 .8
for folder in out/chain-*; do score $folder/ckpt.pt; done
for folder in out/chain-tsa-s?; do score $folder/ckpt.pt --gate skip --threshold 0.9; done
for folder in out/chain-exit-s?; do score $folder/ckpt.pt --variant exit-nofloor; done
for folder in out/deep-tsa-s? out/long-tsa-s0; do
    score $folder/ckpt.pt
    score $folder/ckpt.pt --gate soft --threshold 0.5
done
for folder in out/deep-stretch-s?; do score $folder/ckpt.pt; done
score out/long-constant-s0/ckpt.pt --gate skip --threshold 0.9
for folder in out/fresh-tsa-s?; do
    for gate in ones close round-up; do score $folder/ckpt.pt --gate $gate --threshold 0.5; done
    score $folder/ckpt.pt --threshold .4 .6 .7 .8
done
for folder in out/paper-tsa-s?; do score $folder/ckpt.pt --gate skip --threshold 0.9; done
for gate in ones close round-up; do score out/paper-tsa-s0/ckpt.pt --gate $gate --threshold 0.5; done
score out/paper-tsa-s0/ckpt.pt --threshold .4 .6 .7 .8
for folder in out/{shakespeare,paper}-halt-lam0.03-s?; do score $folder/ckpt.pt; done     # the loss after each block

# The test split, once, after all choices had been made on the validation split
for folder in out/{shakespeare,stdlib,fresh}-{plain4,plain5,plain6,halt-lam0.03}-s? out/shakespeare-tsa-s?; do
    score $folder/ckpt.pt --split test
done
for folder in out/deep-{plain{6,9,10,12},several{8,10,12},halt-lam0.03}-s?; do score $folder/ckpt.pt --split test; done
for folder in out/deep-{tsa,stretch}-s? out/{long,drop}-{plain9,plain12,tsa}-s? out/drop-plain8-s1; do
    score $folder/ckpt.pt --split test
done
score out/long-constant-s0/ckpt.pt --split test
for folder in out/{shakespeare,stdlib}-tsa-s?; do
    score $folder/ckpt.pt --split test --gate skip --threshold 0.9
done
for folder in out/paper-halt-lam0.03-s?; do score $folder/ckpt.pt --split test; done

# Tables and figures
python -m report.plot out --csv report/results.csv --svg report/frontier.svg
python -m report.depth out/paper-tsa-s0/ckpt.pt --histogram report/gates.svg

# The checkpoints that come with the code: half precision, without the optimizer's state
ship() {    # ship FROM TO
    python - "$1" "$2" <<END
import sys, torch
saved = torch.load(sys.argv[1], weights_only=True)
del saved["optimizer"]
saved["model"] = {name: tensor.half() for name, tensor in saved["model"].items()}
torch.save(saved, sys.argv[2])
END
}
ship out/chain-halt-lam0.03-s0/ckpt.pt report/chain-halt.pt
ship out/chain-tsa-s0/ckpt.pt report/chain-tsa.pt
ship out/deep-tsa-s0/ckpt.pt report/python-skip.pt
line="    def __init__(self, name, value):"
python -m report.screenshot report/map.svg sample.py report/python-skip.pt --map --prompt "$line"

# Timings: let nothing else run
seed=0
unset OMP_NUM_THREADS
for n in 9 10 12; do run alone-plain$n --preset deep --model plain --n_layer $n; done
rm -f report/clock.csv      # clock.py appends
python -m report.clock --out report/clock.csv
python -m report.clock report/chain-halt.pt --out report/clock.csv
python -m report.clock report/python-skip.pt --layers 12 10 9 --out report/clock.csv
python -m report.clock out/deep-stretch-s0/ckpt.pt --layers 12 9 --out report/clock.csv
for dtype in float32 bfloat16; do
    for ckpt in out/deep-stretch-s0/ckpt{,-600}.pt; do      # ckpt-600.pt: copied by hand when the run had saved step 600
        if [ -e $ckpt ]; then python -m report.clock $ckpt --layers 12 10 9 --train $dtype --out report/clock.csv; fi
    done
    for name in chain-stretch-lam0.1-s0 shakespeare-stretch-s2; do
        python -m report.clock out/$name/ckpt.pt --layers 6 --train $dtype --out report/clock.csv
    done
done
python -m report.clock out/deep-several10-s0/ckpt.pt --layers 12 10 --train bfloat16 --out report/clock.csv
for n in 128 256 512; do python -m report.clock --layers 6 --n_embd $n --train float32 --out report/clock.csv; done
