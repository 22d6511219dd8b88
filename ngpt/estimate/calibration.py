"""Every constant of the estimates that was measured rather than derived, each with its measurement. Recalibrate here.

All of them come from one H100 80GB HBM3 (torch 2.11, Transformer Engine 2.20.2, megatron-core 0.19.2, BF16, sequence 8192, vocabulary
131,072); other GPUs are assumed to reach the same fractions of their peaks. `tests/bench/estimate_vs_measured.py` compares runs: how the
runs since then compare is in `tests/bench/results/hybrid_h100_2026-11-22.md`.
"""

# Rates, as fractions of the peaks in `hardware.GPUS`.
COPY_FRACTION = 0.885  # of HBM: 2964 GB/s of 3350 in a device-to-device copy
KERNEL_FRACTION = 0.85  # of copy: element-wise and row-wise kernels (the residual step's and norms' target)
GEMM_FRACTION = 0.69  # of the dtype's rate: 685 TFLOP/s in a BF16 product of 8192^3
LOW_PRECISION_GEMM_FRACTION = 0.6  # the same for FP8 and NVFP4: assumed, not measured
ATTENTION_FORWARD_FRACTION = 0.57  # of the BF16 rate, causal: 12 heads of 128, 0.365 ms (gpt_hybrid_1p5b, profile of 2026-11-22)
ATTENTION_BACKWARD_FRACTION = 0.42  # counting twice the forward's FLOPs: 1.00 ms in the same profile
LINK_FRACTION = 0.8  # of NVLink's and the network's rates in collectives: assumed, not measured

# Time, in seconds.
GEMM_RAMP_S = 3e-6  # start and tail of a product: 768 x 1024 x 1024 in 6 us (experts of gpt_hybrid_1p5b, same profile)
COLLECTIVE_LATENCY_S = 20e-6  # assumed, not measured
# Host time: gpt_hybrid_1p5b 335 ms and nGPT with eager norms 735 ms a micro-batch, of 7,006 and 17,845 launches, 3,072 of them products
# of one expert each; two equations for two costs, with everything that Python does around a launch.
LAUNCH_S = 37e-6
# Fitted where each expert had a kernel of its own; with one kernel for all (Hopper, by now) the estimates are still 0.95 of two runs.
EXPERT_PRODUCT_S = 62e-6  # one expert's product in a grouped linear: lists, views and hooks for each of its weights

# Passes over memory, in units of the named tensor's bytes at KERNEL_FRACTION of copy.
CROSS_ENTROPY_BYTES = 48  # a logit at copy speed: 17.7 ms for 8192 x 131072, five compiled kernels (same profile)
SCAN_FORWARD_PASSES = 5.0  # over in_proj's output and the chunk states: 0.33 ms a layer of gpt_hybrid_1p5b (same profile)
SCAN_BACKWARD_PASSES = 18.0  # the same: 1.17 ms
DISPATCH_FORWARD_PASSES = 12.0  # over the tokens sent to experts: index select, sort, and back by atomic adds (same profile)
DISPATCH_BACKWARD_PASSES = 18.0
OPTIMIZER_BYTES = 50  # a parameter and step: Adam 28, bf16 copy 6, clipping 8, norm 4, zeroing 4; 28 ms for 1.45e9 (same profile: 33)
RETRACTION_BYTES = 18  # a parameter and step of nGPT: masters read for the norms, read and written, bf16 copy written

# Kernel launches (forward, backward) of one layer besides the products of single experts, with the host work between them.
# gpt_hybrid_1p5b: 2,050 a micro-batch without gradient sums and optimizer; nGPT's kernels are counted from its modules.
LAUNCHES = {
    "gpt": {"*": (10, 24), "-": (5, 14), "E": (75, 100), "M": (20, 45)},
    "ngpt": {"*": (14, 32), "-": (8, 20), "E": (82, 110), "M": (23, 52)},
}
STAGE_LAUNCHES = 60  # embedding, logits and loss of a micro-batch, both ways
OPTIMIZER_LAUNCHES_PER_TENSOR = 1.3  # gpt_hybrid_1p5b: about 1,500 for 1,137 tensors

# Memory, in bytes.
WORKSPACE = 0.15 * 2**30  # cuBLAS, cuDNN and Transformer Engine's: 38.96 GiB measured, 38.82 derived (gpt_1p2b_dense_bf16)
RESERVED = 3 * 2**30  # beside torch's allocations, for --fit: CUDA context, NCCL buffers, fragmentation; assumed, not measured
ROUTING_BYTES = 1700  # a token and expert layer of 64 experts: scores, maps and the sorted indices, scaled with their number
