"""Completion in the shells themselves: words, groups and options, with folders of the user."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from launch.commands import completion
from ngpt.config.describe import keys
from ngpt.config.folders import options

SECONDS = 60.0  # after which a shell that has not answered has failed
PROMPT = "type> "


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        (folder / shell).write_text(completion.script(shell))
    for name in ("one", "two words"):
        (folder / name / "experiment").mkdir(parents=True)
        (folder / name / "experiment" / f"of_{name[:3]}.yaml").write_text("# @package _global_\n# Mine.\n")
    return folder


def offered(scripts: Path, line: str, **variables: str) -> list[str]:
    """What bash's function offers at the end of a line, as it would be put in place."""
    if shutil.which("bash") is None:
        pytest.skip("no bash on this machine")
    code = f"source {scripts}/bash; COMP_LINE={shlex.quote(line)}; COMP_POINT=${{#COMP_LINE}}; _ngpt; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    environment = {"PATH": os.environ["PATH"], "HOME": str(scripts), **variables}
    done = subprocess.run(["bash", "--norc", "-c", code], cwd=scripts, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split()


def names(group: str) -> list[str]:
    return [option.name for option in options() if option.group == group]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("ngpt tr", ["train"]),
        ("ngpt data pre", ["prepare"]),
        ("ngpt train --conf", ["--config-dir", "--config"]),
        ("ngpt export --dtype b", ["bfloat16"]),
        ("ngpt train --pa", ["--parallel"]),
        ("ngpt launch --mu", ["--multirun"]),
        ("ngpt train -m --parallel 2 train.see", ["train.seed="]),
        ("ngpt config --cf", []),
        ("ngpt train exp", ["experiment="]),
        ("ngpt train experiment=", names("experiment")),
        ("ngpt train experiment=quick", ["quickstart", "quickstart_gpt"]),
        ("ngpt config --json precision=nvfp4_p", ["nvfp4_paper"]),
        ("ngpt train experiment=quickstart parallel=tp2 train.see", ["train.seed="]),
        ("ngpt launch --dry-run optim.be", ["optim.beta1=", "optim.beta2="]),
        ("ngpt estimate model.architecture=", ["ngpt", "gpt"]),
        ("ngpt train debug.deterministic=t", ["true"]),
        ("ngpt train cluster.gpu=nu", ["null"]),
        ("ngpt train train.seed=", []),
        ("ngpt list exp", ["experiments"]),
        ("ngpt list pre", ["precision"]),
        ("ngpt completion z", ["zsh"]),
    ],
)
def test_bash_offers_what_may_stand_there(line, wanted, scripts):
    assert sorted(offered(scripts, line)) == sorted(wanted)


def test_every_key_can_be_completed(scripts):
    found = set(offered(scripts, "ngpt train "))
    assert {f"{key.name}=" for key in keys() if "NAME" not in key.name and "[]" not in key.name} <= found
    assert {f"{option.group}=" for option in options()} <= found


def test_files_of_the_users_folders_are_offered(scripts):
    both = f"{scripts / 'one'}:{scripts / 'two words'}"
    assert offered(scripts, "ngpt train experiment=of_", NGPT_CONFIG_DIR=both) == ["of_one", "of_two"]
    option = "ngpt train --config-dir one experiment=of_"
    assert offered(scripts, option) == offered(scripts, option, NGPT_CONFIG_DIR=str(scripts / "two words")) == ["of_one"]
    assert offered(scripts, "ngpt train --config-dir=one model=of_") == []


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
def test_bashs_part_is_clean():
    subprocess.run(["shellcheck", Path(completion.__file__).with_name("completion.bash")], check=True)


class Terminal:
    """An interactive shell at a terminal."""

    def __init__(self, folder: Path, command: list[str], setup: str):
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb", "NGPT_CONFIG_DIR": str(folder / "one")}
        self.pid, self.stream = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(command[0], command, environment)
        self.type(f"{setup}; PS1='{PROMPT[:3]}''{PROMPT[3:]}'\n")
        self.wait_for(PROMPT)

    def type(self, keys: str) -> None:
        os.write(self.stream, keys.encode())

    def wait_for(self, text: str) -> None:
        """Reads until the text has been shown."""
        shown, end = "", time.monotonic() + SECONDS
        while text not in shown:
            ready, _, _ = select.select([self.stream], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} is not in {shown!r}"
            shown += os.read(self.stream, 4096).decode(errors="replace").replace("\b", "")

    def close(self) -> None:
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        os.close(self.stream)


@pytest.fixture(params=["bash", "zsh"])
def terminal(request, scripts):
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    command = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
    source = {"bash": "source ./bash", "zsh": "autoload -Uz compinit; compinit -u -D; eval \"$(<zsh)\""}[shell]
    opened = Terminal(scripts, command, f"stty cols 200; ngpt() {{ printf '<%s>' \"$@\"; }}; {source}")
    yield opened
    opened.close()


def test_a_line_can_be_typed_with_the_tab_key(terminal):
    """What is typed is what the command gets: readline cuts words at =, and both shells know when to add a space."""
    terminal.type("ngpt tra\texperiment=of_o\tprecision=nvfp4_p\ttrain.see\t7 model.archi\tn\t\n")
    terminal.wait_for("<train><experiment=of_one><precision=nvfp4_paper><train.seed=7><model.architecture=ngpt>")
