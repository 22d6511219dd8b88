"""Every constant of the estimates that was measured rather than derived, each with its measurement. Recalibrate here.

They come from H100 80GB HBM3 cards where nothing else is said (torch 2.11, Transformer Engine 2.20.2, megatron-core 0.19.2, BF16, sequence
8192, vocabulary 131,072); other GPUs are assumed to reach the same fractions of their peaks. `tests/bench/estimate_vs_measured.py` compares
estimates with runs. `tests/bench/results/step_h200_2026-11-29.md` has the newest runs, which the tests hold the estimate to.
"""

# Rates, as fractions of the peaks in `hardware.GPUS`.
COPY_FRACTION = 0.885  # of HBM: 2964 GB/s of 3350 in a device-to-device copy
KERNEL_FRACTION = 0.85  # of copy: element-wise and row-wise kernels (the residual step's and norms' target)
GEMM_FRACTION = 0.69  # of the dtype's rate: 685 TFLOP/s in a BF16 product of 8192^3
LOW_PRECISION_GEMM_FRACTION = 0.6  # the same for FP8 and NVFP4: assumed, not measured
ATTENTION_FORWARD_FRACTION = 0.57  # of the BF16 rate, causal: 12 heads of 128, 0.365 ms (gpt_hybrid_1p5b, profile of 2026-11-22)
ATTENTION_BACKWARD_FRACTION = 0.42  # counting twice the forward's FLOPs: 1.00 ms in the same profile
# Of NVLink's and the network's rates in collectives. Two H200s, without multicast, reached 0.5 in gathers and scatters of 67 and 134 MB and
# 0.63 in all-to-alls (tests/bench/results/overlap_h200x2_2026-11-29.txt); more GPUs and networks were not measured.
LINK_FRACTION = 0.55

# Time, in seconds.
GEMM_RAMP_S = 3e-6  # start and tail of a product: 768 x 1024 x 1024 in 6 us (experts of gpt_hybrid_1p5b, same profile)
COLLECTIVE_LATENCY_S = 20e-6  # assumed, not measured

# Passes over memory, in units of the named tensor's bytes at KERNEL_FRACTION of copy.
SCAN_FORWARD_PASSES = 4.6  # over in_proj's output and the chunk states: 0.30 ms a layer (ngpt_hybrid_1p5b, tuned tilings)
SCAN_BACKWARD_PASSES = 15.0  # the same: 0.97 ms
DISPATCH_FORWARD_PASSES = 12.0  # over the tokens sent to experts: index select, sort, and back by atomic adds (same profile)
DISPATCH_BACKWARD_PASSES = 18.0
OPTIMIZER_BYTES = 50  # a parameter and step: Adam 28, bf16 copy 6, clipping 8, norm 4, zeroing 4; 28 ms for 1.45e9 (same profile: 33)
RETRACTION_BYTES = 8  # a parameter and step of nGPT: masters read and written (2.7 ms for 1.25e9 on an H200)

# Host seconds to run a layer of one micro-batch (forward, backward), whatever its sizes: Python, autograd, launches. They are medians of
# layers in torch.profiler traces (`tests/bench/profile_table.py`; 1.2B dense for * and -, 1.5B hybrids for E and M), times 0.7. With this
# factor, steps of the hybrids, which wait for the host, come out as measured without the profiler. The control's E is fitted to 160 ms of a
# micro-batch of gpt_hybrid_1p5b_bf16, nGPT's * and - to 148 ms of ngpt_1p2b_dense_bf16, on H200s. Hosts with the same GPU differ by 30 %.
HOST_S = {
    "gpt": {"*": (2.5e-3, 1.0e-3), "-": (1.6e-3, 1.2e-3), "E": (5.3e-3, 5.2e-3), "M": (3.1e-3, 4.9e-3)},
    "ngpt": {"*": (2.0e-3, 1.85e-3), "-": (1.5e-3, 1.75e-3), "E": (4.6e-3, 6.0e-3), "M": (2.5e-3, 5.7e-3)},
}
EMULATED_LINEAR_S = 0.07e-3  # emulated NVFP4, both ways: ngpt_1p2b_dense_nvfp4 and in BF16 on an H200, 139 and 133 ms, 80 linears
# An expert that runs by itself, both ways: linears, activation, suv, norm. It is 6 ms less what emulation takes: ngpt_hybrid_1p5b_nvfp4,
# 12.4 s a step of 4 times 512 experts, before row kernels were launched cheaply. It was not measured without emulation.
SEQUENTIAL_EXPERT_S = 4e-3
# One expert's linear, where experts run together natively, both ways: 3.11 and 6.48 ms for 64 experts in FP8 on an H200, weights kept
# (tests/bench/results/native_experts_h200_2026-11-29.json). Elapsed time of back-to-back calls: 126 us. Quantising the weights is not
# included: it happens once a step. MXFP8 and NVFP4 were not measured.
NATIVE_EXPERT_LINEAR_S = 150e-6
STAGE_HOST_S = 5e-3  # embedding, logits and loss of a micro-batch, both ways: gpt_1p2b_dense_bf16 on an H200, 131 ms a micro-batch, a fit
OPTIMIZER_TENSOR_S = 57e-6  # a parameter tensor and step (the same traces)

# Measured over estimated time of a step: the lowest and the highest of eleven runs on H200s (the last column of the first table of
# tests/bench/results/step_h200_2026-11-29.md). The models have 1.2B and 1.5B parameters, nGPT and control, BF16 and emulated NVFP4.
STEP_BAND = (0.89, 1.04)

# Memory, in bytes.
WORKSPACE = 0.15 * 2**30  # cuBLAS, cuDNN and Transformer Engine's: 38.96 GiB measured, 38.82 derived (gpt_1p2b_dense_bf16)
RESERVED = 3 * 2**30  # beside torch's allocations, for --fit: CUDA context, NCCL buffers, fragmentation; assumed, not measured
ROUTING_BYTES = 1700  # a token and expert layer of 64 experts: scores, maps and the sorted indices, scaled with their number
