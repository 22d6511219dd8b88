"""`ngpt analyze`: a whole call on an exported folder, what is kept, and what is refused before torch is waited for."""

import json
from pathlib import Path

import pytest
from small_models import model_of

from launch.cli import main
from ngpt.config import ConfigError, compose, dump
from ngpt.data.tokenizers import BytesTokenizer
from ngpt.evaluation.split import sequences
from ngpt.hf.tokenizer import write_tokenizer
from ngpt.model_analysis import results
from ngpt.model_analysis.text import read_text

OPTIONS = {"splits": ["data/x/valid"], "length": 32, "tokens": 64, "recipe": "nvfp4_nvidia", "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An exported model, and prepared text beside it."""
    folder = tmp_path_factory.mktemp("analyze")
    texts = [" ".join(f"{number}.{place} wizards jump" for place in range(1 + number % 7)) for number in range(120)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--out", str(folder / "data"), "--tokenizer", "bytes", "--split", "40,60,0", "--workers", "1"]
    assert main(["data", "prepare", str(folder / "texts.jsonl"), *arguments]) == 0
    model = model_of("ngpt_tiny")
    model.save_pretrained(folder / "exported")
    write_tokenizer(BytesTokenizer(), folder / "exported", 32)
    return folder


def run_folder(tmp_path: Path, *words: str) -> Path:
    """A run that has a config and no checkpoint."""
    path = tmp_path / "run"
    path.mkdir()
    dump(compose(["experiment=ngpt_tiny", f"run.dir={path}", *words]), path / "config.yaml")
    return path


def told(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["analyze", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_folder_is_measured_and_kept_with_what_it_is_of(folder, tmp_path, capsys):
    out = tmp_path / "ptq.json"
    words = [folder / "exported", "--what", "ptq", "--split", folder / "data/valid", "--tokens", 100, "--out", out, "--device", "cpu"]
    code, shown, said = told(capsys, *words)
    assert code == 0 and "both_16x16" in shown and f"kept in {out}" in said
    found = json.loads(out.read_text())
    assert found["tokens"] == 96 and found["options"]["splits"] == [str(folder / "data/valid")] and found["results"]["sequences"] == 3
    assert found["options"]["quantisers"].startswith("input dynamic amax") and "definition" in found and found["versions"]["torch"]
    code, again, said = told(capsys, *words)
    assert (code, again) == (0, shown) and "has the same request already" in said
    code, _, said = told(capsys, *words, "--seed", 1)
    assert code == 2 and "Kept results have seed=0, and seed=1 was asked for" in said
    code, _, said = told(capsys, *[64 if word == 100 else word for word in words])
    assert code == 2 and "Kept results are of 96 tokens, and 64 were asked for" in said


def test_text_is_whole_sequences_of_an_evaluation_each_once(folder):
    prefix = str(folder / "data/valid")
    there = {tuple(sequence.tolist()) for sequence in sequences(prefix, 32, seed=5)}
    text = read_text([prefix], 32, 20, seed=5)
    taken = [tuple(row) for row in text.ids_NS.tolist()]
    assert len(set(taken)) == 20 and set(taken) < there and text.tokens == 640
    assert taken != [tuple(sequence.tolist()) for sequence, _ in zip(sequences(prefix, 32, seed=5), range(20), strict=False)]
    split = json.loads((folder / "data/manifest.json").read_text())["splits"]["valid"]
    assert text.bits_per_nat == pytest.approx(split["tokens"] / split["bytes_of_text"] * 1.4426950408889634)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--what", "snrs"], "--what: snrs. There is no such analysis. Did you mean snr? "),
        (["--what", "ptq"], "no finished checkpoint"),
        (["--what", "ptq", "--tokens", "0"], "--tokens: 0. It is at least 1"),
        (["--what", "flatness", "--radii", "0.5"], "--radii: 0.5. They are numbers above 0, one at least up to 0.1"),
        (["--what", "ptq,snr", "--out", "x.json"], "--out: x.json. It is the file of one analysis"),
        (["--what", "ptq", "--name", "a/b"], "--name: a/b. It is part of a file's name"),
    ],
)
def test_wrong_words_are_told(words, expected, tmp_path, capsys):
    code, _, said = told(capsys, run_folder(tmp_path), *words)
    assert code == 2 and expected in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "is no run, whose text that could be"),
        (["--split", "SPLIT"], "is no run, which keeps results"),
        (["--split", "SPLIT", "--json", "--recipe", "nvfp4_nvida"], "--recipe: nvfp4_nvida. "),
        (["--split", "SPLIT", "--json", "--recipe", "nvfp4_nvida"], "Did you mean nvfp4_nvidia"),
        (["--split", "SPLIT", "--json", "--recipe", "bf16"], "Its format is none, and analyses quantise to nvfp4"),
        (["--split", "SPLIT", "--json", "--tokens", "10000000"], "sequences of 32 tokens. Ask for less"),
        (["--split", "SPLIT", "--json", "--tokens", "32"], "ptq needs 2 sequences of 32 tokens for an interval"),
    ],
)
def test_what_a_folder_cannot_answer_is_told(words, expected, folder, capsys):
    words = [str(folder / "data/valid") if word == "SPLIT" else word for word in words]
    code, _, said = told(capsys, folder / "exported", "--what", "ptq", *words)
    assert code == 2 and expected in said


def test_mock_data_is_no_held_out_text(tmp_path):
    from launch import analyze

    run = run_folder(tmp_path)
    options = analyze.argparse.Namespace(split=[])
    subject = analyze.Subject(run, compose(["experiment=ngpt_tiny"]), 4, 32)
    with pytest.raises(ConfigError, match=r"mock data\. The run has no text that could be read\. Name a prefix"):
        analyze._splits(options, subject)


def test_the_list_names_analyses_and_what_is_kept(tmp_path, capsys):
    run = run_folder(tmp_path)
    path = results.path_of(run, "snr", "mine", 250)
    path.parent.mkdir()
    path.write_text(json.dumps({"what": "snr", "step": 250, "options": OPTIONS}))
    (path.parent / "ptq_iter_0000250.json").write_text("{")
    code, shown, _ = told(capsys, run)
    assert code == 0 and "curvature" in shown and f"kept: {path} (snr, step 250, 64 tokens, nvfp4_nvidia)" in shown
    assert path.name == "snr_mine_iter_0000250.json" and shown.count("kept:") == 1


def test_kept_results_are_only_replaced_by_more_of_the_same(tmp_path):
    path = tmp_path / "x.json"
    assert results.kept(path, OPTIONS) is None
    path.write_text(json.dumps({"options": OPTIONS, "results": 1}))
    assert results.kept(path, OPTIONS) == {"options": OPTIONS, "results": 1}
    assert results.kept(path, OPTIONS | {"tokens": 128}) is None
    for other in ({"tokens": 32}, {"seed": 1}, {"radii": [0.1]}):
        with pytest.raises(ConfigError, match="it exists"):
            results.kept(path, OPTIONS | other)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="no result of ngpt analyze"):
        results.kept(path, OPTIONS)
