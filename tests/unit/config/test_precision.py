"""Low-precision formats in the config: which layers they take, and the refusal of what could not run or would not be read."""

import pytest

from ngpt.config import ConfigError, compose, dump, load, to_yaml
from ngpt.config.linears import block_linears, describe_precision, recipe_by_linear
from ngpt.estimate.counts import count_parameters
from tests.unit.config.refusals import Bad, check

TWO = "cluster.gpus_per_node=2"
PAPER, NVIDIA, STATIC = "precision=nvfp4_paper", "precision=nvfp4_nvidia", "precision=nvfp4_static"
PROJ, FC1, FC2 = "layers.*.self_attention.linear_proj", "layers.*.mlp.linear_fc1", "layers.*.mlp.linear_fc2"
LOCAL = "model.transformer_impl=local"
NOT_FINE = "model.fine_grained=false"
GPT = ["model=gpt_tiny", PAPER]
# The tiny model has D 64, F 160, 4 heads of 16 in 2 groups, 2 layers, and trains on 2 sequences of 32 tokens.
BAD = {
    "format": Bad(["precision.format=fp4"], "precision.format", "fp4", "nvfp4", ["precision.format=nvfp4"]),
    "executor": Bad([PAPER, "precision.executor=triton"], "precision.executor", "triton", "emulated", ["precision.executor=emulated"]),
    "input_amax": Bad(
        [PAPER, "precision.input_amax=delayed"], "precision.input_amax", "delayed", "static", ["precision.input_amax=static"]
    ),
    "weight_blocks": Bad([PAPER, "precision.weight_blocks=32x32"], "precision.weight_blocks", "32x32", "1x16", []),
    "tail": Bad([PAPER, "precision.bf16_tail=1.0"], "precision.bf16_tail", "1.0", "below 1", ["precision.bf16_tail=0.5"]),
    "negative_layers": Bad(
        [PAPER, "precision.num_layers_at_start_in_bf16=-1"], "precision.num_layers_at_start_in_bf16", "-1", "not be negative", []
    ),
    "unread_rht": Bad(["precision.rht=true"], "precision.rht", "True", "nvfp4 only, not none", ["precision.rht=false"], "rht=false"),
    "unread_executor": Bad(["precision=fp8", "precision.executor=native"], "precision.executor", "native", "not fp8", [PAPER]),
    "unread_diagnostics": Bad(["precision=bf16", "precision.diagnostics=true"], "precision.diagnostics", "True", "nvfp4 only", [PAPER]),
    "unread_tail": Bad(
        ["precision=bf16", "precision.bf16_tail=0.1"], "precision.bf16_tail", "0.1", "fp8, mxfp8 or nvfp4", ["precision=fp8"]
    ),
    "unread_grad_amax": Bad(
        [PAPER, "precision.static_grad_amax=2.625"],
        "precision.static_grad_amax",
        "2.625",
        "=static only",
        ["precision.grad_output_amax=static"],
    ),
    "grad_amax": Bad(
        [STATIC, "precision.static_grad_amax=0.001"],
        "precision.static_grad_amax",
        "0.001",
        "1.3125 * 2^j",
        [f"precision.static_grad_amax={1.3125 / 1024}"],
        str(1.3125 / 1024),
    ),
    "grad_amax_negative": Bad(
        [STATIC, "precision.static_grad_amax=-1.3125"], "precision.static_grad_amax", "-1.3125", "1.3125 * 2^j", [], "=1.3125"
    ),
    "grad_amax_not_a_number": Bad([STATIC, "precision.static_grad_amax=nan"], "precision.static_grad_amax", "nan", "2^j", [], "=1.3125"),
    "too_many_layers": Bad(
        [PAPER, "precision.num_layers_at_start_in_bf16=2", "precision.num_layers_at_end_in_bf16=1"],
        "precision.num_layers_at_end_in_bf16",
        "1",
        "exceeds model.num_layers 2",
        ["precision.num_layers_at_start_in_bf16=1", "precision.num_layers_at_end_in_bf16=0"],
    ),
    "nothing_left": Bad([PAPER, "precision.bf16_modules=['*']"], "precision.format", "nvfp4", "none of the 8", [], "precision=bf16"),
    "unmatched_glob": Bad(
        [PAPER, "precision.bf16_modules=['*.fc2']"],
        "precision.bf16_modules",
        "*.fc2",
        "no linear",
        [f"precision.bf16_modules=['{FC2}']"],
        FC2,
    ),
    "static_without_fine_grained": Bad(
        [PAPER, NOT_FINE], "precision.input_amax", "static", "input of layers.0.self_attention.linear_proj", ["model.fine_grained=true"]
    ),
    "static_without_fine_grained_measured": Bad(
        [PAPER, NOT_FINE], "precision.input_amax", "static", "normalised", ["precision.input_amax=dynamic_pow2"], "dynamic_pow2"
    ),
    "static_without_fine_grained_kept": Bad(
        [PAPER, NOT_FINE], "precision.input_amax", "static", "first of 4", [f"precision.bf16_modules=['{PROJ}','{FC2}']"], PROJ
    ),
    "static_input_of_the_control": Bad(
        GPT,
        "precision.input_amax",
        "static",
        "input of layers.0.self_attention.linear_qkv (the first of 8",
        ["precision.input_amax=dynamic_pow2", "precision.weight_amax=dynamic_pow2"],
    ),
    "static_weight_of_the_control": Bad(
        GPT, "precision.weight_amax", "static", "weight of layers.0.self_attention.linear_qkv", ["model.architecture=ngpt"]
    ),
    "rht_of_static_input": Bad([PAPER, "precision.rht=true"], "precision.input_amax", "static", "4 times", ["precision.rht=false"]),
    "rht_of_static_gradient": Bad(
        [NVIDIA, "precision.grad_output_amax=static"],
        "precision.grad_output_amax",
        "static",
        "4 times",
        ["precision.grad_output_amax=dynamic_pow2"],
    ),
    "fp8_without_te": Bad(["precision=fp8", LOCAL], "precision.format", "fp8", "Transformer Engine", ["model.transformer_impl=auto"]),
    "mxfp8_without_te": Bad(["precision=mxfp8", LOCAL], "precision.format", "mxfp8", "Transformer Engine", ["precision=bf16"]),
    "mxfp8_on_hopper": Bad(["precision=mxfp8", "cluster.gpu=h100"], "precision.format", "mxfp8", "h100", ["cluster.gpu=b200"]),
    "native_without_te": Bad(
        [PAPER, LOCAL, "precision.executor=native"], "precision.executor", "native", "local", ["precision.executor=emulated"]
    ),
    "native_on_hopper": Bad(
        [PAPER, "cluster.gpu=h200", "precision.executor=native"], "precision.executor", "native", "Blackwell", ["precision.executor=auto"]
    ),
    "native_rht_of_fp32": Bad(
        [NVIDIA, "precision.executor=native", "precision.dtype=fp32"],
        "precision.executor",
        "native",
        "reads bf16",
        ["precision.dtype=bf16"],
    ),
    "features_over_tensor": Bad(
        [PAPER, "parallel=tp2", TWO, "model.ffn_hidden_size=168"],
        "model.ffn_hidden_size",
        "168 / tensor parallel 2 = 84 features leave layers.1.mlp.linear_fc1",
        "NVFP4 needs a multiple of 16",
        ["model.ffn_hidden_size=192"],
        f'Set model.ffn_hidden_size=192, or add "{FC1}" and "{FC2}" to',
    ),
    "features_kept_in_bf16": Bad(
        [PAPER, "model.ffn_hidden_size=168", "model.activation=swiglu"],  # fc1 has 336 = 21 * 16
        "model.ffn_hidden_size",
        "168 features reach layers.1.mlp.linear_fc2",
        "multiple of 16",
        [f"precision.bf16_modules=['{FC2}']"],
        f'Set model.ffn_hidden_size=176, or add "{FC2}" to',
    ),
    "head_size": Bad(
        [PAPER, "model.head_dim=10"],
        "model.head_dim",
        "10 * 4 = 40 features reach layers.0.self_attention.linear_proj",
        "multiple of 16",
        ["model.head_dim=12"],
        "Set model.head_dim=12,",
    ),
    "hidden_size": Bad(
        [PAPER, "model.hidden_size=72"], "model.hidden_size", "72 features reach layers.0", "16", ["model.hidden_size=80"], "=80"
    ),
    "features_of_native": Bad(
        [PAPER, "precision.executor=native", "model.ffn_hidden_size=176"],
        "model.ffn_hidden_size",
        "176",
        "native executor) needs a multiple of 32",
        ["model.ffn_hidden_size=192"],
        "=192",
    ),
    "features_on_blackwell": Bad(
        [PAPER, "cluster.gpu=b200", "model.ffn_hidden_size=176"], "model.ffn_hidden_size", "176", "of 32", ["precision.executor=emulated"]
    ),
    "features_of_mxfp8": Bad(
        ["precision=mxfp8", "model.ffn_hidden_size=176"], "model.ffn_hidden_size", "176", "MXFP8 needs a multiple of 32", ["precision=fp8"]
    ),
    "tokens": Bad(
        [PAPER, "train.seq_length=36"], "train.seq_length", "= 72 tokens", "multiple of 16", ["train.seq_length=40"], "train.seq_length=40"
    ),
    "tokens_of_a_sequence_shard": Bad(
        [PAPER, "parallel=tp2", TWO, "train.micro_batch_size=1", "train.seq_length=48"],
        "train.seq_length",
        "48 * train.micro_batch_size 1 / parallel.tensor 2 (sequence parallel) = 24 tokens",
        "multiple of 16",
        ["train.seq_length=64"],
        "=64",
    ),
    "tokens_of_a_context_rank": Bad(
        [PAPER, "parallel=cp2", TWO, "train.micro_batch_size=1", "train.seq_length=40"],
        "train.seq_length",
        "/ parallel.context 2 = 20 tokens",
        "multiple of 16",
        ["train.seq_length=64"],
        "=64",
    ),
    "unread_table": Bad(
        ["precision=fp8", "precision.operands.input.amax=dynamic"], "precision.operands", "input", "nvfp4 only", ["precision.operands={}"]
    ),
    "row_of_the_table": Bad(
        [PAPER, "precision.operands.weights.amax=dynamic"], "precision.operands", "weights", "weight_columnwise", [], "weight"
    ),
    "option_of_the_table": Bad([PAPER, "precision.operands.weight.bits=4"], "precision.operands.weight.bits", "", "schema", []),
    "choice_of_the_table": Bad(
        [PAPER, "precision.operands.weight.blocks=32x32"],
        "precision.operands.weight.blocks",
        "32x32",
        "1x16",
        ["precision.operands.weight.blocks=1x16"],
    ),
    "bound_alone": Bad(
        [NVIDIA, "precision.operands.weight.bound=256"],
        "precision.operands.weight.bound",
        "256",
        "four_over_six only",
        ["precision.operands.weight.four_over_six=mae"],
        "four_over_six=mae",
    ),
    "static_amax_alone": Bad(
        [NVIDIA, "precision.operands.input.static_amax=2.625"],
        "precision.operands.input.static_amax",
        "2.625",
        "amax=static only",
        ["precision.operands.input.amax=static", "precision.rht=false"],
    ),
    "static_amax_of_the_table": Bad(
        [PAPER, "precision.operands.input_columnwise.static_amax=1.5"],
        "precision.operands.input_columnwise.static_amax",
        "1.5",
        "1.3125 * 2^j",
        ["precision.operands.input_columnwise.static_amax=1.3125"],
        "input_columnwise.static_amax=1.3125",
    ),
    "four_over_six_of_a_static_amax": Bad(
        [PAPER, "precision.operands.weight_rowwise.four_over_six=mae"],
        "precision.operands",
        "nvfp4_paper",
        "weight rowwise: four_over_six",
        ["precision.operands.weight_rowwise.amax=dynamic"],
    ),
    "transform_of_one_operand": Bad(
        [NVIDIA, "precision.operands.input.rht=none"], "precision.operands", "nvfp4_nvidia", "cancels", ["precision.rht=false"]
    ),
    "rowwise_transform": Bad(
        [NVIDIA, "precision.operands.input_rowwise.rht=signed"], "precision.operands", "nvfp4_nvidia", "rowwise", [], "input_columnwise"
    ),
    "stochastic_forward": Bad(
        [NVIDIA, "precision.operands.weight.rounding=stochastic"], "precision.operands", "nvfp4_nvidia", "forward pass", [], "columnwise"
    ),
    "static_row_of_the_control": Bad(
        ["model=gpt_tiny", NVIDIA, "precision.operands.weight_columnwise.amax=static"],
        "precision.operands.weight_columnwise.amax",
        "static",
        "weight of layers.0",
        ["precision.operands.weight_columnwise.amax=dynamic_pow2"],
        "precision.operands.weight_columnwise.amax=dynamic_pow2",
    ),
    "native_by_direction": Bad(
        [NVIDIA, "precision.executor=native", "precision.operands.weight_columnwise.blocks=1x16"],
        "precision.executor",
        "native",
        "directions that differ",
        ["precision.executor=emulated"],
    ),
    "unknown_recipe": Bad([PAPER, "precision.layers={*: nvfp5}"], "precision.layers", "nvfp5", "conf/precision", [], "nvfp4_nvidia"),
    "glob_of_no_layer": Bad(
        [PAPER, "precision.layers={*.fc2: bf16}"],
        "precision.layers",
        "*.fc2",
        "no linear",
        [f"precision.layers={{{FC2}: bf16}}"],
        FC2,
    ),
    "glob_that_decides_nothing": Bad(
        [PAPER, "precision.layers={*.linear_fc2: nvfp4_nvidia, *.mlp.*: bf16}"],
        "precision.layers",
        "*.linear_fc2",
        "*.mlp.*",
        ["precision.layers={*.mlp.*: bf16, *.linear_fc2: nvfp4_nvidia}"],
    ),
    "layers_that_are_no_names": Bad([PAPER, "precision.layers={*: [bf16]}"], "precision.layers", "bf16", "", []),
    "operands_of_another_section": Bad(
        [PAPER, "precision.operands={input: '${optim}'}"], "precision.operands", "OptimConfig", "OperandConfig", ["precision.operands={}"]
    ),
    "path_through_a_value": Bad([PAPER, "precision.layers.x.y=1"], "precision.layers", "", "", ["precision.layers={}"]),
    "run_option_of_a_named_recipe": Bad(
        [PAPER, "precision.layers={layers.0.*: nvfp4_nvidia}", "precision.recipes.nvfp4_nvidia.executor=native"],
        "precision.recipes.nvfp4_nvidia.executor",
        "native",
        "no option of a recipe",
        [],
    ),
    "unread_static_grad_amax": Bad(
        [STATIC, "precision.static_grad_amax=5.25", "precision.operands.grad_output.static_amax=2.625"],
        "precision.static_grad_amax",
        "5.25",
        "operands",
        ["precision.static_grad_amax=1.3125"],
    ),
    "named_dtype": Bad(
        [PAPER, "precision.layers={layers.0.*: fp32}"], "precision.layers", "fp32", "in bf16", ["precision.layers={layers.0.*: bf16}"]
    ),
    "named_format_on_hopper": Bad(
        [PAPER, "cluster.gpu=h100", "precision.layers={layers.0.*: mxfp8}"],
        "precision.recipes.mxfp8.format",
        "mxfp8",
        "h100",
        ["cluster.gpu=b200"],
    ),
    "named_static": Bad(
        ["model=gpt_tiny", NVIDIA, "precision.layers={layers.0.*: nvfp4_paper}"],
        "precision.recipes.nvfp4_paper.input_amax",
        "static",
        "input of layers.0.self_attention.linear_qkv (the first of 2",
        ["precision.recipes.nvfp4_paper.input_amax=dynamic_pow2", "precision.recipes.nvfp4_paper.operands.weight.amax=dynamic"],
        "precision.recipes.nvfp4_paper.input_amax=dynamic_pow2",
    ),
    "option_of_a_recipe_of_no_layer": Bad(
        [PAPER, "precision.recipes.nvfp4_nvidia.rht=false"],
        "precision.recipes.nvfp4_nvidia",
        "rht=false",
        "No linear layer",
        ["precision.layers={layers.0.*: nvfp4_nvidia}"],
    ),
    "features_of_a_named_recipe": Bad(
        [PAPER, "precision.layers={*.linear_fc2: mxfp8}", "model.ffn_hidden_size=176"],
        "model.ffn_hidden_size",
        "176 features reach layers.1.mlp.linear_fc2",
        "MXFP8 needs a multiple of 32",
        ["model.ffn_hidden_size=192"],
        "=192",
    ),
    "layers_leave_nothing": Bad(
        [PAPER, "precision.layers={*: bf16}"], "precision.format", "nvfp4", "none of the 8", ["precision=bf16"], "precision=bf16"
    ),
    "owned_by_the_recipe": Bad(["megatron.fp4=e2m1"], "megatron.fp4", "e2m1", "precision.format sets", []),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_precision_is_refused_with_path_value_rule_and_a_way_out_that_works(bad: Bad):
    check(bad)


def test_the_rules_let_through_what_can_run():
    for overrides in (
        ["precision=nvfp4_paper", "precision.dtype=fp32"],
        ["precision=nvfp4_paper", LOCAL],
        ["precision=nvfp4_paper", LOCAL, "cluster.gpu=b200", "model.ffn_hidden_size=176"],  # no Transformer Engine, so emulated
        ["precision=nvfp4_paper", "precision.input_amax=dynamic_pow2", NOT_FINE],  # nGPT's weights are normalised all the same
        ["precision=nvfp4_paper", "precision.input_amax=dynamic_pow2", "precision.rht=true"],  # the RHT never meets the static weight
        ["precision=nvfp4_static", "precision.static_grad_amax=0.02050781250"],
        ["precision=nvfp4_nvidia", "model=gpt_tiny", "precision.executor=native"],
        ["precision=nvfp4_nvidia", "model.ffn_hidden_size=100", f"precision.bf16_modules=['{FC1}','{FC2}']"],
        ["precision=bf16", "model.ffn_hidden_size=100", "train.seq_length=31"],
    ):
        compose(["experiment=ngpt_tiny", *overrides])


def test_the_linears_of_one_rank_have_the_shapes_and_names_that_are_built():
    tiny = ["experiment=ngpt_tiny", "model.activation=swiglu"]
    found = [(linear.name, linear.out_features, linear.in_features, linear.reads_stream) for linear in block_linears(compose(tiny))]
    layer_0, layer_1 = "layers.0.self_attention.linear_", "layers.1.mlp.linear_"
    assert found[:4] == [
        (f"{layer_0}qkv", 128, 64, True),
        (f"{layer_0}proj", 64, 64, False),
        (f"{layer_1}fc1", 320, 64, True),
        (f"{layer_1}fc2", 64, 160, False),
    ]
    split = block_linears(compose([*tiny, "parallel=tp2", TWO]))
    assert [(linear.out_features, linear.in_features) for linear in split[:4]] == [(64, 64), (64, 32), (160, 64), (64, 80)]


@pytest.mark.parametrize("model", ["ngpt_1p2b", "gpt_small"])
def test_the_linears_hold_every_matrix_of_the_blocks(model: str):
    cfg = compose(["experiment=quickstart", f"model={model}", "train.micro_batch_size=1"])
    head = -(-cfg.model.vocab_size // 128) * 128 * cfg.model.hidden_size
    assert sum(linear.in_features * linear.out_features for linear in block_linears(cfg)) == count_parameters(cfg.model).matmul - head


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        (["model.num_layers=4"], [2, 3, 4, 5]),  # a block is attention and MLP
        (["model.num_layers=4", "model.layer_pattern='*-|*-*-*-'", "parallel=pp2", TWO], [2, 3, 4, 5]),
        (["model.num_layers=3", "model.layer_pattern='**--'"], [1, 2]),  # and any other layer alone
        (["model.num_layers=3", "model.layer_pattern='*|-**-'", "parallel=pp2", TWO], [2]),  # a block may be cut
    ],
    ids=["pairs", "cut", "alone", "cut_inside"],
)
def test_blocks_kept_in_bf16_are_counted_as_num_layers_counts_them(overrides: list[str], layers: list[int]):
    kept = ["precision.num_layers_at_start_in_bf16=1", "precision.num_layers_at_end_in_bf16=1"]
    linears = recipe_by_linear(compose(["experiment=ngpt_tiny", PAPER, *overrides, *kept]))
    assert list(dict.fromkeys(int(name.split(".")[1]) for name in linears)) == layers


