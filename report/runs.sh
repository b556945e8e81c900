#!/usr/bin/env bash
# The runs behind README.md and report/README.md, except the older ones at the paper's size. Run this script from the
# repository's root; the tables say which seeds have been run. With OMP_NUM_THREADS=1 on one core, a laptop run takes
# about 6 minutes, a chain run 2 minutes and a paper run 3 hours. Finished runs are not repeated.
set -eu
run() {     # run NAME FLAGS...: one seed, into out/NAME-sSEED
    local folder=out/$1-s$seed
    shift
    [ -e "$folder/result.json" ] || python train.py --seed $seed --out_dir "$folder" "$@"
}

for seed in 0 1 2; do
    # Chains
    for n in 1 2 3 6; do run chain-dense$n --data chain --model dense --n_layer $n; done
    run chain-tsa --data chain --lam 0.01
    run chain-exit --data chain --model exit
    run chain-halt-lam0.03 --data chain --model halt
    run chain-halt-lam0.05 --data chain --model halt --lam 0.05

    # Two texts
    for text in shakespeare stdlib; do
        for n in 3 4 5 6; do run $text-dense$n --data $text --model dense --n_layer $n; done
        run $text-tsa --data $text
        run $text-exit --data $text --model exit
        run $text-halt-lam0.03 --data $text --model halt
    done

    # The paper's size
    for n in 5 6; do run paper-dense$n --preset paper --model dense --n_layer $n; done
    run paper-tsa --preset paper
done

# Runs that need a change in tsa.py first, named in the comment. Seed 0 unless the table says otherwise.
seed=0
# README.md, "Your own gate":
# run shakespeare-straight --gate straight --lam 0.01
# run chain-straight --data chain --gate straight --lam 0.01
# README.md, exercise 2:
# run shakespeare-constant
# README.md, exercise 3, and the shares 0.4, 0.1, 0.5:
# run shakespeare-halt-shares.1-lam0.03 --model halt
# run stdlib-halt-shares.1-lam0.03 --data stdlib --model halt
# run shakespeare-halt-shares.4-lam0.03 --model halt
run stdlib-halt-lam0.015 --data stdlib --model halt --lam 0.015

# Scores beside result.json: skipping only gates below 0.1, early exit's thresholds, hops of chains
for folder in out/{shakespeare,stdlib}-tsa-s?; do
    python -m report.depth $folder/ckpt.pt --gate skip --threshold 0.9
done
for folder in out/{shakespeare,stdlib}-exit-s?; do
    python -m report.depth $folder/ckpt.pt --threshold .99 .95 .9 .85 .8 .75 .7 .65 .6 .55 .5 .4 .3
done
for folder in out/chain-*; do python -m report.depth $folder/ckpt.pt; done
for folder in out/chain-tsa-s?; do
    python -m report.depth $folder/ckpt.pt --gate skip --threshold 0.8 0.9 0.95
done
python -m report.plot out --csv report/results.csv
python -m report.plot out/{shakespeare,stdlib}-{dense4,dense6,tsa,exit,halt-lam0.03}-s? --svg report/frontier.svg
python -m report.figure chain out/chain-halt-lam0.03-s0/ckpt.pt out/chain-tsa-s0/ckpt.pt report/chain.svg
