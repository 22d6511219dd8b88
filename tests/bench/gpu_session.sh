#!/usr/bin/env bash
# What one GPU session checks and measures; run from the repository root on a GPU host without network.
#   tests/bench/gpu_session.sh OUT_DIR STEP...       steps: unpack short ngpt gpt one two (after one) confined; ONE and TWO filter cases by name
#                                                    nvfp4: check quantise linear doctor paper nvidia beside; GPU tests: native
#                                                    Mamba and experts: hybrid_one hybrid_cpu hybrid_two (after hybrid_one) hybrid hybrid_paper hybrid_gpt
#                                                    tune (Mamba's kernels, before any other) measure profile (of MODELS, four by default, at micro-batch SIZES) rows
# WORDS: more words of the configuration for every training run, say WORDS="model.expert_impl=grouped".
# Needs .gpu/site.tar.xz (the GPU dependencies) and .gpu/data.tar.xz (enwik8 prepared with the tekken vocabulary as enwik8_tekken/).
set -uo pipefail
failed=0
out=$1; shift
mkdir -p "$out"
export PYTHONPATH=$PWD/.gpu/site:$PWD PYTHONUNBUFFERED=1 TRITON_CACHE_AUTOTUNING=${TRITON_CACHE_AUTOTUNING:-1} CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=4
data=.gpu/enwik8_tekken
real_text=("data.train=[{path: $data/train, weight: 1}]" "data.valid=[{path: $data/valid, weight: 1}]" "tokenizer.path=$data/tokenizer.json")
fifty=(train.global_batch_size=16 train.steps=50 train.micro_batch_size="${MICRO_BATCH:-1}" train.eval_interval=50 train.eval_steps=1
       logging.interval=5 logging.health_interval=10 checkpoint=none)
read -ra words <<< "${WORDS:-}"
eight=(train.global_batch_size=8)  # of the hybrid models

unpack() {
  mkdir -p .gpu/site && tar xJf .gpu/site.tar.xz -C .gpu/site && tar xJf .gpu/data.tar.xz -C .gpu
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  python3 -c "import torch, transformer_engine as te, megatron.core as m; print('torch', torch.__version__, 'TE', te.__version__, 'megatron-core', m.__version__)"
}

run_cases() {  # LIST PROCESSES [REGEX]: a list of cases from tests/distributed/gpu_cases.py
  python3 tests/distributed/gpu_cases.py "$1" "$out/cases" "${3:-}" > "$out/$1.json"
  timeout "${CASES_SECONDS:-300}" python3 -m torch.distributed.run --standalone --nproc-per-node "$2" tests/distributed/case_runner.py "$out/$1.json" > "$out/$1.log" 2>&1
  python3 tests/distributed/gpu_cases.py --report "$1" "$out/cases" | tee "$out/$1.txt" || failed=1
}

train() {  # EXPERIMENT [PRECISION]: 50 steps of real text
  local name=$1${2:+_$2}
  timeout "${TRAIN_SECONDS:-420}" python3 -m launch.cli train experiment="$1" ${2:+precision="$2"} "${real_text[@]}" "${fifty[@]}" "${words[@]}" \
    run.root="$out/runs" run.name="$name" > "$out/$name.log" 2>&1
  code=$?; echo "exit $code"; tail -n 6 "$out/$name.log"
  cp "$out/runs/$name/metrics.jsonl" "$out/$name.metrics.jsonl"; cp "$out/runs/$name/summary.json" "$out/$name.summary.txt"
  rm -rf "$out/runs/$name/data_cache"
  tail -n 15 "$out/runs/$name/logs/megatron-rank0.log" > "$out/$name.megatron.txt"
  return $code
}

read -ra models <<< "${MODELS:-gpt_1p2b_dense_bf16 ngpt_1p2b_dense_bf16 gpt_hybrid_1p5b_bf16 ngpt_hybrid_1p5b_bf16}"
balanced=(data=mock train.global_batch_size=8 train.eval_steps=0 checkpoint=none +megatron.moe_router_force_load_balancing=true)

tune() {  # Both kinds of Mamba mixer at once: choosing among Triton's tilings takes minutes, nearly all of it compilation on one core.
  for model in gpt ngpt; do
    python3 -m launch.cli train experiment="${model}_hybrid_1p5b_bf16" "${balanced[@]}" model.layer_pattern=ME model.num_layers=2 \
      train.global_batch_size=1 train.steps=1 run.root="$out/runs" run.name="tune_$model" > "$out/tune_$model.log" 2>&1 &
  done
  wait
}

