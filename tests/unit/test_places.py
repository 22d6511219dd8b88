import os
import sys
from pathlib import Path

import pytest

from ngpt.config.errors import ConfigError
from ngpt.places import check_place


def test_results_go_below_a_folder(tmp_path):
    check_place("--out", tmp_path / "new/folder")
    check_place("--out", tmp_path / "new/results.json", is_file=True)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    check_place("--out", tmp_path / "file", is_file=True)
    for path in ("file", "file/below"):
        with pytest.raises(ConfigError, match=rf"--out: .*{path}\. .*file is not a folder. Name another place"):
            check_place("--out", tmp_path / path)
    with pytest.raises(ConfigError, match="Is a folder, and the result is a file. Name a file in it"):
        check_place("--out", tmp_path, is_file=True)


def test_a_name_that_the_system_refuses_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"--out: .*takes no files: File name too long"):
        check_place("--out", tmp_path / ("n" * 300))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_what_permissions_allow_and_the_kernel_refuses_is_told():
    """Of root, os.access allows all of /proc."""
    with pytest.raises(ConfigError, match=r"--out: /proc/x/y\. /proc takes no files: .*\. Name another place"):
        check_place("--out", Path("/proc/x/y"))
