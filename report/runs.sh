#!/usr/bin/env bash
# The runs of this edition, the shipped chain model and the figures; run it from the repository's root. It skips what is
# finished and resumes what was interrupted. With OMP_NUM_THREADS=1 on one core, a run on chains takes 2 minutes, one
# with the laptop preset 6, one with the deep preset 15. All other rows of results.csv, gates.svg, python-skip.pt and
# chain-tsa.pt are of 34cc4f9: `git checkout 34cc4f9 && bash report/runs.sh` makes them again.
set -eu
run() {     # run "SEEDS" NAME FLAGS...: runs in out/NAME-s0, ...
    for seed in $1; do
        folder=out/$2-s$seed
        if [ ! -e "$folder/result.json" ] && [ -e "$folder/ckpt.pt" ]; then
            python train.py --resume "$folder" --device cpu
        elif [ ! -e "$folder/result.json" ]; then
            rm -rf "$folder"        # of a run that was stopped before it had saved anything
            python train.py --device cpu --dtype bfloat16 --seed $seed --out_dir "$folder" "${@:3}"
        fi
        [ -e "$folder/about.json" ] || printf '{"processor": "%s", "threads": %s, "commit": "%s"}' \
            "$(lscpu | sed -n 's/^Model name: *//p')" "${OMP_NUM_THREADS:-$(nproc)}" "$(git rev-parse --short HEAD)" \
            > "$folder/about.json"
        [ -e "$folder/scores.json" ] || python -m report.score "$folder"
    done
}
halt="--preset chain --gate straight --halt"
straight="--preset chain --gate straight"
stretch="--preset chain --gate stretch"
ramp="--lam_ramp 0.5"
all="0 1 2 3 4 5"

# Chains. The ladder's rule: seed 0 runs every setting of a design. The two that save most at a sparse loss below 0.01
# get seeds 1 and 2, and the one with the larger mean is the design's row, if its losses stay below 0.01 (with 3 layers,
# lambda 0.03 fails for seed 1). Seeds 3 to 5, which chose nothing, run it.
for lam in 0.003 0.1; do run 0 chain-shalt-lam$lam $halt --lam $lam; done
for lam in 0.003 0.01 0.1; do run 0 chain-shalt-lam$lam-ramp $halt --lam $lam $ramp; done
run "0 1 2" chain-shalt-lam0.01 $halt --lam 0.01
run "$all" chain-shalt-lam0.03 $halt --lam 0.03
run "$all" chain-shalt-lam0.03-ramp $halt --lam 0.03 $ramp
for lam in 0.01 0.1; do run 0 chain-straight-lam$lam $straight --lam $lam; done
for lam in 0.01 0.03; do run 0 chain-straight-lam$lam-ramp $straight --lam $lam $ramp; done
run "0 1 2" chain-straight-lam0.03 $straight --lam 0.03
run "$all" chain-straight-lam0.1-ramp $straight --lam 0.1 $ramp
run "0 1 2" chain-stretch-lam0.1 $stretch --lam 0.1
run 0 chain-stretch-lam0.1-ramp $stretch --lam 0.1 $ramp
run 0 chain-stretch-lam0.3 $stretch --lam 0.3
run "$all" chain-stretch-lam0.3-ramp $stretch --lam 0.3 $ramp
for lam in 0.1 0.3; do run 0 chain-skip-lam$lam --preset chain --gate skip --lam $lam; done
for lam in 0.01 0.03; do run 0 chain3-shalt-lam$lam $halt --n_layer 3 --lam $lam; done
run "$all" chain3-shalt-lam0.01-ramp $halt --n_layer 3 --lam 0.01 $ramp
run "0 1 2" chain3-shalt-lam0.03-ramp $halt --n_layer 3 --lam 0.03 $ramp
run 0 chain3-stretch-lam0.1 $stretch --n_layer 3 --lam 0.1
run "0 1 2" chain3-stretch-lam0.1-ramp $stretch --n_layer 3 --lam 0.1 $ramp
run "0 1 2" chain3-shalt-lam0.01-bias3 $halt --n_layer 3 --lam 0.01 --gate_bias -3
run "$all" chain-plain4 --preset chain --model plain --n_layer 4
for n in 1 2 3 6; do                                    # seeds 0 to 2 are of 34cc4f9
    run "3 4 5" chain-plain$n --preset chain --model plain --n_layer $n
done
run "3 4 5" chain-exit --preset chain --model exit

# Longer chains: eight rounds instead of five, with an edit of data.py that is undone
sed -i 's/^DIGITS\(.*\) 5, 6 /DIGITS\1 8, 6 /' data.py
run "0 1 2" chain8-shalt-lam0.03-ramp $halt --n_layer 12 --block_size 48 --lam 0.03 $ramp
for n in 3 4; do run 0 chain8-plain$n --preset chain --model plain --n_layer $n --block_size 48; done
sed -i 's/^DIGITS\(.*\) 8, 6 /DIGITS\1 5, 6 /' data.py

# Text, and the paper's size: 5,000 steps of 1.9 seconds with 2 threads
text="--data shakespeare --gate straight"
deep="--preset deep --gate straight"
run "0 1 2" shakespeare-straight-lam0.001 $text --lam 0.001
run 0 shakespeare-straight-lam0.003 $text --lam 0.003
run "0 1 2" shakespeare-shalt-lam0.001 $text --halt --lam 0.001
for lam in 0.003 0.01; do run 0 shakespeare-shalt-lam$lam $text --halt --lam $lam; done
for lam in 0.001 0.003; do run 0 deep-straight-lam$lam $deep --lam $lam; done
run "0 1 2" deep-straight-lam0.01 $deep --lam 0.01
run "0 1 2" deep-shalt-lam0.001 $deep --halt --lam 0.001
for lam in 0.003 0.01; do run 0 deep-shalt-lam$lam $deep --halt --lam $lam; done
OMP_NUM_THREADS=2 run 0 paper-stretch --preset paper --data shakespeare --gate stretch

python -c "import torch
saved = torch.load('out/chain-shalt-lam0.03-s0/ckpt.pt', weights_only=True)
del saved['optimizer']
saved['model'] = {name: tensor.half() for name, tensor in saved['model'].items()}
torch.save(saved, 'report/chain.pt')"
python -m report.plot out --csv report/results.csv --svg report/forest.svg
line="    def __init__(self, name, value):"
python -m report.screenshot report/map.svg sample.py report/python-skip.pt --map --prompt "$line"

# Timings: let nothing else run. The rows of deep-stretch-full-s0 are of a checkpoint of 34cc4f9 without its threshold.
unset OMP_NUM_THREADS
rm -f report/clock.csv      # clock.py appends
python -m report.clock report/python-skip.pt --layers 12 9 --csv report/clock.csv
python -m report.clock report/chain.pt --layers 6 3 --csv report/clock.csv
python -m report.clock --n_embd 256 --layers 6 --csv report/clock.csv
for n in 128 512 1024; do python -m report.clock --n_embd $n --layers 6 --works "prefill 8" --csv report/clock.csv; done
