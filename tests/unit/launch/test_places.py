import pytest

from launch.places import check_place
from ngpt.config.errors import ConfigError


def test_results_go_below_a_folder(tmp_path):
    check_place("--out", tmp_path / "new/folder/results.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .*file/below. .*file: is not a folder. Name another place"):
        check_place("--out", tmp_path / "file/below")
