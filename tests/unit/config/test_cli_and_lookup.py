"""`ngpt config` from any directory, installed or not, with folders of the user, and without torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import launch
import ngpt
from launch.cli import main
from ngpt.config import ConfigError, compose, config_dir

RUN = """
import sys
from {package}.cli import main
status = main(["config", *sys.argv[1:]])
unwanted = {{"torch", "megatron", "launch", "ngpt.launch"}} - {{"{package}"}}
sys.exit(99 if unwanted & set(sys.modules) else status)
"""


def run_command(package: str, *arguments: str, folder: Path, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(path), "PATH": ""}
    command = [sys.executable, "-c", RUN.format(package=package), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my configs, 'quoted'"
    (folder / "experiment").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "model" / "mine.yaml").write_text("defaults: [ngpt_tiny, _self_]\nname: mine\nffn_hidden_size: 96\n")
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [ngpt_tiny, {override /model: mine}]\ntrain: {steps: 6}\n"
    )
    return folder


def test_a_failing_command_is_short_and_imports_no_torch(tmp_path: Path):
    overrides = ("experiment=quickstart", "model.num_attention_heads=5", "parallel.tensor=3")
    finished = run_command("launch", *overrides, folder=tmp_path, path=Path(ngpt.__file__).parents[1])
    assert finished.returncode == 2, finished.stderr
    assert finished.stdout == ""
    assert finished.stderr.startswith("model.num_attention_heads: 5. ")
    assert "Traceback" not in finished.stderr
    assert list(tmp_path.iterdir()) == []  # Hydra left no output folder


def test_an_installed_package_finds_its_own_conf_from_any_directory(tmp_path: Path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    shutil.copytree(Path(ngpt.__file__).parent, site / "ngpt", ignore=shutil.ignore_patterns("__pycache__", "conf"))
    shutil.copytree(Path(launch.__file__).parent, site / "ngpt" / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(config_dir(), site / "ngpt" / "conf")
    elsewhere.mkdir()
    tiny = site / "ngpt" / "conf" / "model" / "ngpt_tiny.yaml"
    tiny.write_text(tiny.read_text().replace("ffn_hidden_size: 160", "ffn_hidden_size: 200"))
    finished = run_command("ngpt.launch", "experiment=ngpt_tiny", folder=elsewhere, path=site)
    assert finished.returncode == 0, finished.stderr
    assert "ffn_hidden_size: 200" in finished.stdout


def test_prints_the_config_and_its_counts(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "experiment=ngpt_1p2b_dense_bf16", "cluster=b200_128"]) == 0
    printed = capsys.readouterr().out
    assert "hidden_size: 2048" in printed
    assert "713,277,440" in printed  # blocks
    assert "536,870,912" in printed  # embedding and head
    assert "7.902 GFLOP a token" in printed
    assert f"{158_946 * 768 * 8192:,} (6,291,456 a step" in printed
    assert "128, data parallel 128" in printed
    assert "2 of 3 sequences" in printed


def test_prints_errors_on_stderr_only(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "experiment=ngpt_tiny", "train.sed=1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "train.sed: Unknown key. Only keys of ngpt/config/schema.py exist. Did you mean train.seed?\n"


def test_a_folder_of_the_user_adds_options(user_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["config", "experiment=mine", "--config-dir", str(user_folder), "train.seed=7"]) == 0
    printed = capsys.readouterr().out
    assert all(line in printed for line in ("ffn_hidden_size: 96", "steps: 6", "seed: 7", "dir: runs/mine\n"))


def test_an_error_in_a_file_of_the_user_names_the_file(user_folder: Path):
    (user_folder / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain: {stepz: 6}\n")
    with pytest.raises(ConfigError, match=r"^train\.stepz: Unknown key in .*/experiment/mine\.yaml:2\. .*Did you mean train\.steps"):
        compose(["experiment=mine"], [user_folder])


BROKEN = {"no_yaml": b"train: {steps: [}\n", "no_utf8": b"# \xff\n", "no_mapping": b"- 1\n", "key_twice": b"{train: {}, train: {}}\n"}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_of_the_user_stops_only_what_uses_it(content: bytes, user_folder: Path, capsys: pytest.CaptureFixture[str]):
    broken = user_folder / "experiment" / "broken.yaml"
    broken.write_bytes(content)
    assert compose(["experiment=mine"], [user_folder]).train.steps == 6
    with pytest.raises(ConfigError) as used:
        compose(["experiment=broken"], [user_folder])
    assert used.value.path == f"{broken}:1" and used.value.way_out == "Correct or remove it"
    with pytest.raises(ConfigError, match=r"^experiment: none\. No file"):  # which looks for the name in all files
        compose(["experiment=none"], [user_folder])
    assert main(["list", "experiments", "mine", "--config-dir", str(user_folder)]) == 0
    assert capsys.readouterr() == ("  mine\n", f"{used.value}\n")
    assert main(["list", "experiments", "--config-dir", str(user_folder)]) == 0
    listed = capsys.readouterr()
    assert "broken" not in listed.out and "  mine" in listed.out and listed.err == f"{used.value}\n"


def test_an_experiment_in_a_folder_named_study_is_no_study(user_folder: Path, capsys: pytest.CaptureFixture[str]):
    (user_folder / "experiment/study").mkdir()
    (user_folder / "experiment/study/mine.yaml").write_text("# @package _global_\noptim: {lr: 1.0e-3}\n")
    assert main(["list", "experiments", "--config-dir", str(user_folder)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "told"), [(b"claim: [\n", "study/broken.yaml:2: "), (b"# Unfinished.\nclaim: x\n", ": paper: Not set.")]
)
def test_a_broken_study_is_listed_apart_with_its_error(content: bytes, told: str, user_folder: Path, capsys: pytest.CaptureFixture[str]):
    (user_folder / "study").mkdir()
    (user_folder / "study/broken.yaml").write_bytes(content)
    assert main(["list", "studies", "--config-dir", str(user_folder)]) == 0
    listed = capsys.readouterr()
    assert "broken" not in listed.out and "  gap " in listed.out and told in listed.err and listed.err.count("\n") == 1


def test_what_is_no_file_hides_no_other_error(user_folder: Path):
    (user_folder / "experiment" / "dangling.yaml").symlink_to("nothing")
    (user_folder / "experiment" / "folder.yaml").mkdir()
    (user_folder / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults: [none]\n")
    with pytest.raises(ConfigError, match=r"^experiment: none in .*/mine\.yaml:2\. No file"):
        compose(["experiment=mine"], [user_folder])


def test_a_file_of_the_user_may_not_hide_a_shipped_one(user_folder: Path):
    (user_folder / "experiment" / "quickstart.yaml").write_text("# @package _global_\n")
    with pytest.raises(ConfigError, match="has the same name.*Rename"):
        compose(["experiment=quickstart"], [user_folder])


def test_a_missing_folder_of_the_user_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="Must be a folder laid out like conf/"):
        compose(["experiment=quickstart"], [tmp_path / "none"])
