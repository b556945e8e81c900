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
    for n in 1 2; do run shakespeare-dense$n --model dense --n_layer $n; done

    # The paper's size
    for n in 5 6; do run paper-dense$n --preset paper --model dense --n_layer $n; done
    run paper-tsa --preset paper
done

# Other settings: one seed
seed=0
run shakespeare-tsa-lam0 --lam 0
run shakespeare-tsa-lam0.05 --lam 0.05
run shakespeare-tsa-bias-3 --gate_bias -3
run shakespeare-tsa-bias1 --gate_bias 1
run shakespeare-halt-lam0.015 --model halt --lam 0.015
run shakespeare-halt-lam0.06 --model halt --lam 0.06
run stdlib-halt-lam0.015 --data stdlib --model halt --lam 0.015
for text in shakespeare stdlib; do run $text-halt-lam0 --data $text --model halt --lam 0; done

# These runs need a change to tsa.py first: the gate of README.md ("Your own gate"), the constant gate of exercise 2,
# the shares of exercise 3 or 0.4, 0.1 and 0.5, or the loss in report/LOG.md (early exit with frozen keys and values).
# The tables give the seeds.
# run shakespeare-straight --gate straight --lam 0.01
# run chain-straight --data chain --gate straight --lam 0.01
# run shakespeare-constant
# run shakespeare-exit-frozen --model exit --threshold 0.75
# for text in shakespeare stdlib; do
#     run $text-halt-shares.1-lam0.03 --data $text --model halt
#     run $text-halt-shares.1-lam0.015 --data $text --model halt --lam 0.015
#     run $text-halt-shares.4-lam0.03 --data $text --model halt
#     run $text-halt-shares.4-lam0.015 --data $text --model halt --lam 0.015
# done

# Scores beside result.json: skipping blocks with small gates, early exit's thresholds, hops of chains
for folder in out/{shakespeare,stdlib}-tsa*; do
    python -m report.depth $folder/ckpt.pt --gate skip --threshold 0.9
done
for folder in out/{shakespeare,stdlib}-exit-s?; do python -m report.depth $folder/ckpt.pt --threshold .75; done
python -m report.depth out/shakespeare-exit-s0/ckpt.pt --threshold .99 .95 .9 .85 .8 .7 .65 .6 .55 .5 .4 .3
for folder in out/chain-*; do python -m report.depth $folder/ckpt.pt; done
for folder in out/chain-tsa-s?; do
    python -m report.depth $folder/ckpt.pt --gate skip --threshold 0.8 0.9 0.95
done

# The test split, once, after all choices had been made on the validation split
for folder in out/{shakespeare,stdlib}-{dense4,dense5,dense6,tsa,halt-lam0.03}-s?; do
    python -m report.depth $folder/ckpt.pt --split test
done
for folder in out/{shakespeare,stdlib}-tsa-s?; do
    python -m report.depth $folder/ckpt.pt --split test --gate skip --threshold 0.9
done
for folder in out/{shakespeare,stdlib}-exit-s?; do
    python -m report.depth $folder/ckpt.pt --split test --threshold 0.75
done

python -m report.plot out --csv report/results.csv
python -m report.plot out/{shakespeare,stdlib}-{dense[3456],tsa,exit,halt-lam0.0*}-s? --svg report/frontier.svg
python -m report.figure chain out/chain-halt-lam0.03-s0/ckpt.pt out/chain-tsa-s0/ckpt.pt report/chain.svg
