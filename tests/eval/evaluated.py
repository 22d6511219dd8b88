"""What tests of evaluation share: the command, tasks of every kind, a run's overrides."""

import json
import random
import subprocess
from pathlib import Path

import torchrun

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box in old towns".split()
# One task for each kind of request, over the same documents.
TASK = """
task: {name}
tag: every_kind
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
metadata: {{version: 1.0}}
"""
KINDS = {
    "multiple_choice": """
doc_to_text: '{{text}}'
doc_to_choice: '{{choices}}'
doc_to_target: 1
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]
""",
    "loglikelihood": """
doc_to_text: '{{text}}'
doc_to_target: '{{choices[0]}}'
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "loglikelihood_rolling": """
doc_to_text: ''
doc_to_target: '{{long}}'
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "generate_until": """
doc_to_text: '{{text}}'
doc_to_target: '{{choices[0]}}'
generation_kwargs: {until: [e], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}, {metric: chrf}]
""",
}


def ngpt(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Runs a command that must succeed."""
    done = torchrun.ngpt(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def write_tasks(folder: Path) -> None:
    """Task files of every kind, `kind_<output type>` with the tag `every_kind`; texts of one to many windows of the model."""
    folder.mkdir()
    rng, lines = random.Random(11), []
    for number in range(13):
        words = rng.choices(WORDS, k=120)
        text = " ".join(words[: 2 + number])
        choices = [words[20], words[21] + " " + words[22], words[20][:1]]
        lines.append({"text": text, "choices": choices, "long": " ".join(words[: 5 + 9 * number])})
    lines[3]["text"] = ""  # the model then continues the start of a document
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind, rest in KINDS.items():
        (folder / f"{kind}.yaml").write_text(TASK.format(name=f"kind_{kind}", data=data, kind=kind) + rest + "\n")


def training(experiment: str) -> list[str]:
    """Overrides of a run on the prepared text."""
    return [
        f"experiment={experiment}",
        *("data.mock=false", "data.train=[{path: data/small/train}]", "data.valid=[{path: data/small/valid}]", "tokenizer=bytes"),
        *("model.vocab_size=257", "train.seq_length=64", "train.eval_whole_split=true", "train.eval_interval=20", "optim.lr=1e-2"),
    ]
