#!/usr/bin/env bash
# Seconds from `ngpt train` to its first step over 1 TB of tokens: a sparse .bin, an .idx of realistic documents, a hand-made manifest.
#   tests/bench/big_data_launch.sh [FOLDER] [DOCUMENTS]   default: a new folder under /tmp, 250 million documents (5 GB of .idx, 2 GB of cache)
# Launches twice: first the sample indices are built, then they are read. Run from the repository root with the environment's python first on the PATH.
set -euo pipefail
folder=${1:-$(mktemp -d)}; documents=${2:-250000000}
mkdir -p "$folder/data"
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ -f "$folder/data/manifest.json" ] || python tests/bench/big_data.py "$folder/data" "$documents"
rm -rf "$folder/runs"
train=(python -u -m launch.cli train experiment=ngpt_tiny "run.root=$folder/runs" run.name=big tokenizer=bpe data.mock=false data.valid=[]
       "data.train=[{path: $folder/data/train}]" "data.cache_dir=$folder/runs/cache" train.seq_length=8192 train.micro_batch_size=1
       train.global_batch_size=1 train.steps=2 train.eval_steps=0 model.vocab_size=4096 model.num_layers=1 model.num_attention_heads=1
       model.num_query_groups=1 checkpoint=none)
for launch in "builds the sample indices" "finds them built"; do
  start=$(date +%s.%N)
  "${train[@]}" 2>&1 | tee "$folder/launch.log" | while read -r line; do
    case $line in "step 1/"*) echo "first step after $(python -c "import time; print(round(time.time() - $start, 1))") s: a launch that $launch" ;; esac
  done || { tail -n 5 "$folder/launch.log"; exit 1; }
done
du -sh --apparent-size "$folder/data/train.bin" "$folder/data/train.idx" "$folder/runs/cache"
