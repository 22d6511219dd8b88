"""Every bad input is refused with path, value, rule and way out, and the way out works."""

from pathlib import Path

import pytest

from ngpt.config import ConfigError, ConfigErrors, compose, dump, load
from ngpt.config.checks import validate
from ngpt.config.megatron_keys import OWNED, REFUSED
from ngpt.config.translate import leaf_types
from tests.unit.config.refusals import Bad, check

TWO = "cluster.gpus_per_node=2"
TINY_PATTERN = "model.layer_pattern="
BAD = {
    "unknown_key": Bad(["train.step=3"], "train.step", "Unknown key", "Only keys", [], "train.steps"),
    "unknown_key_of_another_section": Bad(["model.lr=3"], "model.lr", "Unknown key", "Only keys", [], "optim.lr"),
    "unknown_key_added_with_plus": Bad(["+train.stepz=3"], "train.stepz", "Unknown key", "Only keys", [], "train.steps"),
    "unknown_section": Bad(["paralel.tensor=2"], "paralel", "Unknown key", "Only keys", [], "parallel"),
    "unknown_option": Bad(["precision=bf17"], "precision", "bf17", "No file precision/bf17.yaml", [], "bf16"),
    "experiment_mistyped": Bad(["experment=quickstart"], "experment", "Unknown key", "Only keys", [], "Did you mean experiment?"),
    "unknown_key_in_a_list": Bad(["data.train=[{path:x,wight:1}]"], "data.train.wight", "Unknown key", "", [], "weight"),
    "text_for_a_number": Bad(["train.steps=many"], "train.steps", "'many'", "a whole number", ["train.steps=8"]),
    "fraction_for_an_integer": Bad(["train.steps=1.5"], "train.steps", "1.5", "a whole number", ["train.steps=8"]),
    "null_for_a_number": Bad(["model.hidden_size=null"], "model.hidden_size", "None", "a whole number", ["model.hidden_size=64"]),
    "text_for_a_switch": Bad(["model.fine_grained=maybe"], "model.fine_grained", "'maybe'", "true or false", ["model.fine_grained=true"]),
    "text_for_a_source": Bad(["data.train=[x]"], "data.train[0]", "'x'", "{path, weight}", [], "path: data"),
    "value_for_a_section": Bad(["train=3"], "train", "3", "section", []),
    "value_for_an_inner_section": Bad(["logging.wandb=online"], "logging.wandb", "online", "section", [], "logging.wandb.KEY"),
    "interpolation_for_a_section": Bad(["run=${train.seed}"], "run", "${train.seed}", "section", []),
    "several_values": Bad(["train.steps=1,2"], "train.steps", "1,2", "a command starts one", ["train.steps=8"], "ngpt train -m"),
    "range_of_values": Bad(["train.seed=range(1,4)"], "train.seed", "range(1,4)", "a command starts one", ["train.seed=1"]),
    "values_of_a_list": Bad(["debug.profile_ranks=0,1"], "debug.profile_ranks", "0,1", "in brackets", ["debug.profile_ranks=[0,1]"]),
    "no_value": Bad(["train.steps"], "train.steps", "Cannot be read", "key=value", []),
    "interpolation_of_nothing": Bad(["train.seed=${nothing}"], "train.seed", "nothing", "existing key", []),
    "hydra_setting": Bad(["hydra.run.dir=x"], "hydra.run.dir", "x", "only composes", [], "run.dir"),
    "zero": Bad(["model.hidden_size=0"], "model.hidden_size", "0", "positive", ["model.hidden_size=64"]),
    "negative": Bad(["optim.weight_decay=-1"], "optim.weight_decay", "-1", "not be negative", ["optim.weight_decay=0"]),
    "not_a_number": Bad(["optim.lr=nan"], "optim.lr", "nan", "positive", ["optim.lr=0.1"]),
    "infinite": Bad(["optim.lr=inf"], "optim.lr", "inf", "finite", ["optim.lr=0.1"]),
    "rate_beyond_the_weights": Bad(["optim.lr=1e38"], "optim.lr", "1e+38", "keeps nothing of a weight of 1", ["optim.lr=1.6e7"]),
    "rate_of_zero": Bad(["optim.lr=1e-50"], "optim.lr", "1e-50", "moves a weight", ["optim.lr=1e-30"], "between 1.18e-38 and 1.68e+07"),
    "decay_of_all": Bad(["optim.weight_decay=1e9"], "optim.weight_decay", "10000000", "leaves nothing of them", ["optim.weight_decay=1"]),
    "eps_of_zero": Bad(["optim.eps=1e-60"], "optim.eps", "1e-60", "Is 0 in float32", ["optim.eps=1e-37"], "between 1.18e-38 and 3.4e+38"),
    "clip_of_infinity": Bad(["optim.clip_grad=1e39"], "optim.clip_grad", "1e+39", "Is infinite in float32", ["optim.clip_grad=1e38"]),
    "init_whose_squares_vanish": Bad(["model.init_std=1e-30"], "model.init_std", "1e-30", "Squares of such", ["model.init_std=1e-4"]),
    "endless_timer": Bad(["cluster.hang_timeout_s=1e30"], "cluster.hang_timeout_s", "1e+30", "Timers", ["cluster.hang_timeout_s=1e9"]),
    "beta": Bad(["optim.beta2=1.0"], "optim.beta2", "1.0", "below 1", ["optim.beta2=0.99"]),
    "decay_fraction": Bad(["schedule.decay_fraction=1.5"], "schedule.decay_fraction", "1.5", "at most 1", ["schedule.decay_fraction=1"]),
    "weight": Bad(["data.mock=false", "data.train=[{path:x,weight:0}]"], "data.train[0].weight", "0", "positive", []),
    "run_name": Bad(["run.name=a/b"], "run.name", "'a/b'", "Names a folder", ["run.name=a_b"]),
    "wandb_mode": Bad(["logging.wandb.mode=off"], "logging.wandb.mode", "off", "disabled", ["logging.wandb.mode=disabled"]),
    "wandb_project": Bad(["logging.wandb.project=a/b"], "logging.wandb.project", "'a/b'", "none of /", ["logging.wandb.project=b"]),
    "wandb_entity": Bad(["logging.wandb.entity=''"], "logging.wandb.entity", "''", "a name", ["logging.wandb.entity=null"]),
    "wandb_tags": Bad([f"logging.wandb.tags=[{'t' * 65}]"], "logging.wandb.tags", "ttt", "1 to 64", ["logging.wandb.tags=[t]"]),
    "architecture": Bad(["model.architecture=mamba"], "model.architecture", "mamba", "ngpt, gpt", ["model.architecture=gpt"]),
    "transformer_impl": Bad(["model.transformer_impl=te"], "model.transformer_impl", "te", "auto, local", ["model.transformer_impl=auto"]),
    "precision": Bad(["precision.dtype=nvfp4"], "precision.dtype", "nvfp4", "precision.format quantises", ["precision.dtype=bf16"]),
    "recompute": Bad(["parallel.recompute=some"], "parallel.recompute", "some", "selective", ["parallel.recompute=full"]),
    "recompute_module": Bad(
        ["parallel.recompute=selective", "parallel.recompute_modules=[norm]"],
        "parallel.recompute_modules",
        "norm",
        "core_attn, mlp, moe and shared_experts",
        ["parallel.recompute_modules=[core_attn]"],
    ),
    "recompute_modules_unread": Bad(
        ["parallel.recompute_modules=[mlp]"], "parallel.recompute_modules", "mlp", "only", ["parallel.recompute=selective"]
    ),
    "gpu": Bad(["cluster.gpu=h1000"], "cluster.gpu", "h1000", "h100", ["cluster.gpu=h100"]),
    "head_count": Bad(["model.num_attention_heads=3"], "model.num_attention_heads", "3", "not a multiple", ["model.num_attention_heads=2"]),
    "odd_head_size": Bad(["model.head_dim=15"], "model.head_dim", "15", "even", ["model.head_dim=16"]),
    "query_groups": Bad(["model.num_query_groups=3"], "model.num_query_groups", "3", "heads 4", ["model.num_query_groups=4"]),
    "heads_over_tensor": Bad(
        ["parallel.tensor=8", "cluster.gpus_per_node=8"],
        "model.num_attention_heads",
        "4",
        "parallel.tensor 8",
        ["parallel.tensor=2", "train.global_batch_size=8"],
    ),
    "groups_over_tensor": Bad(
        ["parallel=tp4", "cluster.gpus_per_node=4"], "model.num_query_groups", "2", "parallel.tensor 4", ["model.num_query_groups=4"]
    ),
    "ffn_over_tensor": Bad(
        ["parallel=tp2", TWO, "model.ffn_hidden_size=161"], "model.ffn_hidden_size", "161", "tensor 2", ["model.ffn_hidden_size=162"]
    ),
    "vocabulary_over_tensor": Bad(
        ["parallel=tp2", TWO, "model.vocab_padding_multiple=1"],
        "model.vocab_padding_multiple",
        "1",
        "pads the vocabulary to 257",
        ["model.vocab_padding_multiple=2"],
    ),
    "sequence_parallel_alone": Bad(
        ["parallel.sequence_parallel=true"], "parallel.sequence_parallel", "True", "which is 1", ["parallel.sequence_parallel=null"]
    ),
    "sequence_over_tensor": Bad(
        ["parallel=tp2", TWO, "train.seq_length=33"], "train.seq_length", "33", "parallel.tensor 2", ["train.seq_length=34"]
    ),
    "sequence_over_context": Bad(
        ["parallel=cp2", TWO, "train.seq_length=34"], "train.seq_length", "34", "2 * parallel.context 2", ["train.seq_length=36"]
    ),
    "documents_over_context": Bad(
        ["parallel=cp2", TWO, "data.confine_attention=true"], "data.confine_attention", "True", "context", ["data.confine_attention=false"]
    ),
    "positions_across_documents": Bad(
        ["data.reset_positions=true"], "data.reset_positions", "True", "crosses documents", ["data.confine_attention=true"]
    ),
    "end_not_saved": Bad(
        ["checkpoint.interval=2", "checkpoint.save_at_end=false"],
        "checkpoint.save_at_end",
        "False",
        "saves the end",
        ["checkpoint.interval=null"],
    ),
    "pattern_symbol": Bad([TINY_PATTERN + "'*+'"], "model.layer_pattern", "*+", "Unknown symbol +", [TINY_PATTERN + "'*-'"]),
    "pattern_mamba": Bad([TINY_PATTERN + "'M-'"], "model.mamba_num_heads", "0", "has M layers", ["model.mamba_num_heads=8"]),
    "pattern_experts": Bad([TINY_PATTERN + "'*E'"], "model.num_experts", "0", "has E layers", ["model.num_experts=4"]),
    "pattern_length": Bad(
        [TINY_PATTERN + "'**--'"], "model.layer_pattern", "**--", "3 layers, each *- counted as one, but", ["model.num_layers=3"]
    ),
    "pattern_cuts": Bad(
        ["parallel=pp2", TWO, "model.num_layers=4", TINY_PATTERN + "'*|-|*-'"],
        "model.layer_pattern",
        "*|-|*-",
        "2 stages",
        [TINY_PATTERN + "'*-|*-'"],
    ),
    "pattern_uncut": Bad(
        ["parallel=pp2", TWO, "model.num_layers=4", TINY_PATTERN + "'**--'"],
        "model.layer_pattern",
        "**--",
        "not cut",
        [TINY_PATTERN + "'**|--'"],
    ),
    "layers_over_pipeline": Bad(
        ["parallel=pp2", TWO, "model.num_layers=3"], "parallel.pipeline", "2", "3 layers", ["model.num_layers=4"], "1, 3"
    ),
    "chunks_without_pipeline": Bad(
        ["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline", "2", "there is one", ["parallel.virtual_pipeline=null"]
    ),
    "micro_batches_over_pipeline": Bad(
        ["parallel=pp2_vp2", TWO, "model.num_layers=4", "train.global_batch_size=6"],
        "train.global_batch_size",
        "6",
        "3 micro-batches",
        ["train.global_batch_size=8"],
    ),
    "experts": Bad(["parallel.expert=2", TWO], "parallel.expert", "2", "a dense model has none", ["parallel.expert=1"]),
    "world_size": Bad(["parallel=tp2"], "cluster.gpus_per_node", "1 nodes * 1 = 1", "multiple of tensor 2", [TWO]),
    "global_batch": Bad(
        ["train.global_batch_size=7"], "train.global_batch_size", "7", "micro_batch_size 2 * data parallel 1", ["train.global_batch_size=8"]
    ),
    "micro_batch": Bad(["train.micro_batch_size=3"], "train.global_batch_size", "8", "= 3", ["train.micro_batch_size=4"], "1, 2, 4, 8"),
    "global_batch_over_copies": Bad(
        ["cluster.gpus_per_node=8"], "train.global_batch_size", "8", "data parallel 8 = 16", ["train.global_batch_size=16"]
    ),
    "optimizer": Bad(["optim.optimizer=muon"], "optim.optimizer", "muon", "muon is not supported", ["optim.optimizer=adam"]),
    "min_lr": Bad(["optim.min_lr=1"], "optim.min_lr", "1.0", "optim.lr 0.001", ["optim.min_lr=0"]),
    "gather_without_reduce": Bad(
        ["parallel.overlap_param_gather=true"],
        "parallel.overlap_param_gather",
        "True",
        "overlap_grad_reduce",
        ["parallel.overlap_grad_reduce=true"],
    ),
    "bf16_checkpoint": Bad(
        ["precision=bf16", "parallel.distributed_optimizer=false"],
        "parallel.distributed_optimizer",
        "False",
        "fp32 scales",
        ["precision=fp32"],
    ),
    "warm_up": Bad(["schedule.warmup_steps=4"], "schedule.warmup_steps", "4", "train.steps 4", ["train.steps=5"]),
    "stop_after": Bad(["train.stop_after=5"], "train.stop_after", "5", "train.steps 4", ["train.stop_after=4"]),
    "health_interval": Bad(
        ["logging.interval=4", "logging.health_interval=10"],
        "logging.health_interval",
        "10",
        "multiple of logging.interval 4",
        ["logging.health_interval=12"],
    ),
    "profile_window": Bad(["debug=profile"], "debug.profile_stop", "10 to 12", "train.steps 4", ["train.steps=12"]),
    "profile_rank": Bad(
        ["debug=profile", "train.steps=12", "debug.profile_ranks=[1]"], "debug.profile_ranks", "1", "0 to 0", ["debug.profile_ranks=[0]"]
    ),
    "no_data": Bad(["data.mock=false", "train.eval_steps=0"], "data.train", "Empty", "needs text", ["data=enwik8_bytes"]),
    "no_validation_data": Bad(
        ["data.mock=false", "data.train=[{path:x}]"], "data.valid", "Empty", "train.eval_steps 1", ["train.eval_steps=0"]
    ),
    "mock_and_data": Bad(["data.train=[{path:x}]"], "data.mock", "True", "unread", ["data.mock=false", "data.valid=[{path:y}]"]),
    "vocabulary": Bad(["model.vocab_size=256"], "model.vocab_size", "256", "has 257 tokens", ["model.vocab_size=257"]),
    "vocabulary_of_tekken": Bad(["tokenizer=tekken"], "model.vocab_size", "257", "has 131072", ["model.vocab_size=131072"]),
    "tokenizer_file": Bad(["tokenizer=huggingface"], "tokenizer.path", "None", "read from a file", ["tokenizer.path=t.json"]),
    "tokenizer_model": Bad(["tokenizer=sentencepiece"], "tokenizer.path", "None", "read from a file", ["tokenizer.path=t.model"]),
    "async_without_saving": Bad(
        ["checkpoint=none", "checkpoint.async_save=true"], "checkpoint.async_save", "True", "Nothing", ["checkpoint.save_at_end=true"]
    ),
    "hf_without_saving": Bad(
        ["checkpoint=none", "checkpoint.hf=true"], "checkpoint.hf", "True", "Nothing", ["checkpoint.save_at_end=true"]
    ),
    "optimizer_of_no_checkpoint": Bad(
        ["checkpoint.load_optimizer=true"], "checkpoint.load_optimizer", "True", "checkpoint.load", ["checkpoint.load=runs/a/checkpoints"]
    ),
    "megatron_argument_with_a_key": Bad(["megatron.seq-length=9"], "megatron.seq-length", "9", "train.seq_length sets", []),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_with_path_value_rule_and_a_way_out_that_works(bad: Bad):
    check(bad)


def test_all_broken_rules_are_reported_at_once():
    with pytest.raises(ConfigErrors) as caught:
        compose(["experiment=ngpt_tiny", "model.num_query_groups=3", "train.micro_batch_size=3", "optim.min_lr=1"])
    assert [error.path for error in caught.value.errors] == ["model.num_query_groups", "train.global_batch_size", "optim.min_lr"]
    assert len(str(caught.value).splitlines()) == 3


def test_without_an_experiment_the_missing_keys_are_named_and_what_lists_experiments():
    with pytest.raises(ConfigError) as caught:
        compose([])
    paths = [error.path for error in caught.value.errors]
    assert {"run.name", "train.steps", "train.global_batch_size"} <= set(paths)
    assert "`ngpt list experiments` shows them" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "path", "rule", "line"),
    [
        ("\ntrain: {steps: [}", "", "readable YAML", 2),
        ("- 1", "", "sections", None),
        ("train: {stepz: 4}", "train.stepz", "Only keys", "stepz: 4"),
        ("train: {steps: 0}", "train.steps", "positive", "steps: 0"),
        (None, "", "config", None),
    ],
    ids=["not_yaml", "not_a_mapping", "unknown_key", "bad_value", "no_file"],
)
def test_a_damaged_config_file_is_refused(text: str | None, path: str, rule: str, line: int | str | None, tmp_path: Path):
    file = tmp_path / "config.yaml"
    if text is not None:
        dump(compose(["experiment=ngpt_tiny"]), file)
        section, _, value = text.partition(": ")
        lines = file.read_text()
        file.write_text(lines.replace("  steps: 4\n", f"  {value.strip('{}')}\n") if section == "train" and "[" not in value else text)
        if isinstance(line, str):
            line = file.read_text().splitlines().index(f"  {line}") + 1
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert caught.value.path == (str(file) if line is None else f"{file}:{line}")  # it is at fault, not a command line
    assert path in str(caught.value) and rule in caught.value.rule


