"""`ngpt generate` and `ngpt sample`: continues texts in this process. Needs torch and transformers, but no Megatron."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngpt.config.errors import ConfigError
from ngpt.config.one_process import run_config

from .arguments import DTYPES
from .commands.generate import BATCH, TEMPERATURE, add_arguments
from .models import device_of, is_run, quiet_transformers

if TYPE_CHECKING:
    from ngpt.hf.generate import Settings
    from ngpt.hf.load import TextModel

MAX_TOKENS = 1_000_000
SAMPLE_FILE = "sample.txt"
STDIN = "-"


def generate(options: argparse.Namespace) -> int:
    """Prints each prompt with its continuation, and the speed on stderr.

    Args:
        options: as launch/commands/generate.py reads them.

    Raises:
        ConfigError: an option, a prompt, the folder or the checkpoint is invalid.
    """
    _check(options)
    run = is_run(options.path, options.step)
    prompts = _prompts(options)
    source = _opened(options, run)
    _run(source, prompts, _settings(options), options.batch_size, options.json)
    return 0


def sample(run_dir: Path, prompt: str, tokens: int) -> int:
    """Prints a prompt and its continuation by a run's newest checkpoint, and keeps both as sample.txt in the run folder.

    Raises:
        ConfigError: `run_dir` is not a run folder, it has no checkpoint, or `tokens` is out of bounds.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args([str(run_dir), "--tokens", str(tokens)])
    _check(options)
    run_config(run_dir)  # raises for an exported folder, which is not a run
    source = _opened(options, run=True)
    (text,) = _run(source, [prompt], _settings(options), BATCH, as_json=False)
    (run_dir / SAMPLE_FILE).write_text(text, encoding="utf-8")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for meaningless options, before anything heavy is imported."""
    bounds = {"tokens": 1, "batch_size": 1, "top_k": 1, "seed": 0, "step": 0}
    for name, least in bounds.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}", value, f"It is at least {least}", "Give such a number, or leave it out")
    if options.tokens > MAX_TOKENS:
        rule = f"It is at most {MAX_TOKENS:,}: each token is kept, with its place in the cache of attention"
        raise ConfigError("--tokens", options.tokens, rule, "Give a smaller number")
    if options.seed >= 2**63:
        raise ConfigError("--seed", options.seed, "It is below 2^63", "Give a smaller number")
    if options.temperature is not None and not 0 < options.temperature < float("inf"):
        raise ConfigError("--temperature", options.temperature, "It is above 0", "Set --greedy for the most probable token")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ConfigError("--top-p", options.top_p, "It is a probability above 0, at most 1", "Give such a number, or leave it out")
    for name in ("temperature", "top_k", "top_p"):
        if options.greedy and (value := getattr(options, name)) is not None:
            rule = "It is of sampling, and --greedy takes the most probable token"
            raise ConfigError(f"--{name.replace('_', '-')}", value, rule, "Leave one of both out")
    if "" in options.stop:
        raise ConfigError("--stop", "an empty text", "It would end every text before it begins", "Leave it out")
    if options.prompt is not None and options.file is not None:
        raise ConfigError("--file", options.file, "Prompts come from --prompt or from --file", "Leave one of both out")


def _prompts(options: argparse.Namespace) -> list[str]:
    """The prompts in order; a single empty one if none is given and nothing is piped into stdin."""
    if options.prompt is not None:
        return options.prompt
    name = options.file
    if name is None:
        if sys.stdin is None or sys.stdin.isatty():
            return [""]
        name = STDIN
    path = "stdin" if name == STDIN else name
    try:
        content = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    except OSError as error:
        raise ConfigError("--file", name, str(error.strerror), "Give a file of prompts, one a line") from None
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(path, error, "Prompts are UTF-8 text", "Convert the file") from error
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ConfigError(path, "no line with text", "There must be a prompt", "Give --prompt '' to begin at the start of a document")
    return [_prompt_of(path, number, line) if name.endswith(".jsonl") else line for number, line in numbered]


def _prompt_of(path: str, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise ConfigError(f"{path}:{number}", line[:60], 'Each line is an object {"prompt": TEXT}', "Correct the line")
    return prompt


def _opened(options: argparse.Namespace, run: bool) -> "TextModel":
    """Prints notes about the model, then returns it on its device."""
    from ngpt.hf.load import open_folder, open_run

    quiet_transformers()
    device = device_of(options.device)
    if run:
        source = open_run(options.path, options.step, options.dtype or DTYPES[0], device)
    else:
        source = open_folder(options.path, options.dtype, device)
    for note in source.notes:
        print(note, file=sys.stderr)
    return source


def _settings(options: argparse.Namespace) -> "Settings":
    from ngpt.hf.generate import Settings

    return Settings(
        tokens=options.tokens,
        temperature=None if options.greedy else TEMPERATURE if options.temperature is None else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stops=tuple(options.stop),
        use_cache=options.cache,
    )


def _run(source: "TextModel", prompts: Sequence[str], settings: "Settings", batch_size: int, as_json: bool) -> list[str]:
    """Prints continuations as they are made, and returns prompts and continuations as texts."""
    from ngpt.hf.generate import Speed, continue_texts, window_note

    note = window_note(source, prompts, settings.tokens)  # reads all prompts, so an invalid one ends here
    if note is not None:
        print(note, file=sys.stderr, flush=True)
    speed, texts = Speed(), []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        made, took = continue_texts(source, batch, settings, first)
        speed += took
        for number, continuation in enumerate(made, start=first):
            texts.append(continuation.prompt + continuation.text)
            print(json.dumps(_told(continuation), ensure_ascii=False) if as_json else _shown(texts[-1], number), flush=True)
    print(speed, file=sys.stderr)
    return texts


def _told(continuation: Any) -> dict[str, Any]:
    return {name: getattr(continuation, name) for name in ("prompt", "text", "tokens", "stopped_by")}


def _shown(text: str, number: int) -> str:
    """The text for a person, with an empty line between texts. On a terminal, which would obey control characters, they become dots."""
    return ("\n" if number else "") + (printable(text) if sys.stdout.isatty() else text)


def printable(text: str) -> str:
    return "".join(character if character.isprintable() or character in "\n\t" else "." for character in text)
