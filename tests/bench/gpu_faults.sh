#!/usr/bin/env bash
# Faults on a GPU host without network, through the real command, over all its GPUs: tests/bench/gpu_faults.sh OUT_DIR. Needs .gpu/site.tar.xz.
# Stops and resumes to the same bits, a killed and a hanging rank, a damaged checkpoint, and what a save costs on this host's CPUs.
set -uo pipefail
out=$1; mkdir -p "$out"
[[ -d .gpu/site ]] || { mkdir -p .gpu/site && tar xJf .gpu/site.tar.xz -C .gpu/site; }
export PYTHONPATH=$PWD/tests/faults/injection:$PWD/tests/faults:$PWD/.gpu/site:$PWD PYTHONUNBUFFERED=1 TRITON_CACHE_AUTOTUNING=1 OMP_NUM_THREADS=4
runs=$(mktemp -d); gpus=$(nvidia-smi -L | wc -l); rank=$((gpus - 1)) # the one that has the faults
words=(experiment=ngpt_tiny precision=bf16 model.hidden_size=256 model.num_attention_heads=4 train.seq_length=256 train.steps=8 train.eval_interval=4
       train.eval_steps=2 checkpoint=periodic checkpoint.interval=3 logging.interval=1 cluster.gpus_per_node="$gpus" run.root="$runs")
nvidia-smi --query-gpu=name --format=csv,noheader

train() { timeout "${SECONDS_EACH:-200}" python3 -m launch.cli train "${words[@]}" "$@"; }
same() {  # A B: every tensor of the last checkpoints has the same bits
  CUDA_VISIBLE_DEVICES='' python3 -c "import sys; from pathlib import Path; from runs import assert_same_run; assert_same_run(*map(Path, sys.argv[1:])); print('same bits')" \
    "$runs/$1" "$runs/$2" 2>&1 | tail -n 1
}
signal_all() {  # PID: SIGTERM to every process of ours under it
  python3 -c "import psutil, sys; [p.terminate() for p in psutil.Process(int(sys.argv[1])).children(recursive=True) if 'launch.' in ' '.join(p.cmdline())]" "$1"
}
last() { tail -n "${2:-1}" "$out/$1.log" | cut -c1-400; }

echo "== twin"; train run.name=twin > "$out/twin.log" 2>&1; echo "exit $?"; last twin
echo "== SIGTERM to every process"
NGPT_FAULT='{"kind": "slow_step", "seconds": 0.5}' train run.name=signal > "$out/signal.log" 2>&1 & launcher=$!
until grep -q 'step 2/8' "$out/signal.log"; do sleep 0.2; kill -0 $launcher 2>/dev/null || break; done
signal_all $launcher; wait $launcher; echo "exit $?"; last signal
train run.name=signal > "$out/resumed.log" 2>&1; echo "exit $?"; last resumed; same signal twin
echo "== a rank is killed"
NGPT_FAULT="{\"kind\": \"kill\", \"step\": 5, \"rank\": $rank}" train run.name=killed > "$out/killed.log" 2>&1; echo "exit $?"; last killed 2
train run.name=killed > "$out/resumed2.log" 2>&1; echo "exit $?"; same killed twin
echo "== a rank hangs"
NGPT_FAULT="{\"kind\": \"hang\", \"step\": 5, \"rank\": $rank}" train run.name=hang cluster.hang_timeout_s=20 > "$out/hang.log" 2>&1; echo "exit $?"; last hang 2
tar cJf "$out/hang.tar.xz" -C "$runs/hang" logs heartbeat 2>/dev/null
echo "== a flipped bit"
python3 - "$runs/twin/checkpoints" <<'P'
import sys, pathlib
file = sorted(pathlib.Path(sys.argv[1]).glob("iter_0000008/*.distcp"))[-1]
data = bytearray(file.read_bytes()); data[len(data) // 2] ^= 1; file.write_bytes(data)
P
train run.name=twin train.steps=10 megatron.override_opt_param_scheduler=true > "$out/flipped.log" 2>&1; echo "exit $?"; grep -h 'note:' "$out/flipped.log" | head -n 3 | cut -c1-400
echo "== what a save costs"
CUDA_VISIBLE_DEVICES='' timeout 150 python3 tests/bench/checkpoint_save.py > "$out/save.txt" 2>&1; tail -n 12 "$out/save.txt"
