"""`ngpt generate`: weights straight from a checkpoint, caches, batches, sampling, ends, folders of others, and the command line."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from launch import cli
from launch import generate as command
from ngpt.config import ConfigError, compose
from ngpt.config.one_process import run_checkpoint, run_config
from ngpt.data.tokenizers import BytesTokenizer
from ngpt.hf import load
from ngpt.hf.configuration_ngpt import NGPTConfig
from ngpt.hf.export import Options, write_folder
from ngpt.hf.generate import Draw, Settings, Watch, continuation_text, continue_texts, prompt_ids, window_note
from ngpt.hf.load import TextModel, load_run, open_folder, open_run
from ngpt.hf.modeling_ngpt import STORED, NGPTForCausalLM
from ngpt.hf.targets import target_of

ROOT = Path(__file__).resolve().parents[3]
DEPTHS = "model.layer_pattern='ME*E-/E'"
EXPERIMENTS = {"dense": "ngpt_tiny", "hybrid": "ngpt_hybrid_tiny"}
PROMPTS = ["The history of", "", "a", "normalised transformers, ünïcode"]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
LONG, GREEDY = Settings(tokens=64), Settings(tokens=24)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of every kind of layer, in bf16 with fp32 masters, and with a prediction depth."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    words = ["experiment=ngpt_hybrid_tiny", "precision=bf16", DEPTHS, "train.steps=2", "train.eval_steps=0", f"run.dir={folder}"]
    done = subprocess.run([sys.executable, "-m", "launch.cli", "train", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    return export(run, tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module", params=EXPERIMENTS)
def source(request) -> TextModel:
    return random_source(EXPERIMENTS[request.param])


@pytest.fixture(scope="module")
def dense() -> TextModel:
    return random_source("ngpt_tiny")


def random_source(experiment: str) -> TextModel:
    """A model of random weights, whose scales differ from each other, behind a tokenizer of bytes; nothing ends its documents."""
    torch.manual_seed(1)
    model = NGPTForCausalLM(NGPTConfig(**target_of(compose([f"experiment={experiment}"]), in_tree=False).config)).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.rpartition(".")[2] in STORED:
                param.mul_(0.5 + 2 * torch.rand_like(param))
    tokenizer = BytesTokenizer()
    return TextModel(model, 256, frozenset(), lambda text: tokenizer.encode(text).tolist(), tokenizer.decode, window=4096)


def export(run: Path, folder: Path, dtype: str = "float32", start: bool = True) -> Path:
    cfg = run_config(run)
    write_folder(cfg, run_checkpoint(cfg), Options(dtype=dtype, tokenizer=False), folder)
    return write_bytes_tokenizer(folder, start)


def write_bytes_tokenizer(folder: Path, start: bool = True) -> Path:
    """Bytes, and 256 for an end of document, which begins texts by itself if `start`."""
    backend = Tokenizer(models.BPE({character: byte for byte, character in bytes_to_unicode().items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    if start:
        backend.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 256)])
    backend.save(str(folder / "tokenizer.json"))
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "split_special_tokens": True, **ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tokens_of(source: TextModel, prompts: list[str], settings: Settings, monkeypatch) -> tuple[list[list[int]], list[torch.Tensor]]:
    """New tokens of each prompt, and the logits [B, V] that each step chose from."""
    watches, logits = [], []

    class Kept(Watch):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            watches.append(self)

    monkeypatch.setattr("ngpt.hf.generate.Watch", Kept)
    hook = source.model.register_forward_hook(lambda _module, _args, outputs: logits.append(outputs.logits[:, -1]))
    continue_texts(source, prompts, settings)
    hook.remove()
    return watches[0].new, logits


def texts(source: TextModel, prompts: list[str], settings: Settings) -> list[str]:
    return [made.text for made in continue_texts(source, prompts, settings)[0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_gives_the_weights_of_its_export_bit_for_bit(run, tmp_path, dtype):
    cfg = run_config(run)
    ours = load_run(cfg, run_checkpoint(cfg), load.DTYPES[dtype])
    theirs = NGPTForCausalLM.from_pretrained(export(run, tmp_path, dtype))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert ours.state_dict()[name].dtype == tensor.dtype and torch.equal(ours.state_dict()[name], tensor), name
    assert not ours.training and not [name for name in ours.state_dict() if name.startswith("mtp.")]
    assert ours.lm_head.weight.dtype == load.DTYPES[dtype] and ours.logit_scale.dtype == torch.float32


def test_tied_embeddings_stay_one_tensor(run):
    cfg = run_config(run)
    cfg.model.tied_embeddings = True  # the checkpoint's output matrix is then not asked for
    model = load_run(cfg, run_checkpoint(cfg))
    assert model.lm_head.weight is model.model.embeddings.weight


def test_weights_of_another_shape_are_refused(run):
    cfg = run_config(run)
    choice = run_checkpoint(cfg)
    cfg.model.mamba_num_heads *= 2
    with pytest.raises(ConfigError, match="model.layers.0.mixer.*has shape.*config has"):
        load_run(cfg, choice)


def test_cached_and_uncached_decoding_give_the_same_tokens_and_logits(source, monkeypatch):
    cached, with_cache = tokens_of(source, PROMPTS[:1], LONG, monkeypatch)
    plain, without = tokens_of(source, PROMPTS[:1], replace(LONG, use_cache=False), monkeypatch)
    assert cached == plain and len(cached[0]) == 64 == len(with_cache) == len(without)
    assert len(set(cached[0])) > 3
    assert max((one - other).abs().max().item() for one, other in zip(with_cache, without, strict=True)) < 1e-5


def test_the_cache_is_used_unless_it_is_not_wanted(source):
    lengths: list[int] = []

    def note(_module, _args, kwargs) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    hook = source.model.register_forward_pre_hook(note, with_kwargs=True)
    for use_cache in (True, False):
        continue_texts(source, ["abc"], Settings(tokens=3, use_cache=use_cache))
    hook.remove()
    assert lengths == [4, 1, 1, 4, 5, 6]


def test_a_batch_of_several_lengths_equals_one_by_one(source, monkeypatch):
    together, _ = tokens_of(source, PROMPTS, GREEDY, monkeypatch)
    assert together == [tokens_of(source, [prompt], GREEDY, monkeypatch)[0][0] for prompt in PROMPTS]
    assert len({tuple(row) for row in together}) == len(PROMPTS)


def test_sampled_text_follows_from_seed_and_number_whatever_the_batch(source):
    sampling = Settings(tokens=24, temperature=1.5, seed=3)
    together = texts(source, PROMPTS, sampling)
    assert together == texts(source, PROMPTS, sampling)
    alone = [continue_texts(source, [prompt], sampling, first=number)[0][0].text for number, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert together != texts(source, PROMPTS, replace(sampling, seed=100))
    assert len(set(texts(source, ["a", "a"], sampling))) == 2


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_sampling_from_the_most_probable_token_is_greedy(dense, narrow):
    sampling = Settings(**{"tokens": 24, "temperature": 2.0, "seed": 5} | narrow)
    assert texts(dense, PROMPTS, sampling) == texts(dense, PROMPTS, GREEDY)
    assert texts(dense, PROMPTS, Settings(tokens=24, temperature=2.0, seed=5)) != texts(dense, PROMPTS, GREEDY)


def test_tokens_are_drawn_by_their_probability():
    rows, wanted = 4000, torch.tensor([0.0, 0.5, 0.3, 0.0, 0.2, 0.0])
    drawn = Draw(range(rows))(torch.zeros(rows, 1), wanted.log().expand(rows, -1))
    share = drawn.argmax(-1).bincount(minlength=6) / rows
    assert (share[wanted == 0] == 0).all()
    assert ((share - wanted).abs() <= 4 * (wanted * (1 - wanted) / rows).sqrt()).all()
    assert (drawn == 0).sum(-1).eq(1).all() and drawn.isinf().sum(-1).eq(5).all()


def test_the_smallest_random_number_draws_no_token_of_probability_0(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, **_: torch.zeros(*size, dtype=dtype))
    assert Draw([0])(torch.zeros(1, 1), torch.tensor([[0.0, 0.5, 0.5]]).log()).argmax().item() == 1


def test_an_end_of_document_ends_a_row_alone_and_is_no_text(source, monkeypatch):
    free, _ = tokens_of(source, PROMPTS, GREEDY, monkeypatch)
    end = next(token for token in free[0][3:] if token not in free[1])
    place = free[0].index(end)
    ending = replace(source, ends=frozenset([end]))
    first, second, *_ = continue_texts(ending, PROMPTS, GREEDY)[0]
    assert (first.tokens, first.stopped_by) == (place + 1, "end_of_document")
    assert first.text == source.decode(free[0][:place])
    assert (second.tokens, second.stopped_by, second.text) == (24, "tokens", source.decode(free[1]))


def test_a_stop_string_ends_before_it_and_only_in_new_text(source):
    prompt, other = PROMPTS[0], PROMPTS[3]
    free, rest = texts(source, [prompt, other], LONG)
    place = next(i for i in range(4, 60) if free.find(free[i : i + 2]) == i and free[i : i + 2] not in rest)
    stop = free[place : place + 2]
    settings = replace(LONG, stops=("no such text", stop, prompt))
    first, second = continue_texts(source, [prompt, other], settings)[0]
    assert (first.text, first.stopped_by) == (free[:place], "stop") and first.tokens < 64
    assert (second.text, second.tokens, second.stopped_by) == (rest, 64, "tokens")


def test_a_document_starts_once_and_text_without_tokens_is_refused(dense):
    assert prompt_ids(dense, "ab") == [256, 97, 98] and prompt_ids(dense, "") == [256]
    with pytest.raises(ConfigError, match="no tokens"):
        prompt_ids(replace(dense, start=None), "")
    with pytest.raises(ConfigError, match="no text.*UTF-8"):
        prompt_ids(dense, "\udcff")
    with pytest.raises(ConfigError, match="token 257.*vocabulary has 257"):
        prompt_ids(replace(dense, encode=lambda text: [257]), "a")


def test_new_text_keeps_the_space_that_a_tokenizer_drops_where_text_begins(dense):
    words = {1: " one", 2: " two"}
    spaced = replace(dense, ends=frozenset([256]), decode=lambda ids: "".join(words[i] for i in ids).lstrip())
    assert continuation_text(spaced, [256, 1], [2, 256]) == " two"


def test_beyond_the_trained_length_is_a_note(dense):
    short = replace(dense, window=8)
    assert window_note(short, ["abc", "a"], 4) is None
    assert "up to 9 tokens, and training had 8" in window_note(short, ["a", "abc"], 5)
    assert window_note(replace(dense, window=None), ["abc"], 10**9) is None
    assert len(continue_texts(short, ["abc"], Settings(tokens=20))[0][0].text) > 0


@pytest.mark.parametrize("start", [True, False])
def test_an_exported_folder_gives_the_text_of_its_run(run, tmp_path, start):
    """Also where its tokenizer leaves the start of documents to others: there is exactly one."""
    ours, theirs = open_run(run), open_folder(export(run, tmp_path, start=start))
    assert [prompt_ids(theirs, prompt) for prompt in PROMPTS] == [prompt_ids(ours, prompt) for prompt in PROMPTS]
    assert prompt_ids(theirs, "<|end|>") == [256, *b"<|end|>"]
    assert continue_texts(theirs, PROMPTS, GREEDY)[0] == continue_texts(ours, PROMPTS, GREEDY)[0]
    assert (theirs.ends, theirs.window, theirs.notes) == (ours.ends, ours.window, ours.notes)


def test_a_class_of_transformers_is_opened_and_its_own_defaults_are_not_asked(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=256, eos_token_id=[255, 254])).eval()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.eos_token_id = [255, 254]
    model.save_pretrained(tmp_path)
    source = open_folder(write_bytes_tokenizer(tmp_path))
    assert source.ends == {254, 255, 256}
    ids = [256, *b"Hello"]
    with torch.no_grad():
        for _ in range(24):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    made = continue_texts(replace(source, ends=frozenset()), ["Hello"], GREEDY)[0][0]
    assert made.text == source.decode(ids[6:]) and made.tokens == 24


def test_code_in_a_folder_is_not_run(exported, tmp_path):
    marker = tmp_path / "marker"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    ours, foreign = (tmp_path / name for name in ("ours", "foreign"))
    for folder in (ours, foreign):
        folder.mkdir()
        for path in exported.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "modeling_ngpt.py").write_text(code)
    assert "modeling_ngpt.py is of another version" in open_folder(ours).notes[0]
    config = json.loads((foreign / "config.json").read_text()) | {"model_type": "another", "architectures": ["Another"]}
    (foreign / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="without code of the folder"):
        open_folder(foreign)
    assert not marker.exists()


def test_a_folder_without_some_weights_is_refused_not_filled_up(exported, tmp_path):
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="no lm_head.weight"):
        open_folder(tmp_path)


# ---- The command line ----


def called(*arguments: object, stdin: bytes | None = None, monkeypatch=None) -> int:
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False))
    return cli.main(["generate", *map(str, arguments)])


def test_prompts_come_in_three_ways_and_json_tells_all(run, tmp_path, capsys, monkeypatch):
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("one\n\n two\n")
    objects.write_text('{"prompt": "one"}\n{"prompt": " two", "more": 1}\n')
    common = [run, "--tokens", 5, "--greedy", "--json", "--device", "cpu"]
    assert called(*common, "--prompt", "one", "--prompt", " two") == 0
    shown = capsys.readouterr()
    told = [json.loads(line) for line in shown.out.splitlines()]
    assert [(each["prompt"], each["tokens"], each["stopped_by"]) for each in told] == [("one", 5, "tokens"), (" two", 5, "tokens")]
    assert "prefill" in shown.err and "decoding" in shown.err and "tokens/s" in shown.err
    assert [each["text"] for each in told] == texts(open_run(run), ["one", " two"], Settings(tokens=5))
    ways = [(["--file", lines], b""), (["--file", objects], b""), ([], b"one\r\n two"), (["--file", "-", "--batch-size", 1], b"one\n two")]
    for more, stdin in ways:
        assert called(*common, *more, stdin=stdin, monkeypatch=monkeypatch) == 0
        assert capsys.readouterr().out == shown.out


def test_people_see_prompt_and_continuation_and_a_terminal_obeys_nothing(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert called(run, "--tokens", 40, "--greedy") == 0
    shown = capsys.readouterr()
    assert shown.out == texts(open_run(run), [""], Settings(tokens=40))[0] + "\n"
    assert "note: up to 41 tokens, and training had 32" in shown.err
    assert command.printable("a\x1b[2J\x9b\n\tü\u202e") == "a.[2J.\n\tü."


def test_sample_is_a_short_form_that_keeps_its_text(run, capsys):
    assert cli.main(["sample", str(run), "--prompt", "Hello", "--tokens", "7"]) == 0
    sampled = capsys.readouterr().out
    assert (run / "sample.txt").read_text() + "\n" == sampled and sampled.startswith("Hello")
    assert called(run, "--prompt", "Hello", "--tokens", 7, "--temperature", 0.8, "--seed", 0) == 0
    assert capsys.readouterr().out == sampled


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "0"], "--tokens: 0. It is at least 1"),
        (["--tokens", "-5"], "--tokens: -5"),
        (["--tokens", "100000000000"], "--tokens: 100000000000. It is at most 1,000,000"),
        (["--seed", "-1"], "--seed: -1"),
        (["--seed", str(2**63)], "--seed: "),
        (["--top-k", "0"], "--top-k: 0"),
        (["--top-p", "1.5"], "--top-p: 1.5"),
        (["--top-p", "nan"], "--top-p: nan"),
        (["--temperature", "0"], "--temperature: 0.0. It is above 0. Set --greedy"),
        (["--temperature", "inf"], "--temperature: inf"),
        (["--batch-size", "0"], "--batch-size: 0"),
        (["--step", "-1"], "--step: -1"),
        (["--prompt", "a", "--step", "7"], "--step: 7. There are checkpoints of 2"),
        (["--greedy", "--temperature", "1"], "--temperature: 1.0. It is of sampling"),
        (["--greedy", "--top-k", "3"], "--top-k: 3. It is of sampling"),
        (["--stop", ""], "--stop: an empty text"),
        (["--prompt", "a", "--file", "b"], "--file: b. Prompts come from"),
        (["--file", "no_such_file"], "--file: no_such_file. No such file or directory. Give a file of prompts"),
        (["--file", "latin.txt"], "latin.txt: "),
        (["--file", "empty.txt"], "empty.txt: no line with text"),
        (["--file", "wrong.jsonl"], 'wrong.jsonl:2: {"text": 1}. Each line'),
        (["--file", "-"], "stdin: no line with text"),
        ([], "stdin: no line with text"),
        pytest.param(["--prompt", "a", "--device", "cuda"], "--device: cuda", marks=NO_GPU),
    ],
)
def test_a_wrong_option_is_one_line(run, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("ü".encode("latin-1"))
    Path("empty.txt").write_text(" \n\n")
    Path("wrong.jsonl").write_text('{"prompt": "a"}\n{"text": 1}\n')
    assert called(run, *arguments, stdin=b"", monkeypatch=monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(words) and shown.err.count("\n") == 1


def test_a_wrong_folder_is_one_line(run, exported, tmp_path, capsys):
    bare, damaged, untaught = (tmp_path / name for name in ("bare", "damaged", "untaught"))
    for folder in (bare, damaged, untaught):
        folder.mkdir()
    (damaged / "config.json").write_text("{")
    for path in exported.iterdir():
        if "token" not in path.name:
            (untaught / path.name).write_bytes(path.read_bytes())
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    cases = {
        tmp_path / "none": "no config.yaml and no config.json",
        bare: "no config.yaml and no config.json",
        young: "no finished checkpoint",
        damaged: "JSON",
        untaught: "its tokenizer",
    }
    for folder, words in cases.items():
        assert called(folder, "--prompt", "a") == 2
        shown = capsys.readouterr()
        assert words in shown.err and str(folder) in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert called(exported, "--prompt", "a", "--step", 2) == 2
    assert "--step: 2" in capsys.readouterr().err
    assert cli.main(["sample", str(exported)]) == 2