def test_layers_have_the_recipe_of_the_last_glob_that_matches_and_the_policy_comes_first():
    globs = "precision.layers={*.mlp.*: nvfp4_nvidia, *.linear_fc2: mxfp8, layers.3.*: bf16}"
    cfg = compose(["experiment=ngpt_tiny", "cluster.gpu=b200", PAPER, globs, "precision.bf16_modules=['layers.0.*.linear_qkv']"])
    assert {name: (recipe.name, recipe.format) for name, recipe in recipe_by_linear(cfg).items()} == {
        "layers.0.self_attention.linear_proj": ("nvfp4_paper", "nvfp4"),
        "layers.1.mlp.linear_fc1": ("nvfp4_nvidia", "nvfp4"),
        "layers.1.mlp.linear_fc2": ("mxfp8", "mxfp8"),
        "layers.2.self_attention.linear_qkv": ("nvfp4_paper", "nvfp4"),
        "layers.2.self_attention.linear_proj": ("nvfp4_paper", "nvfp4"),
    }


def test_a_run_without_a_format_can_quantise_some_layers():
    cfg = compose(["experiment=ngpt_tiny", "precision=fp32", "precision.layers={*.linear_fc1: nvfp4_paper}"])
    assert {name: (recipe.name, recipe.dtype) for name, recipe in recipe_by_linear(cfg).items()} == {
        f"layers.{layer}.mlp.linear_fc1": ("nvfp4_paper", "fp32") for layer in (1, 3)
    }


