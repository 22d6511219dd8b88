"""Words of a sweep are read as Hydra reads them, and its members are named by what was typed."""

import itertools
import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError
from ngpt.config.folders import options
from ngpt.config.sweep import points, sweep_words

TINY = "experiment=ngpt_tiny"


def swept(*words: str) -> dict[str, tuple[str, ...]]:
    return {axis.key: axis.values for axis in sweep_words(words)[1]}


def names(*words: str) -> list[str]:
    return [point.name for point in points(sweep_words(words)[1])]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-3,3e-3", ("1e-3", "3e-3")),
        ("choice(1e-3, 1)", ("1e-3", "1")),
        ("range(1,4)", ("1", "2", "3")),
        ("range(0,1,0.25)", ("0.0", "0.25", "0.5", "0.75")),
        ("sort(3,1,2)", ("1", "2", "3")),
        ("[1,2],[3]", ("[1,2]", "[3]")),
        ("{a:1,b:2},{a:2}", ("{a:1,b:2}", "{a:2}")),
        ("'a,b',c", ("'a,b'", "c")),
        ("null,1", ("null", "1")),
        ("${optim.min_lr},1", ("${optim.min_lr}", "1")),
    ],
)
def test_several_values_are_those_of_hydras_grammar_as_they_were_typed(text, values):
    assert swept(f"megatron.x={text}") == {"megatron.x": values}


@pytest.mark.parametrize("text", ["1", "'a,b'", "[1,2]", "{a: 1, b: 2}", "[{path: a}, {path: b}]", '"range(1,3)"'])
def test_one_value_is_no_sweep(text):
    fixed, axes = sweep_words([f"megatron.x={text}", "train.seed=1,2"])
    assert fixed == [f"megatron.x={text}"] and [axis.key for axis in axes] == ["train.seed"]


SCALAR = st.sampled_from(["1", "1e-3", "-2", "true", "abc", "a/b", "'x,y'", '"q"', "null"])
VALUE = st.one_of(SCALAR, st.lists(SCALAR, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]"))


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUE, min_size=2, max_size=5, unique=True))
def test_each_value_is_what_hydras_sweeper_would_set(values):
    word = f"megatron.x={','.join(values)}"
    parse = OverridesParser.create().parse_override
    ours = [parse(f"megatron.x={value}").value() for value in swept(word)["megatron.x"]]
    assert ours == [parse(f"megatron.x={value}").value() for value in parse(word).sweep_string_iterator()]


def test_text_keys_sweep_at_commas_that_are_not_quoted():
    words = ["tokenizer.path=/a/1.10,'b,c'", "cluster.environment.X=01,1", "data.cache_dir='d,e'"]
    assert swept(*words) == {"tokenizer.path": ("/a/1.10", "'b,c'"), "cluster.environment.X": ("01", "1")}
    first, *_, last = points(sweep_words(words)[1])
    first, last = (compose([TINY, *point.words]) for point in (first, last))
    assert (first.tokenizer.path, first.cluster.environment) == ("/a/1.10", {"X": "01"})
    assert (last.tokenizer.path, last.cluster.environment) == ("b,c", {"X": "1"})


def test_glob_chooses_files_of_a_group_and_those_of_the_user(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/ngpt_tiny_mine.yaml").touch()
    wanted = [option.name for option in options() if option.group == "model" and option.name.startswith("ngpt_t")]
    axes = sweep_words(["model=glob(ngpt_t*, exclude=*x)"], [tmp_path])[1]
    assert sorted(axes[0].values) == sorted([*wanted, "ngpt_tiny_mine"])


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("optim.lr=interval(0,1)", "An interval has no end"),
        ("optim.lr=glob(*)", "none"),
        ("model=glob(x*)", "No file of the group matches"),
        ("run.name=a,b", "names its members by what differs"),
        ("train.seed=1,2,1", "1 is given twice, and each value makes one member"),
        ("train.seed=range(0,2000)", "at most 1,000 members"),
        ("train.seed=range(1,1000000000000)", "1,001 members or more. A sweep has at most 1,000"),  # too many to be written out
        ("train.seed=shuffle(range(1,1000000000000))", "1,001 members or more"),
        ("train.seed=range(0,5,0)", "A range has a step, and this one is 0"),
        ("hydra.launcher=a,b", "only composes"),
        ("train.seed=1", "needs a word with several values"),
        ("ngpt_tiny", "experiment=ngpt_tiny"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_a_reason(word, words):
    with pytest.raises(ConfigError, match=words):
        sweep_words([word])


def test_the_members_of_all_keys_are_counted():
    with pytest.raises(ConfigError, match="1,200 members. A sweep has at most 1,000"):
        sweep_words(["train.seed=range(0,400)", "optim.lr=1e-3,2e-3,3e-3"])


def test_members_are_every_combination_the_last_key_changing_first():
    axes = sweep_words(["optim.lr=1e-3,3e-3", TINY, "+train.seed=1,2"])[1]
    assert [point.values for point in points(axes)] == [
        {"optim.lr": lr, "train.seed": seed} for lr, seed in itertools.product(("1e-3", "3e-3"), ("1", "2"))
    ]
    assert points(axes)[1].words == ("optim.lr=1e-3", "+train.seed=2")
    assert names("optim.lr=1e-3,3e-3", "train.seed=1,2") == ["lr=1e-3_seed=1", "lr=1e-3_seed=2", "lr=3e-3_seed=1", "lr=3e-3_seed=2"]


def test_names_are_whole_where_two_keys_end_alike_and_safe_and_different_whatever_the_values():
    assert names("optim.lr=1,2", "megatron.lr=3,4")[0] == "optim.lr=1_megatron.lr=3"
    hostile = ["'a b'", "'a  b'", "'a/b'", "'../a'", "'$(touch x)'", "'é'", "'..'", "''", "a-b", f"'{'a' * 300}'", f"'{'a' * 299}'"]
    found = names(f"tokenizer.path={','.join(hostile)}", "data.cache_dir=x,y")
    assert len({name.lower() for name in found}) == 2 * len(hostile)
    for name in found:
        assert re.fullmatch(r"[\w.+=,@-]+", name, re.ASCII) and len(name) < 200  # what a run may be called
    assert compose([TINY, f"run.name=x_{found[0]}"]).run.name == f"x_{found[0]}"