measure() {  # EXPERIMENT MICRO_BATCH: steps of random text with balanced routing
  local name=${1}_micro_batch_$2
  timeout 150 python3 -m launch.cli train experiment="$1" "${balanced[@]}" "${words[@]}" train.micro_batch_size="$2" train.steps=8 logging.interval=2 \
    logging.health_interval=8 run.root="$out/runs" run.name="$name" > "$out/$name.log" 2>&1 || tail -n 3 "$out/$name.log"
  cp "$out/runs/$name/metrics.jsonl" "$out/$name.metrics.jsonl"; cp "$out/runs/$name/config.yaml" "$out/$name.config.yaml"
  python3 tests/bench/estimate_vs_measured.py "$out/runs/$name" --gpu h100 | tee -a "$out/measure.txt"
}

profile() {  # EXPERIMENT: one step of one micro-batch
  timeout 150 python3 -m launch.cli train experiment="$1" "${balanced[@]}" "${words[@]}" train.global_batch_size=1 train.steps=8 debug=profile \
    debug.profile_start=6 debug.profile_stop=7 run.root="$out/runs" run.name="profile_$1" > "$out/profile_$1.log" 2>&1
  python3 tests/bench/profile_table.py "$out/runs/profile_$1/torch_profile" 60 > "$out/profile_$1.txt"
  head -n 12 "$out/profile_$1.txt" | cut -c1-110
}

for step in "$@"; do
  echo "== $step"; began=$SECONDS
  case $step in
    unpack) unpack ;;
    one) run_cases one 1 "${ONE:-}" ;;
    confined) run_cases confined 1 ;;
    two) run_cases two 2 "${TWO:-}" ;;
    hybrid_one) run_cases hybrid_one 1 "${ONE:-}" ;;
    hybrid_cpu) CUDA_VISIBLE_DEVICES="" run_cases hybrid_cpu 1 ;;
    hybrid_two) run_cases hybrid_two 2 "${TWO:-}" ;;
    hybrid) (fifty+=("${eight[@]}"); train ngpt_hybrid_1p5b_bf16) || failed=1 ;;
    hybrid_paper) (fifty+=("${eight[@]}"); train ngpt_hybrid_1p5b_nvfp4) || failed=1 ;;
    hybrid_gpt) (fifty+=("${eight[@]}"); train gpt_hybrid_1p5b_bf16) || failed=1 ;;
    tune) tune ;;
    measure) for model in "${models[@]}"; do for size in ${SIZES:-1 2}; do measure "$model" "$size"; done; done ;;
    profile) for model in "${models[@]}"; do profile "$model"; done ;;
    rows) python3 tests/bench/row_kernels.py --out "$out" > "$out/rows.txt" || failed=1; tail -n 38 "$out/rows.txt" ;;
    ngpt) train ngpt_1p2b_dense_bf16 || failed=1 ;;
    gpt) train gpt_1p2b_dense_bf16 || failed=1 ;;
    check) for file in tests/numerics/golden/*.npz; do python3 -m ngpt.precision.check_golden "$file" --device cuda || failed=1; done ;;
    quantise) python3 tests/bench/nvfp4_quantize.py --check --out "$out" || failed=1 ;;
    linear) python3 tests/bench/nvfp4_linear.py --out "$out" || failed=1 ;;
    doctor) python3 -m launch.cli doctor || failed=1 ;;
    native) python3 -m pytest tests/gpu -q || failed=1 ;;
    paper) train ngpt_1p2b_dense_nvfp4 || failed=1 ;;
    nvidia) train ngpt_1p2b_dense_nvfp4 nvfp4_nvidia || failed=1 ;;
    beside) (fifty+=(train.steps=8 train.eval_interval=8 logging.interval=1 logging.health_interval=8); train ngpt_1p2b_dense_bf16) || failed=1 ;;
    short) (fifty+=(train.steps=4 train.eval_interval=4 logging.interval=1 logging.health_interval=2); train "${SHORT:-ngpt_1p2b_dense_bf16}") || failed=1 ;;
  esac
  echo "== $step took $((SECONDS - began)) s"
done
rm -rf "$out/runs" "$out/cases" "$out"/{,hybrid_}{one,two}.json "$out"/{confined,hybrid_cpu}.json
exit $failed