def test_the_pass_through_table_points_at_existing_keys():
    assert set(OWNED.values()) <= {key for key, _ in leaf_types()}


def test_megatron_arguments_that_break_a_guarantee_are_refused_by_name():
    cfg = compose(["experiment=ngpt_tiny"])
    cfg.megatron = dict.fromkeys(REFUSED, 1)
    with pytest.raises(ConfigErrors) as refused:
        validate(cfg)
    assert {error.path: error.rule for error in refused.value.errors if error.path.startswith("megatron.")} == {
        f"megatron.{argument}": f"Refused: {reason}" for argument, reason in REFUSED.items()
    }


GRAPHS = "megatron.cuda_graph_impl=local"
TEXT = ["data.mock=false", "data.train=[{path: x}]", "data.valid=[{path: x}]"]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ([GRAPHS, "precision=nvfp4_paper"], "rounding seeds"),
        (["megatron.enable_cuda_graph=true", "precision=nvfp4_static"], "rounding seeds"),
        ([GRAPHS, *TEXT, "data.confine_attention=true"], "document boundaries"),
        ([GRAPHS, "experiment=ngpt_hybrid_tiny"], "how many tokens each expert gets"),
        (["megatron.cuda_graph_impl=full_iteration", "megatron.cuda_graph_modules=[attn]", "experiment=ngpt_hybrid_tiny"], "expert"),
        (["megatron.cuda_graph_impl=full_iteration", "train.on_spike=skip"], "train.on_spike=skip"),
        ([GRAPHS, "megatron.cuda_graph_modules=[attn,moe_router]", "experiment=ngpt_hybrid_tiny"], "moe_permute_fusion"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_the_host_decides_at_each_step_is_not_captured(words: list[str], rule: str):
    experiment = [] if any("experiment" in word for word in words) else ["experiment=ngpt_tiny"]
    with pytest.raises(ConfigError, match=f"megatron.*cuda_graph.*{rule}"):
        compose([*experiment, *words])


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=ngpt_tiny", GRAPHS, "precision=bf16"],
        ["experiment=ngpt_tiny", "megatron.cuda_graph_impl=none", "precision=nvfp4_paper"],
        ["experiment=ngpt_hybrid_tiny", GRAPHS, "megatron.cuda_graph_modules=[attn,mamba]"],
        ["experiment=ngpt_hybrid_tiny", GRAPHS, "megatron.cuda_graph_modules=[attn,mamba,moe_router]", "megatron.moe_permute_fusion=true"],
    ],
    ids=str,
)
def test_other_layers_may_be_captured(words: list[str]):
    compose(words)