def test_a_resolved_config_holds_the_recipes_that_its_layers_name(tmp_path):
    (tmp_path / "conf/precision").mkdir(parents=True)
    mine = tmp_path / "conf/precision/mine.yaml"
    mine.write_text("defaults: [nvfp4_nvidia]\nname: mine\noperands:\n  weight_columnwise: {blocks: 1x16}\n")
    cfg = compose(["experiment=ngpt_tiny", PAPER, "precision.layers={*.linear_fc1: mine}"], [tmp_path / "conf"])
    dump(cfg, tmp_path / "config.yaml")
    mine.unlink()
    again = load(tmp_path / "config.yaml")
    assert again == cfg
    weight = recipe_by_linear(again)["layers.1.mlp.linear_fc1"].weight
    assert (weight.rowwise.block_shape, weight.columnwise.block_shape) == ((16, 16), (1, 16))


def test_what_a_command_line_says_of_a_mapping_replaces_what_an_experiment_says(tmp_path):
    (tmp_path / "experiment").mkdir()
    mixed = "precision: {layers: {'*.linear_fc1': bf16, '*.mlp.*': nvfp4_nvidia}, operands: {input: {amax: dynamic}}}"
    text = f"# @package _global_\ndefaults:\n  - ngpt_tiny\n  - override /precision: nvfp4_paper\n{mixed}\n"
    (tmp_path / "experiment/mixed.yaml").write_text(text.replace("'*.linear_fc1': bf16, ", ""))
    words = ["experiment=mixed"]
    assert {recipe.name for recipe in recipe_by_linear(compose(words, [tmp_path])).values()} == {"nvfp4_paper", "nvfp4_nvidia"}
    plain = compose([*words, "precision.layers={}", "precision.operands={}"], [tmp_path])
    assert recipe_by_linear(plain) == recipe_by_linear(compose(["experiment=ngpt_tiny", PAPER]))
    other = recipe_by_linear(compose([*words, "precision.layers={*.linear_fc1: nvfp4_static}"], [tmp_path]))
    static = [name for name, recipe in other.items() if recipe.name == "nvfp4_static"]
    assert static == ["layers.1.mlp.linear_fc1", "layers.3.mlp.linear_fc1"]
    assert "nvfp4_nvidia" not in {recipe.name for recipe in other.values()}


