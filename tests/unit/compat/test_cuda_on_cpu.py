"""What asks for CUDA gets the CPU, in the forward and in the backward pass, and nothing changes where CUDA is present."""

import json

import pytest
import torch

from megatron_ext.compat import cuda_on_cpu

# One process for all checks of the installed module: it changes torch for good.
_OBSERVE = """
    import json
    from megatron_ext.compat import cuda_on_cpu
    seen = {"installed": [cuda_on_cpu.install(), cuda_on_cpu.install()]}
    import torch

    x = torch.ones(4)
    seen["devices"] = {
        "name": str(torch.zeros(2, device="cuda").device),
        "index": str(torch.zeros(2, device=torch.cuda.current_device()).device),
        "device": str(torch.tensor([1.0], device=torch.device("cuda", 0)).device),
        "like": str(torch.empty_like(x, device="cuda:0").device),
        "cuda()": str(x.cuda().device),
        "to": str(x.to("cuda").device),
        "to index": str(x.to(0).device),
        "to keyword": str(x.to(device="cuda", dtype=torch.float64).device),
        "module": str(torch.nn.Linear(2, 2).cuda().weight.device),
        "pinned": str(torch.zeros(2, pin_memory=True).pin_memory().device),
    }
    seen["untouched"] = [str(x.to(torch.float64).dtype), str(torch.zeros(2, device="meta").device)]
    seen["types"] = [x.type(), x.bfloat16().type(), x.half().type(), str(x.type("torch.cuda.HalfTensor").dtype)]

    class AsksInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.setdefault("backward", []).append(str(torch.zeros(1, device="cuda").device))
            return gradient

    leaf = torch.ones(2, requires_grad=True)
    AsksInBackward.apply(leaf).sum().backward()
    torch.autograd.grad(AsksInBackward.apply(leaf).sum(), leaf)
    torch.autograd.backward(AsksInBackward.apply(leaf).sum())

    state = torch.cuda.get_rng_state()
    drawn = torch.rand(8, device="cuda")
    torch.cuda.set_rng_state(state)
    seen["rng restored"] = torch.equal(torch.rand(8), drawn)
    torch.cuda.manual_seed(7)
    drawn = torch.rand(8)
    torch.manual_seed(7)
    seen["rng seeded"] = torch.equal(torch.rand(8), drawn)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    received, sizes = torch.zeros(4), torch.tensor([4])
    torch.distributed.all_to_all_single(received, x, output_split_sizes=sizes, input_split_sizes=sizes)
    seen["all_to_all"] = received.tolist()

    stream, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream), torch.cuda.device(0):
        start.record()
        torch.cuda.current_stream().wait_stream(stream)
        x.record_stream(stream)
        end.record()
    torch.cuda.synchronize()
    seen["elapsed"] = start.elapsed_time(end)

    before = torch.cuda.memory_allocated()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    stats = torch.cuda.memory_stats()
    seen["grown"] = torch.cuda.memory_allocated() - before
    seen["peak above current"] = torch.cuda.max_memory_allocated() >= stats["allocated_bytes.all.current"] > before
    del held
    seen["peak kept"] = torch.cuda.max_memory_allocated() >= stats["allocated_bytes.all.current"]
    seen["unknown figure"] = stats["allocation.all.current"]

    def function():
        return 1

    seen["compiled"] = [torch.compile(function) is function, torch.compile(dynamic=True)(function) is function]
    seen["device"] = [torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.cuda.device_count()]
    print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(run_script):
    return json.loads(run_script(_OBSERVE).splitlines()[-1])


def test_upstream_still_refuses_a_machine_without_cuda(upstream_source):
    assert 'assert torch.cuda.is_available(), "Megatron requires CUDA."' in upstream_source("training/initialize.py", "initialize_megatron")


@pytest.mark.parametrize(
    "file, name",
    [
        ("core/optimizer/distrib_optimizer.py", "DistributedOptimizer._build_model_and_main_param_groups"),
        ("core/optimizer/optimizer.py", "Float16OptimizerWithFloat16Params.__init__"),
        ("core/optimizer/clip_grads.py", "clip_grad_by_total_norm_fp32"),
    ],
)
def test_upstream_still_tells_parameters_by_cuda_type_names(upstream_source, file, name):
    assert "torch.cuda.FloatTensor" in upstream_source(file, name)


def test_upstream_still_leaves_cpu_split_sizes_as_tensors(upstream_source):
    assert "if torch.is_tensor(tensor) and tensor.is_cuda:" in upstream_source(
        "core/transformer/moe/moe_utils.py", "maybe_move_tensor_to_cpu"
    )


@pytest.mark.parametrize("stand_ins", [cuda_on_cpu._device_stand_ins, cuda_on_cpu._memory_stand_ins, cuda_on_cpu._rng_stand_ins])
def test_torch_still_has_every_attribute_that_is_replaced(stand_ins):
    assert [name for name in stand_ins() if not hasattr(torch.cuda, name)] == []


def test_megatron_does_not_take_transformer_engine_where_its_device_is_missing(run_script):
    run_script("""
        import sys
        from pathlib import Path

        Path("transformer_engine").mkdir()
        Path("transformer_engine/__init__.py").write_text("raise RuntimeError('no CUDA-capable device is detected')")
        sys.path.insert(0, str(Path.cwd()))
        from megatron_ext.compat import cuda_on_cpu

        cuda_on_cpu.install()
        from megatron.core.optimizer import clip_grads, optimizer

        assert clip_grads.multi_tensor_applier.__name__ == optimizer.multi_tensor_applier.__name__ == "local_multi_tensor_applier"
    """)


def test_nothing_changes_where_cuda_is_present(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_on_cpu, "_installed", False)
    before = dict(vars(torch.cuda))
    assert cuda_on_cpu.install() is False
    assert dict(vars(torch.cuda)) == before


def test_a_second_installation_changes_nothing(seen):
    assert seen["installed"] == [True, True]


def test_every_way_to_ask_for_cuda_gives_the_cpu(seen):
    assert {way: device for way, device in seen["devices"].items() if device != "cpu"} == {}


def test_other_requests_pass_unchanged(seen):
    assert seen["untouched"] == ["torch.float64", "meta"]


def test_tensors_answer_with_cuda_type_names(seen):
    assert seen["types"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.cuda.HalfTensor", "torch.float16"]


def test_code_run_by_the_autograd_engine_gets_the_cpu_too(seen):
    assert seen["backward"] == ["cpu"] * 3


def test_cuda_random_state_is_the_one_that_is_drawn_from(seen):
    assert seen["rng restored"] and seen["rng seeded"]


def test_all_to_all_takes_split_sizes_from_a_tensor(seen):
    assert seen["all_to_all"] == [1.0] * 4


def test_memory_figures_follow_the_process(seen):
    assert seen["grown"] > 32 << 20
    assert seen["peak above current"] and seen["peak kept"]
    assert seen["unknown figure"] == 0


def test_streams_and_events_do_not_wait(seen):
    assert seen["elapsed"] >= 0


def test_nothing_is_compiled(seen):
    assert seen["compiled"] == [True, True]


def test_the_device_is_named_cpu_and_offers_no_capability(seen):
    assert seen["device"] == ["cpu", [0, 0], 1]