def test_collectives_inside_of_products_are_those_of_bf16_linears_under_sequence_parallelism():
    words = ["experiment=ngpt_tiny", "precision=bf16", "parallel.tensor=2", "cluster.gpus_per_node=2", "megatron.tp_comm_overlap=true"]
    compose(words)
    refused = {
        "parallel.sequence_parallel=false": "parallel.tensor above 1 with parallel.sequence_parallel",
        "parallel.tensor=1": "parallel.tensor above 1",
        "precision=nvfp4_paper": "precision=bf16",
        "precision.dtype=fp32": "precision=bf16",
        "debug.deterministic=true": "debug.deterministic=false",
        GRAPHS: "no CUDA graphs",
    }
    for word, rule in refused.items():
        with pytest.raises(ConfigError, match=f"megatron.tp_comm_overlap.*{rule}"):
            compose([*words, word])


def test_megatrons_own_check_of_gradients_cannot_decide_for_all_ranks():
    words = ["experiment=ngpt_tiny", "megatron.check_for_nan_in_loss_and_grad=true"]
    assert compose(words).megatron == {"check_for_nan_in_loss_and_grad": True}
    with pytest.raises(ConfigError, match="megatron.check_for_nan_in_loss_and_grad: True.*train.on_nonfinite=skip"):
        compose([*words, "train.on_nonfinite=skip"])
