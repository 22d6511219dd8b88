"""The warm-up of compiled functions takes nothing from the generator that weights are drawn from."""


def test_upstream_still_draws_before_the_model_is_built(upstream_source):
    assert "torch.rand(" in upstream_source("training/initialize.py", "_warmup_jit_function")


def test_the_default_generator_is_left_alone(run_installed):
    run_installed("""
        import torch
        from megatron.training import initialize
        from megatron_ext.compat import jit_warmup

        drawn = []
        initialize._warmup_jit_function = lambda: drawn.append(torch.rand(8))
        assert jit_warmup.install() and jit_warmup.install()
        before = torch.get_rng_state()
        initialize._warmup_jit_function()
        assert len(drawn) == 1 and torch.equal(torch.get_rng_state(), before)
    """)