def test_an_interpolation_of_a_named_recipe_is_of_itself(tmp_path):
    (tmp_path / "precision").mkdir()
    recipe = "name: own\ndtype: bf16\nformat: nvfp4\nweight_amax: ${precision.input_amax}\n"
    (tmp_path / "precision/own.yaml").write_text(recipe)
    cfg = compose(["experiment=ngpt_tiny", PAPER, "precision.layers={*.linear_fc1: own}"], [tmp_path])
    assert recipe_by_linear(cfg)["layers.1.mlp.linear_fc1"].weight.global_amax == "dynamic"


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("defaults: [absent]\nname: own", ["absent"]),
        ("name: own\ndtype: bf16\nformat: nvfp4\noperands: {input: '${optim}'}", ["precision.recipes.own.operands", "OptimConfig"]),
        ("name: own\ndtype: bf16\nformat: nvfp4\noperands: '${model}'", ["operands"]),
        ("name: own\ndtype: bf16\nlayers: {'*': bf16}", ["precision.layers", "own", "layers of its own"]),
        ("name: own\ndtype: bf16\nformat: nvfp4\nweight_amax: ${precision.executor}", ["executor"]),
    ],
    ids=["parent", "section", "mapping", "nested", "run_option"],
)
def test_a_named_recipe_that_cannot_be_one_is_refused(tmp_path, recipe, names):
    (tmp_path / "precision").mkdir()
    (tmp_path / "precision/own.yaml").write_text(recipe + "\n")
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=ngpt_tiny", PAPER, "precision.layers={*.linear_fc1: own}"], [tmp_path])
    assert all(name in str(caught.value) for name in names), str(caught.value)


