"""Log-probabilities of texts under the model in training, in whatever layout it trains."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from ngpt.config import Config
from ngpt.config.megatron_keys import captures
from ngpt.config.sizes import round_up
from ngpt.evaluation.rows import Reading, Row, add_scores, answers, batches, padded, readings

LENGTH_MULTIPLE = 128  # tokens: low-precision products need whole blocks, sequence parallelism equal parts


class TrainingScorer:
    """Log-probabilities by the model chunks of this rank, with those of the other ranks: all call it together with the same rows.

    Attributes:
        chunks: wrapped model chunks in evaluation mode; set before anything is scored.

    Args:
        mark: is called for each micro-batch: it shows that the rank makes progress.
    """

    def __init__(self, cfg: Config, mark: Callable[[], None]):
        self.cfg, self.mark, self.window = cfg, mark, cfg.train.seq_length
        self.chunks: list[nn.Module] = []

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """As `ngpt.evaluation.scorer.Scorer`.

        Parallelism: data-parallel ranks share the micro-batches, in equal numbers; tensor-parallel ranks all-reduce what their part of
        the vocabulary says; one all-reduce over the world brings the scores together.
        """
        groups, size = get_attr_wrapped_model(self.chunks[0], "pg_collection"), self.cfg.train.micro_batch_size
        found = readings(rows)
        mine = batches(found, size, groups.dp.rank(), groups.dp.size())
        mine += [()] * (-len(mine) % groups.pp.size())  # interleaved pipelines take micro-batches in groups
        scores_R2 = torch.zeros(len(rows), 2, dtype=torch.float64)
        length = self._length(len(found[0].inputs))
        parts = get_forward_backward_func()(
            forward_step_func=partial(self._step, length=length, group=groups.tp, scores_R2=scores_R2),
            data_iterator=[iter(mine) for _ in self.chunks] if len(self.chunks) > 1 else iter(mine),
            model=self.chunks,
            num_microbatches=len(mine),
            seq_length=length,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        del parts  # the scores are written by the last stage; one tensor-parallel rank brings them in
        if groups.tp.rank() != 0:
            scores_R2.zero_()
        scores_R2 = scores_R2.to(torch.cuda.current_device())
        dist.all_reduce(scores_R2)
        return answers(scores_R2.cpu())

    def _length(self, longest: int) -> int:
        """Tokens of a row. CUDA graphs were captured for the length of training."""
        multiple = math.lcm(LENGTH_MULTIPLE, self.cfg.parallel.tensor)
        return self.window if captures(self.cfg.megatron) else min(self.window, round_up(longest, multiple))

    def _step(
        self, mine: Iterator[Sequence[Reading]], model: nn.Module, length: int, group: dist.ProcessGroup, scores_R2: Tensor
    ) -> tuple[Tensor, Callable]:
        self.mark()
        batch, size = next(mine), self.cfg.train.micro_batch_size
        ids_BS = padded(batch, length, size).to(torch.cuda.current_device())
        positions_BS = torch.arange(length, device=ids_BS.device).expand(size, length)
        output = model(ids_BS, positions_BS, None)

        def write(logits_BSV: Tensor, non_loss_data: bool) -> None:
            add_scores(scores_R2, batch, logits_BSV, first=group.rank() * logits_BSV.size(2), group=group)

        return output, write
