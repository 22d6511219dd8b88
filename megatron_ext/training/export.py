"""`ngpt export` with a comparison: writes a folder beside its final place, compares it with the trainer, and gives it its name."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from megatron_ext.training import parity
from megatron_ext.training.parity import Parity
from megatron_ext.training.run import megatron_log
from ngpt.checkpoints.choice import Choice, folder_of
from ngpt.config import Config, ConfigError
from ngpt.config.one_process import run_config
from ngpt.data.indexed import IndexedReader
from ngpt.files import new_folder
from ngpt.hf import export

SEQUENCES, LENGTH = 4, 128  # of the text that both models read: how many, and tokens of each
SEED = 0
ROOM = 1.25  # times what two fp32 models and their logits take must be free for both to be held whole


@dataclass(frozen=True)
class Request:
    """What to export, where to, and how; see `ngpt export --help`."""

    run: str
    out: str
    step: int
    dtype: str
    fold_logit_scale: bool
    remote_code: bool
    tokenizer: bool
    parity: str | None

    @property
    def options(self) -> export.Options:
        return export.Options(self.dtype, self.fold_logit_scale, not self.remote_code, self.tokenizer)


def main(request: Request) -> None:
    """Writes the folder, or leaves none.

    Args:
        request: of a checkpoint that was found intact, for a folder that does not exist.

    Raises:
        ConfigError: the checkpoint or the tokenizer cannot be written in this form; the models differ.
    """
    out, cfg = Path(request.out), run_config(Path(request.run))
    choice = Choice(folder_of(cfg.checkpoint.dir, request.step), request.step)
    with megatron_log(Path(request.run) / "logs" / "megatron-export.log") as say:
        with new_folder(out) as folder:
            target, written = export.write_folder(cfg, choice, request.options, folder)
            for line in export.told(choice.step, target, written):
                say(line)
            found = _compare(cfg, choice.folder, folder, request)
            say(str(found))
            parity.check(found, out)
            export.describe(cfg, choice, request.options, target, folder, (str(found), found.as_dict()))
        say(export.opening(target, out))


def sample_text(cfg: Config) -> torch.Tensor:
    """[sequences, tokens] int64 of the run's own text, validation first; random tokens for a run on mock data."""
    length = min(LENGTH, cfg.train.seq_length)
    count = SEQUENCES * length
    sources = [*cfg.data.valid, *cfg.data.train]
    if cfg.data.mock or not sources:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(cfg.model.vocab_size, (SEQUENCES, length), generator=generator)
    for source in sources:
        tokens = IndexedReader(source.path).tokens
        if len(tokens) >= count:
            return torch.tensor(tokens[:count].astype("int64")).view(SEQUENCES, length)
    rule = f"The comparison reads {count} tokens of the run's data"
    raise ConfigError(sources[0].path, f"{len(tokens)} tokens", rule, "Export with --parity none")


def _compare(cfg: Config, checkpoint: Path, folder: Path, request: Request) -> Parity:
    text_BS = sample_text(cfg)
    layers = request.parity == "layers" or (request.parity is None and not _both_fit(cfg, folder, text_BS))
    return parity.compare(cfg, checkpoint, folder, text_BS, rounded=request.dtype == "bfloat16", layers=layers)


def _both_fit(cfg: Config, folder: Path, text_BS: torch.Tensor) -> bool:
    from ngpt.estimate.counts import count_parameters

    needed = 2 * 4 * (count_parameters(cfg.model).total + text_BS.numel() * cfg.model.vocab_size)
    return ROOM * needed < psutil.virtual_memory().available
