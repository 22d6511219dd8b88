"""Files that describe more than a config ever holds are refused before a library builds what they describe."""

import pytest

from ngpt.config.compose import compose, largest_divisor, load
from ngpt.config.errors import ConfigError
from ngpt.config.yaml_limits import check_yaml

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
HOSTILE = {
    "deep_flow": ("a: " + "[" * 5000, "Nested"),
    "deep_block": ("\n".join(" " * depth + "a:" for depth in range(500)), "Nested"),
    "aliases": (BOMB, "Stands for more than"),
    "own_alias": ("a: &a [1, *a]", "lies inside of what it stands for"),
    "large": ("a: 1\n" * (1 << 20), "bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_is_refused_by_name_wherever_it_is_read(tmp_path, name):
    text, words = HOSTILE[name]
    path = tmp_path / "experiment" / "zz.yaml"
    path.parent.mkdir()
    path.write_text("# @package _global_\n" + text)
    for read in (check_yaml, load, lambda _: compose(["experiment=zz"], [tmp_path])):
        with pytest.raises(ConfigError, match=words) as refusal:
            read(path)
        assert refusal.value.path == str(path)


def test_usual_aliases_pass(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a [1, 2]\nb: [*a, *a]\nc: {<<: &m {x: 1}, y: *m}\n")
    check_yaml(path)


ENDLESS = ["run.root=${run.root}", "train.steps=${largest_divisor:99999999999999999,999999999999}", "data.train=" + "[" * 300]


@pytest.mark.parametrize("word", ENDLESS)
def test_words_that_never_end_are_refused(word):
    with pytest.raises(ConfigError):
        compose(["experiment=ngpt_tiny", word])


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("debug.profile_ranks=${logging.name}", "debug.profile_ranks"),
        ("precision.bf16_modules=${debug.profile_ranks}", "precision.bf16_modules"),
        ("megatron=${data.mock}", "megatron"),
        ("model.num_layers=99999999999", "model.num_layers"),
        ("~" + "schedule" + "x" * 5000, "config"),
        ("parallel=${precision.num_lay ers}", "token recognition error"),
    ],
)
def test_odd_words_are_refused_in_one_line(word, key):
    with pytest.raises(ConfigError) as refusal:
        compose(["experiment=ngpt_tiny", word])
    assert key in str(refusal.value)


def test_a_cut_config_of_a_run_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("run:\n  name: x\nmodel:\n  name: y\n")
    with pytest.raises(ConfigError) as refusal:
        load(path)
    assert all(line.startswith(f"{path}: ") and "Restore the file" in line for line in str(refusal.value).splitlines())


@pytest.mark.parametrize(("number", "limit", "largest"), [(12, 5, 4), (12, 12, 12), (7, 3, 1), (1, 1, 1), (2**39, 10, 8), (96, 50, 48)])
def test_largest_divisor(number, limit, largest):
    assert largest_divisor(number, limit) == largest
