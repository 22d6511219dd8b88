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


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
EVEN_FIRST = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # of two codes equally near the even one is taken
SIGNS = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]


def quantised_plainly(matrix: torch.Tensor, height: int) -> dict[str, np.ndarray]:
    """codes (one an element), scale, amax and deq of fp32 [R, C] in blocks of height x 16, rounded to nearest."""
    rows, columns = matrix.shape
    amax = matrix.abs().max().view(1)
    encode = torch.full((1,), 2688.0) / amax
    block_amax = matrix.abs().view(rows // height, height, columns // 16, 16).amax(dim=(1, 3)).repeat_interleave(height, dim=0)
    scale = (block_amax * (encode * torch.tensor(1 / 6))).clamp(max=448).to(torch.float8_e4m3fn)
    scaled = matrix * (torch.ones(()) / (scale.float() * (torch.ones(()) / encode))).repeat_interleave(16, dim=1)
    distance = np.abs(scaled.abs().double().numpy()[..., None] - E2M1[EVEN_FIRST])
    codes = EVEN_FIRST[distance.argmin(axis=-1)].astype(np.uint8)
    values = torch.from_numpy(E2M1[codes]).float() * matrix.sign()
    deq = values * (scale.float() * amax * torch.tensor(1 / 2688)).repeat_interleave(16, dim=1)
    codes |= (matrix < 0).numpy().astype(np.uint8) << 3
    return {"codes": codes, "scale": scale.view(torch.uint8).numpy(), "amax": amax.numpy(), "deq": deq.numpy()}


@pytest.fixture
def fp32_with_rht() -> tuple[dict[str, np.ndarray], dict]:
    """A case of float32 input that stays in fp32 through the transform, by plain torch and numpy."""
    generator = torch.Generator().manual_seed(3)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 16:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    transform = torch.tensor(SIGNS).float().diag() @ hadamard / 4
    arrays, operands = {}, {}
    for role, shape in {"x": (64, 96), "w": (32, 96), "dy": (64, 32)}.items():
        source = torch.randn(shape, generator=generator)
        stored = {"row": source, "col": source.t().contiguous()}
        if role != "w":
            stored["col"] = (stored["col"].view(-1, 16) @ transform).view(stored["col"].shape)
            arrays[f"{role}.col_in"] = stored["col"].numpy()
        arrays[f"{role}.in"] = source.numpy()
        for side, matrix in stored.items():
            fields = quantised_plainly(matrix, height=16 if role == "w" else 1)
            operands[f"{role}.{side}"] = torch.from_numpy(fields["deq"]).double()
            fields["codes"] = fields["codes"][:, ::2] | fields["codes"][:, 1::2] << 4
            arrays |= {f"{role}.{side}_{name}": array for name, array in fields.items()}
    for name, (a, b) in GEMMS.items():
        product = operands[a] @ operands[b].t()
        arrays[f"{name}.f32"] = product.float().numpy()
        arrays[f"{name}.bf16"] = product.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return {f"case/{name}": array for name, array in arrays.items()}, {"case": {"MKN": [64, 96, 32], "dtype": "float32"}}


def checked_file(path: Path, arrays: dict[str, np.ndarray], metas: dict) -> int:
    np.savez(path, __meta__=np.frombuffer(json.dumps(metas).encode(), np.uint8), **arrays)
    return main([str(path)])


def test_float32_input_with_the_transform_is_accepted_by_name(tmp_path, fp32_with_rht, capsys):
    assert checked_file(tmp_path / "fp32.npz", *fp32_with_rht) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "2/2 RHT inputs within bound",
        "2 accepted: float32 input with RHT, which Transformer Engine refuses: case/x.col_in, case/dy.col_in",
        "6/6 quantised tensors bit-identical, 3/3 GEMMs within bound",
    ]


def rounded_to_bf16(array: np.ndarray) -> np.ndarray:
    return torch.from_numpy(array).bfloat16().float().numpy()


def one_element_moved(array: np.ndarray) -> np.ndarray:
    """By four units in the last place of the largest element: less than bf16 can show."""
    moved = array.copy()
    moved.flat[np.abs(moved).argmax()] *= 1 + 2.0**-18
    return moved


def one_bit_flipped(array: np.ndarray) -> np.ndarray:
    flipped = array.copy()
    flipped.flat[-1] ^= 1
    return flipped


DAMAGE = {
    "x.col_codes": one_bit_flipped,
    "dy.col_codes": one_bit_flipped,
    "x.col_scale": one_bit_flipped,
    "dy.col_in": rounded_to_bf16,
    "x.col_in": one_element_moved,
    "wgrad.f32": np.negative,
}


@pytest.mark.parametrize("array", DAMAGE)
def test_damage_to_float32_input_with_the_transform_is_noticed(array, tmp_path, fp32_with_rht, capsys):
    arrays, metas = fp32_with_rht
    arrays[f"case/{array}"] = DAMAGE[array](arrays[f"case/{array}"])
    assert checked_file(tmp_path / "damaged.npz", arrays, metas) == 1
    assert f"case/{array.split('_')[0].split('.f32')[0]}" in capsys.readouterr().err


def test_an_element_of_the_transform_that_is_wrong_in_fp32_alone_is_named(tmp_path, fp32_with_rht, capsys):
    """The codes do not see it."""
    arrays, metas = fp32_with_rht
    smallest = np.abs(arrays["case/x.col_in"]).argmin()
    arrays["case/x.col_in"].flat[smallest] += 1e-4
    assert checked_file(tmp_path / "moved.npz", arrays, metas) == 1
    assert capsys.readouterr().err == "case/x.col_in: 1 elements are not the transform in fp32\n"
