"""The tables of Megatron arguments agree with Megatron, and the group `megatron` takes what they say."""

import argparse
import json

import pytest

from ngpt.config import ConfigError
from ngpt.config.compose import compose, dump, load, to_yaml
from ngpt.config.identity import diff, model_defining
from ngpt.config.megatron_arguments import ALLOWED, passed_on, unchecked_note
from ngpt.config.megatron_keys import OWNED, REFUSED

TINY = "experiment=ngpt_tiny"


@pytest.fixture(scope="module")
def actions() -> dict[str, argparse.Action]:
    from megatron.training.arguments import add_megatron_arguments

    return {action.dest: action for action in add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._actions}


def test_every_name_is_an_argument_of_megatron(actions):
    names = set(OWNED) | set(REFUSED) | set(ALLOWED)
    assert names <= actions.keys(), names - actions.keys()
    assert len(names) == len(OWNED) + len(REFUSED) + len(ALLOWED)  # one table says what becomes of a name


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_an_allowed_argument_takes_what_megatron_takes(actions, name):
    action, kind = actions[name], ALLOWED[name]
    assert kind.holds(True) == (action.nargs == 0)
    words = action.choices and [getattr(choice, "name", choice) for choice in action.choices]
    samples = words or {int: [1], None: ["word"], str: ["word"]}.get(action.type, ["attn", "mamba"])
    if action.nargs == "+":
        assert kind.holds(samples) and not kind.holds(samples[0])
        return
    assert not kind.holds([True]) and not kind.holds(["word"]) and not kind.holds([1])
    if action.nargs != 0:
        assert all(map(kind.holds, samples)) and not kind.holds({"a": 1})
    if action.type is int:
        assert not kind.holds("word") and not kind.holds(1.5) and not kind.holds(-1)


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("megatron.window_size=[4,0]", "mask that keeps documents apart"),
        ("megatron.use_mup=true", "Refused: "),
        ("megatron.softmax_type=learnable", "not among the arguments"),
        ("megatron.ddp_buket_size=3", r"Did you mean megatron\.ddp_bucket_size\?"),
        ("megatron.microbatch_size=3", r"Did you mean train\.micro_batch_size\?"),
        ("megatron.manual_gc=3", "Takes true or false"),
        ("megatron.manual_gc=[true]", "Takes true or false"),
        ("megatron.ddp_bucket_size=[1,2]", "Takes a whole number"),
        ("megatron.cuda_graph_modules=attn", "Takes a list"),
        ("megatron.timing_log_option=[all]", "Takes one of"),
        ("megatron.unchecked=1", "true or false"),
    ],
)
def test_what_is_not_known_to_be_harmless_is_refused_when_the_config_is_composed(word, rule):
    with pytest.raises(ConfigError, match=rule):
        compose([TINY, word])


def test_unchecked_arguments_pass_and_mark_the_run():
    cfg = compose([TINY, "megatron.softmax_type=learnable", "megatron.manual_gc=true", "megatron.unchecked=true"])
    assert passed_on(cfg.megatron) == {"softmax_type": "learnable", "manual_gc": True}
    (note,) = unchecked_note(cfg.megatron)
    assert "softmax_type=learnable" in note and "manual_gc" not in note
    assert unchecked_note({"manual_gc": True, "unchecked": True}) == []


@pytest.mark.parametrize("word", ["megatron.use_mup=true", "megatron.hidden_size=64"])
def test_unchecked_lets_nothing_through_that_is_owned_or_refused(word):
    with pytest.raises(ConfigError, match="Refused|sets this argument"):
        compose([TINY, word, "megatron.unchecked=true"])


def test_a_run_from_before_arguments_were_checked_reads_back_as_unchecked(tmp_path):
    file = tmp_path / "config.yaml"
    dump(compose([TINY, "megatron.softmax_type=learnable", "megatron.unchecked=true"]), file)
    file.write_text(file.read_text().replace("  unchecked: true\n", "  log_straggler: true\n"))
    assert load(file).megatron == {"softmax_type": "learnable", "unchecked": True}
    file.write_text(to_yaml(compose([TINY, "megatron.manual_gc=true"])))
    assert load(file).megatron == {"manual_gc": True}


@pytest.mark.parametrize(
    ("recorded", "read"),
    [
        ({"window_size": [4, 0]}, {"window_size": [4, 0], "unchecked": True}),  # it was trained with it
        ({"recompute_activations": True, "bias_swiglu_fusion": True}, {}),
        ({"cuda_graph_modules": "attn", "iterations_to_skip": 5}, {"cuda_graph_modules": ["attn"], "iterations_to_skip": [5]}),
        ({"log_memory_interval": 0}, {"log_memory_interval": 0, "unchecked": True}),
    ],
)
def test_what_earlier_versions_took_is_read_back(recorded, read, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(compose([TINY])).replace("megatron: {}", f"megatron: {json.dumps(recorded)}"))
    assert load(file).megatron == read


def test_a_run_cannot_resume_without_the_unchecked_argument_that_it_learnt_with():
    with_it = compose([TINY, "megatron.softmax_type=learnable", "megatron.unchecked=true"])
    assert "megatron.softmax_type" in diff(model_defining(with_it), model_defining(compose([TINY])))
    assert diff(model_defining(compose([TINY, "megatron.manual_gc=true"])), model_defining(compose([TINY]))) == {}


@pytest.mark.parametrize("experiment", ["ngpt_tiny", "gpt_tiny", "ngpt_hybrid_tiny"])
def test_what_this_project_sets_is_owned_refused_or_free_to_be_set_otherwise(experiment):
    from megatron_ext.training.bridge import megatron_arguments

    ours = megatron_arguments(compose([f"experiment={experiment}"]), "local")
    assert ours.keys() <= set(OWNED) | set(REFUSED) | set(ALLOWED)
