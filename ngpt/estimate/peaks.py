"""Peak matrix-product rates of GPUs, the denominator of MFU."""

# Dense FLOP/s of one GPU (no structured sparsity), by the dtype of the operands; fp32 is without TF32, as the
# local backend multiplies; Transformer Engine multiplies fp32 matrices in TF32.
# Source: NVIDIA's datasheets (A100 SXM, H100 SXM, H200 SXM, HGX B200 and B300, GB200 and GB300 NVL72 divided by 72);
# Hopper's 989.4 is the unrounded figure of its architecture whitepaper.
PEAK_FLOPS: dict[str, dict[str, float]] = {
    "a100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "h100": {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "h200": {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "b200": {"bf16": 2250e12, "fp32": 75e12},
    "b300": {"bf16": 2250e12, "fp32": 75e12},
    "gb200": {"bf16": 2500e12, "fp32": 80e12},
    "gb300": {"bf16": 2500e12, "fp32": 80e12},
}


def gpu_of_device(device_name: str) -> str | None:
    """The table's name of a device as CUDA names it ("NVIDIA H100 80GB HBM3" is h100), or None where no peak is known.

    The PCIe and NVL boards run slower than the SXM modules of the table and are left unknown.
    """
    name = device_name.lower()
    if "pcie" in name or "nvl" in name.split():
        return None
    # The longest first: "GB200" also contains "B200".
    return next((gpu for gpu in sorted(PEAK_FLOPS, key=len, reverse=True) if gpu in name), None)


def peak_flops(gpu: str | None, dtype: str) -> float | None:
    """Peak FLOP/s of one GPU for operands of `dtype` ("bf16", "fp32"); None where unknown, as on a CPU."""
    return PEAK_FLOPS.get(gpu or "", {}).get(dtype)
