"""What all commands have in common: help, misspelt words, NGPT_CONFIG_DIR, a start without the libraries that take long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli, train
from launch.arguments import config_dirs, recorded_command
from ngpt.config import compose
from ngpt.config.errors import ConfigError
from ngpt.config.folders import options

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def mine(tmp_path):
    """Two folders of config files, with an experiment each."""
    for name in ("one", "two"):
        (tmp_path / name / "experiment").mkdir(parents=True)
        text = f"# @package _global_\n# Experiment {name}.\ndefaults: [ngpt_tiny]\ntrain: {{seed: 77}}\n"
        (tmp_path / name / "experiment" / f"{name}.yaml").write_text(text)
    return tmp_path


def said(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_command_can_be_explained(capsys):
    for command in cli.COMMANDS:
        code, out, _ = said(capsys, command.name, "--help")
        assert code == 0 and out.startswith(f"usage: ngpt {command.name}")
        assert said(capsys, "help", command.name) == (0, out, "")


def test_help_of_train_explains_words_groups_and_experiments(capsys, monkeypatch, mine):
    monkeypatch.setenv("NGPT_CONFIG_DIR", str(mine / "one"))
    _, out, _ = said(capsys, "train", "--help")
    assert all(word in out for word in ("experiment=NAME", "GROUP=NAME", "KEY=VALUE"))
    found = options([mine / "one"])
    assert all(f"\n  {option.group} " in out for option in found if option.group != "experiment")
    for option in found:
        if option.group == "experiment":
            (line,) = (line for line in out.splitlines() if line.split()[:1] == [option.name])
            assert line.endswith(f"  {option.description}") and option.description


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "ngpt: unknown command 'trian'. Did you mean train? Commands: config, list, "),
        (["data", "prepair"], "ngpt data: unknown command 'prepair'. Did you mean prepare? "),
        (["train", "--confg-dir", "x"], "ngpt train: unrecognized arguments: --confg-dir. Did you mean --config-dir?"),
        (["--verison"], "ngpt: "),
        (["status"], "ngpt status: the following arguments are required: RUN. ngpt status --help explains"),
        (["train", "-m", "experiment=ngpt_tiny"], "-m: experiment=ngpt_tiny. A sweep needs a word with several values. "),
        (["launch", "--multirun", "experiment=ngpt_tiny", "optim.lr=interval(0,1)"], "optim.lr: interval(0,1). "),
        (["train", "experiment=ngpt_tiny", "--parallel", "2"], "--parallel: 2. Says how many members of a sweep "),
        (["train", "experiment=ngpt_tiny", "-m", "train.seed=1,2", "--parallel", "0"], "--parallel: 0. "),
        (["estimate", "experiment=ngpt_tiny", "--multirun"], "--multirun: Is no option of ngpt estimate. "),
        (["train", "experiment=ngpt_tiny", "--cfg", "job"], "--cfg: Is no option of ngpt train. Hydra only composes the config here. "),
        (["config", "-cn", "quickstart"], "-cn: Is no option of ngpt config. "),
        (["train", "experiment=ngpt_tiny", "--info"], "--info: Is no option of ngpt train. "),
        (["train", "-m", "experiment=ngpt_tiny", "train.seed=1,2", "hydra.sweep.dir=x"], "hydra.sweep.dir: "),
        (["config", "experiment=ngpt_tiny", "train.seed=1,2"], "train.seed: 1,2. Several values are several runs, "),
        (["train", "ngpt_tiny"], "ngpt_tiny: Cannot be read. "),
        (["list", "modle"], "ngpt list: modle. "),
        (["list", "experimets"], "ngpt list: experimets. There are experiments, studies, keys, model, "),
        (["list", "keys", "zzz"], "ngpt list keys: zzz. "),
        (["list", "experiments", "--config-dir", "/no/such"], "--config-dir: /no/such. Must be a folder laid out like conf/. "),
        (["config", "experiment=ngpt_tiny", "--config-dir", "/no/such"], "--config-dir: /no/such. Must be a folder laid out like conf/. "),
        (["completion", "tcsh"], "ngpt completion: argument shell: invalid choice: 'tcsh'"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(words, told, capsys):
    code, out, err = said(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(told) and err.count("\n") == 1


def test_a_mistyped_kind_is_named_as_ngpt_list_names_it(capsys):
    assert "Did you mean experiments?" in said(capsys, "list", "experimets")[2]


def test_versions_are_told_by_an_option_too(capsys):
    code, out, _ = said(capsys, "--version")
    assert code == 0 and out.startswith("ngpt-megatron ")
    assert said(capsys, "version") == (0, out, "")


def test_options_stand_anywhere_among_words(capsys, mine):
    words = ["--config-dir", str(mine / "one"), "experiment=one", "--json", "train.steps=6", "--config-dir", str(mine / "two")]
    code, out, err = said(capsys, "config", *words)
    assert (code, err) == (0, "")
    config = json.loads(out)["config"]
    assert (config["train"]["seed"], config["train"]["steps"], config["run"]["name"]) == (77, 6, "one")


def test_config_as_json_is_the_config_and_its_counts(capsys):
    _, out, _ = said(capsys, "config", "experiment=ngpt_1p2b_dense_bf16", "cluster=b200_128", "--json")
    values = json.loads(out)
    assert values["config"]["model"]["hidden_size"] == 2048 and values["config"]["cluster"]["nodes"] == 16
    counts = values["counts"]
    assert counts["tokens"] == 158_946 * 768 * 8192 and counts["processes"] == counts["data_parallel"] == 128
    assert counts["parameters_total"] == 713_277_440 + 2 * 131072 * 2048 + 131072  # blocks, embedding and head, scale of the logits


def test_folders_of_the_environment_are_the_default(capsys, monkeypatch, mine, tmp_path):
    one, two = mine / "one", mine / "two"
    monkeypatch.setenv("NGPT_CONFIG_DIR", f"{one}{os.pathsep}{two}")
    for name in ("one", "two"):
        assert said(capsys, "config", f"experiment={name}")[0] == 0
    assert said(capsys, "config", "experiment=one", "--config-dir", str(two))[0] == 2  # which the option replaces
    code, out, _ = said(capsys, "list", "experiments", "Experiment")
    assert code == 0 and out.split() == ["one", "Experiment", "one.", "two", "Experiment", "two."]
    monkeypatch.setenv("NGPT_CONFIG_DIR", str(tmp_path / "none"))
    code, _, err = said(capsys, "config", "experiment=ngpt_tiny")
    assert code == 2 and err.startswith(f"NGPT_CONFIG_DIR: {tmp_path / 'none'}. ")


def test_a_recorded_command_needs_no_variable(monkeypatch, mine):
    """`train` records it with the run, and `ngpt status` says it is what continues it."""
    monkeypatch.setenv("NGPT_CONFIG_DIR", str(mine / "one"))
    recorded = []
    monkeypatch.setattr(train, "train_config", lambda config, command: recorded.append((config, command)) or 0)
    assert cli.main(["train", "experiment=one"]) == 0
    ((config, command),) = recorded
    assert command == ["ngpt", "train", "experiment=one", f"--config-dir={mine / 'one'}"]
    monkeypatch.delenv("NGPT_CONFIG_DIR")
    read = cli.parser("train").read(command[1:])
    assert compose(read.overrides, config_dirs(read)) == config
    read.command, read.words = "train", command[2:]
    assert recorded_command(read) == command


def test_a_whole_config_does_not_ask_for_folders(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NGPT_CONFIG_DIR", str(tmp_path / "none"))
    assert said(capsys, "train", "--config", str(tmp_path / "config.yaml"))[2].startswith(f"{tmp_path / 'config.yaml'}: No such file")
    with pytest.raises(ConfigError, match="NGPT_CONFIG_DIR"):
        config_dirs(cli.parser("train").read(["train"]))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["experiments", "control of ngpt_hybrid_tiny"], ["gpt_hybrid_tiny"]),
        (["precision", "nvfp4_s*"], ["nvfp4_static"]),
        (["keys", "optim.BETA?"], ["optim.beta1", "optim.beta2"]),
        (["schedule"], ["constant", "cosine", "linear", "wsd"]),
    ],
)
def test_lists_have_a_line_for_each_name_that_matches(words, names, capsys):
    code, out, _ = said(capsys, "list", *words)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == names
    assert all(len(line.split()) > 1 for line in out.splitlines())


def test_a_key_is_listed_with_what_it_takes(capsys):
    assert "(whole number = 1234)\n" in said(capsys, "list", "keys", "train.seed")[1]
    assert "(ngpt | gpt = ngpt)\n" in said(capsys, "list", "keys", "model.architecture")[1]
    assert {"keys", "experiments", "precision"} <= {line.split()[0] for line in said(capsys, "list")[1].splitlines()}


def test_reading_a_command_line_imports_neither_hydra_nor_the_work():
    """All but `data`, whose help names texts."""
    names = [command.name for command in cli.COMMANDS if command.name != "data"]
    code = f"import sys; from launch import cli; [cli.parser(name) for name in {names}]; cli.main(['--help'])\n"
    code += "sys.exit(', '.join({'hydra', 'omegaconf', 'yaml', 'numpy', 'torch', 'shtab'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