def test_a_config_of_before_the_table_is_read(tmp_path):
    lines = to_yaml(compose(["experiment=ngpt_tiny", NVIDIA])).splitlines()
    old = [line for line in lines if line.strip() not in ("operands: {}", "layers: {}", "recipes: {}")]
    assert len(lines) - len(old) == 3
    (tmp_path / "config.yaml").write_text("\n".join(old))
    assert load(tmp_path / "config.yaml") == compose(["experiment=ngpt_tiny", NVIDIA])


def test_globs_keep_linears_in_bf16():
    globs = "precision.bf16_modules=['layers.0.*','*.linear_fc2']"
    linears = recipe_by_linear(compose(["experiment=ngpt_tiny", PAPER, globs]))
    assert list(linears) == [
        "layers.1.mlp.linear_fc1",
        "layers.2.self_attention.linear_qkv",
        "layers.2.self_attention.linear_proj",
        "layers.3.mlp.linear_fc1",
    ]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "bf16: every layer in bf16"),
        (
            [PAPER, "precision.bf16_tail=0.1"],
            "nvfp4_paper: nvfp4 operands in 80 of 80 linear layers of the blocks, bf16 everywhere in the last 0.1 of the steps; "
            "input static amax 1.3125, 1x16, rtne; weight static amax 1.3125, 16x16, rtne; grad_output dynamic_pow2 amax, 1x16, sr",
        ),
        (
            [NVIDIA],
            "nvfp4_nvidia: nvfp4 operands in 68 of 80 linear layers of the blocks; input dynamic amax, 1x16, rtne, RHT columnwise; "
            "weight dynamic amax, 16x16, rtne; grad_output dynamic amax, 1x16, sr, RHT columnwise",
        ),
        (["precision=fp8"], "fp8: fp8 operands in 80 of 80 linear layers of the blocks"),
    ],
    ids=["bf16", "nvfp4_paper", "nvfp4_nvidia", "fp8"],
)
def test_one_line_says_how_much_is_quantised_and_how(overrides: list[str], line: str):
    assert "; ".join(describe_precision(compose(["experiment=ngpt_1p2b_dense_bf16", *overrides]))) == line
