"""Wrong names of tasks are told before a run starts, from the text of lm-eval's files alone."""

import sys
from pathlib import Path

import pytest

from launch.extras import check_extras
from ngpt.config import ConfigError, compose

FILES = {
    "hellaswag/hellaswag.yaml": "tag:\n  - multiple_choice_tasks\ntask: hellaswag\ndoc_to_text: a question about arc\n",
    "arc/arc_easy.yaml": "include: _arc_yaml\ntask: arc_easy\n",
    "arc/_arc_yaml": "tag: [ai2_arc, science]\n",  # a template, whose keys its tasks have
    "mmlu/_mmlu.yaml": 'group: "mmlu"\ntask: [mmlu_stem]\n',
}


@pytest.fixture
def lm_eval(tmp_path, monkeypatch) -> Path:
    """An installation that cannot be imported, but read."""
    package = tmp_path / "site" / "lm_eval"
    for name, text in FILES.items():
        (package / "tasks" / name).parent.mkdir(parents=True, exist_ok=True)
        (package / "tasks" / name).write_text(text)
    (package / "__init__.py").write_text("raise AssertionError('it takes half a minute')")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    return package


def check(*words: str) -> None:
    check_extras(compose(["experiment=ngpt_tiny", *words]))


@pytest.mark.parametrize("name", ["ngpt", "ngpt_cloze", "hellaswag", "arc_easy", "ai2_arc", "science", "multiple_choice_tasks", "mmlu"])
def test_tasks_tags_and_groups_that_exist_pass(lm_eval, name):
    check(f"train.eval_tasks=[ngpt_copying,{name}]")


@pytest.mark.parametrize(
    ("name", "meant"), [("hellaswagg", "hellaswag"), ("hellaswa", "hellaswag"), ("ngpt_cloz", "ngpt_cloze"), ("zzz", None)]
)
def test_a_task_that_does_not_exist_is_told_with_the_nearest(lm_eval, name, meant):
    with pytest.raises(ConfigError) as caught:
        check(f"train.eval_tasks=[ngpt,{name}]")
    assert (caught.value.path, caught.value.got) == ("train.eval_tasks", name)
    assert caught.value.way_out == (f"Did you mean {meant}?" if meant else "`lm_eval ls tasks` lists lm-eval's")


def test_tasks_of_the_users_are_found_and_a_folder_that_is_none_is_told(lm_eval, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "x.yaml").write_text("task: my_task\n")
    check("train.eval_tasks=[my_task]", f"train.eval_tasks_include=[{tmp_path / 'own'}]")
    with pytest.raises(ConfigError, match=r"^train\.eval_tasks_include: .*must be a folder"):
        check("train.eval_tasks=[my_task]", f"train.eval_tasks_include=[{tmp_path / 'none'}]")
