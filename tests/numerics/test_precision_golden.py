"""The reference quantiser, GEMM and stochastic rounding equal the golden vectors, and the checker notices every kind of damage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ngpt.precision import qgemm
from ngpt.precision.check_golden import GEMMS, Arrays, case_spec, check_cases, check_file, gemm_within_bound, main
from ngpt.precision.quantize import quantize_stored

GOLDEN = Path(__file__).parent / "golden"
CASES = GOLDEN / "nvfp4_golden_shared.npz"
STOCHASTIC = GOLDEN / "nvfp4_golden_sr.npz"


@pytest.fixture(scope="module")
def cases() -> tuple[dict[str, np.ndarray], dict]:
    with np.load(CASES) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(arrays.pop("__meta__").tobytes())


@pytest.fixture
def one_case(cases):
    """The default recipe's case alone, free to be damaged."""
    arrays, metas = cases
    return {name: array.copy() for name, array in arrays.items() if name.startswith("default_recipe/")}, {
        "default_recipe": metas["default_recipe"]
    }


def test_every_case_is_checked_and_agrees():
    outcome, summary = check_file(CASES)
    assert outcome.failures == []
    assert outcome.checked == {"tensor": 20 * 6, "rht": 12, "gemm": 19 * 3}
    assert summary.splitlines()[-1] == "120/120 quantised tensors bit-identical, 57/57 GEMMs within bound"


def test_every_stochastic_vector_is_checked_and_agrees():
    outcome, summary = check_file(STOCHASTIC)
    assert outcome.failures == []
    assert summary == "48704/48704 stochastic rounding vectors bit-identical"


def test_kernel_formula_stays_within_the_bound_of_the_division_formula(cases):
    """The factor of Blackwell's kernel and the reference's division differ by one fp32 rounding at most."""
    arrays, metas = cases
    golden = Arrays(arrays, "cpu")
    compared = 0
    for case, meta in metas.items():
        for name, operands in {} if meta.get("quant_only") else GEMMS.items():
            a, b = (quantize_golden_operand(golden, case, meta, operand) for operand in operands)
            for suffix, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
                expected = golden.get(f"{case}/{name}.{suffix}", bf16=True)
                assert gemm_within_bound(qgemm(a, b, dtype, "kernel"), expected, a, b), f"{case}/{name}.{suffix}"
                compared += 1
    assert compared == 2 * 57


def quantize_golden_operand(golden: Arrays, case: str, meta: dict, operand: str):
    role, side = operand.split(".")
    spec = case_spec(meta, role)
    matrix = golden.get(f"{case}/{role}.in", bf16=True)
    if side == "col":
        matrix = golden.get(f"{case}/{role}.col_in", bf16=True) if spec.rht != "off" else matrix.t().contiguous()
    return quantize_stored(matrix, spec, "rowwise" if side == "row" else "columnwise")


@pytest.mark.parametrize("array", ["x.row_codes", "w.col_scale", "dy.row_amax", "x.col_deq", "dy.col_in", "fprop.f32", "wgrad.bf16"])
def test_one_damaged_array_is_noticed(one_case, array):
    arrays, metas = one_case
    damaged = arrays[f"default_recipe/{array}"].reshape(-1).view(np.uint8)
    damaged[: max(4, damaged.size // 16)] ^= 0x21
    outcome = check_cases(arrays, metas, "cpu")
    assert any(failure.startswith(f"default_recipe/{array.split('.')[0]}") for failure in outcome.failures)


@pytest.mark.parametrize("array", ["x.in", "w.row_codes", "w.row_scale", "x.row_amax", "x.col_deq", "dy.col_in", "dgrad.f32", "dgrad.bf16"])
def test_a_missing_array_is_noticed(one_case, array):
    arrays, metas = one_case
    del arrays[f"default_recipe/{array}"]
    assert any("missing" in failure for failure in check_cases(arrays, metas, "cpu").failures)


def test_an_array_outside_the_format_is_noticed(one_case):
    arrays, metas = one_case
    arrays["other_case/x.in"] = arrays["default_recipe/x.in"]
    assert check_cases(arrays, metas, "cpu").failures == ["other_case/x.in: array is not part of the format, not checked"]


def test_no_case_at_all_is_not_a_success():
    assert not check_cases({}, {}, "cpu").ok


def test_exit_code_tells(tmp_path, one_case, capsys):
    arrays, metas = one_case
    meta = np.frombuffer(json.dumps(metas).encode(), np.uint8)
    good, bad, unknown, no_archive = (tmp_path / f"{name}.npz" for name in ("good", "bad", "unknown", "no_archive"))
    np.savez(good, __meta__=meta, **arrays)
    arrays["default_recipe/x.row_scale"][0, 0] ^= 1
    np.savez(bad, __meta__=meta, **arrays)
    np.savez(unknown, something=np.zeros(3))
    no_archive.write_text("text")
    assert main([str(good)]) == 0
    assert capsys.readouterr().out.endswith("6/6 quantised tensors bit-identical, 3/3 GEMMs within bound\n")
    assert main([str(bad)]) == 1
    shown = capsys.readouterr()
    assert "5/6 quantised tensors" in shown.out
    assert "default_recipe/x.row: scales differ" in shown.err
    for path in (unknown, no_archive, tmp_path / "absent.npz"):
        assert main([str(path)]) == 1
        assert str(path) in capsys.readouterr().err


def test_a_damaged_stochastic_vector_is_noticed(tmp_path, capsys):
    with np.load(STOCHASTIC) as file:
        arrays = dict(file)
    arrays["code"][100] ^= 1
    np.savez(tmp_path / "sr.npz", **arrays)
    assert main([str(tmp_path / "sr.npz")]) == 1
    shown = capsys.readouterr()
    assert "48703/48704" in shown.out
    assert "vector 100" in shown.err
