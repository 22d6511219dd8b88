"""Gradients of the output layer's weight are not rounded between micro-batches."""


def test_upstream_still_asks_apex(upstream_source):
    backward = upstream_source("core/tensor_parallel/layers.py", "LinearWithGradAccumulationAndAsyncCommunication.backward")
    assert "fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(\n" in backward
    assert "grad_output.t().matmul(total_input)" in backward  # without it


def test_micro_batches_are_added_in_fp32(run_installed):
    run_installed("""
        import torch
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import ColumnParallelLinear
        from megatron.core.transformer.transformer_config import TransformerConfig

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, perform_initialization=False)
        config.params_dtype = torch.bfloat16
        torch.manual_seed(1)
        layer = ColumnParallelLinear(
            8, 16, config=config, init_method=None, bias=False, tp_group=parallel_state.get_tensor_model_parallel_group()
        )
        torch.nn.init.normal_(layer.weight)
        layer.gradient_accumulation_fusion = True
        layer.weight.main_grad, layer.weight.grad_added_to_main_grad = torch.zeros(16, 8), False
        truth = torch.zeros(16, 8, dtype=torch.float64)
        for _ in range(3):
            x, grad = torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 2, 16).bfloat16()
            layer(x)[0].backward(grad)
            truth += grad.flatten(0, 1).double().t() @ x.flatten(0, 1).double()
        assert layer.weight.grad_added_to_main_grad
        error = (layer.weight.main_grad - truth).abs().max() / truth.abs().max()
        assert error < 30 * 2**-24, error  # 30 terms; a rounding to bf16 alone is 2**-9
    """)
