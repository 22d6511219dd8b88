"""`train(cfg)`: one rank of a training run, from a resolved config to the summary."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.training import get_args, get_tensorboard_writer, pretrain

from megatron_ext.compat.loop_marks import loop_marks
from megatron_ext.device import on_gpu
from megatron_ext.layers.backend import check_backend
from megatron_ext.optim.norm_check import worst_norm_deviation
from megatron_ext.optim.retraction import RetractionHook
from megatron_ext.precision.policy import apply_recipes, choose_executors
from megatron_ext.precision.state import PrecisionState
from megatron_ext.training.bridge import setup_megatron
from megatron_ext.training.checkpoint_load import checked_loading
from megatron_ext.training.checkpoint_save import CheckpointSaver
from megatron_ext.training.data import make_iterators_provider
from megatron_ext.training.guard import StepGuard
from megatron_ext.training.health import HiddenNormProbe, check_scale_names, health_figures
from megatron_ext.training.metrics import MetricsRecorder, memory_figures
from megatron_ext.training.step_policy import StepPolicy
from megatron_ext.training.stop import Stopper
from megatron_ext.training.summary import run_header, write_summary
from ngpt.analysis.metrics import truncate_after
from ngpt.checkpoints.choice import leftovers, listing
from ngpt.config import Config
from ngpt.config.executor import choose_backend, keeps_quantized_weights
from ngpt.config.megatron_keys import captures
from ngpt.config.sizes import world_size
from ngpt.estimate.counts import training_flops_per_token
from ngpt.estimate.hardware import gpu_of_device
from ngpt.estimate.peak import product_peaks
from ngpt.kernels.rows import use_kernels
from ngpt.recipes import Recipe
from ngpt.rollbacks import read_rollbacks, resume_step
from ngpt.stopping import StopRequest
from ngpt.streams import GivenUp


class Session:
    """What our side adds to Megatron's loop on one rank: retraction, the self-check of norms, health, metrics."""

    def __init__(
        self,
        cfg: Config,
        backend: str,
        executors: dict[Recipe, str],
        guard: StepGuard,
        rank: int,
        say: Callable[[str], None],
        stop_request: StopRequest | None = None,
    ):
        self.cfg, self.executors, self.guard, self.rank, self.say = cfg, executors, guard, rank, say
        use_kernels(cfg.debug.row_kernels)
        self.status = "failed"  # finished | stopped (train.stop_after) | signalled | failed
        self.stopper = Stopper(stop_request)
        native_sr = any(executor == "native" and recipe.rounds_stochastically for recipe, executor in executors.items())
        self.precision = PrecisionState(
            cfg.train.seed,
            rank,
            cfg.train.steps,
            cfg.precision.bf16_tail,
            seeds_device=native_sr,
            keeps_weights=keeps_quantized_weights(cfg),
        )
        # Transformer Engine multiplies fp32 matrices in TF32.
        dtype = "tf32" if (cfg.precision.dtype, backend) == ("fp32", "transformer_engine") else cfg.precision.dtype
        peaks = product_peaks(cfg, cfg.cluster.gpu or gpu_of_device(torch.cuda.get_device_name()), dtype, executors)
        self.recorder = MetricsRecorder(cfg, training_flops_per_token(cfg.model, cfg.train.seq_length), peaks, say)
        self.optimizer: Any = None
        self.hook: RetractionHook | None = None
        self.step: int | None = None  # the newest step that this process trained
        self.checked = False
        self.start_deviation: float | None = None
        self.started = time.monotonic()
        self.tasks = self._tasks() if cfg.train.eval_tasks else None

    def _tasks(self) -> Any:
        from megatron_ext.training.task_evaluation import TaskEvaluation  # imports lm-eval, which only tasks need

        return TaskEvaluation(self.cfg, self.guard.mark_evaluation)

    def attach(self, chunks: list) -> None:
        """Called with the wrapped model chunks once they are built."""
        self.chunks = chunks
        if self.executors:
            apply_recipes(chunks, self.cfg, self.executors, self.precision)
        self.probe = HiddenNormProbe(chunks)
        self.policy = StepPolicy(self.cfg, self.rank, self.say, self.after_skipped_step)
        self.guard.attach(chunks, self.policy)
        self.hook = RetractionHook(chunks, self.after_step)
        check_scale_names(chunks)

    def attach_optimizer(self, optimizer: Any) -> None:
        """Called with Megatron's optimizer once it is built."""
        self.optimizer = optimizer
        self.policy.attach_optimizer(optimizer)

    def forward_step(self, batches: Iterator, model: torch.nn.Module) -> tuple:
        """Megatron's forward step. It tells the low-precision linears which step runs."""
        if self.stopper.request is not None and self.step is None:
            self.stopper.request.training_starts()
        step = get_args().curr_iteration + 1
        self.precision.begin_step(step, watched=self.cfg.precision.diagnostics and self._health_due(step))
        return self.guard.forward_step(batches, model)

    def close(self) -> None:
        """Stop listening to optimizers (their hook is process-wide) and finish metrics.jsonl."""
        self.guard.close()
        if self.hook is not None:
            self.hook.remove()
        self.recorder.close()

    def provide_data(self, provider: Callable) -> Callable:
        """Wrap the dataset provider: Megatron calls it after loading a checkpoint and before the first step."""

        def wrapped(num_samples: tuple[int, int, int], vp_stage: int | None = None):
            if self.start_deviation is None:  # asked once for each virtual pipeline stage
                self._go_on_behind_rollbacks()
            writer = get_tensorboard_writer()
            self.recorder.start_step = get_args().iteration
            if writer is not None and self.recorder.writer is None:
                self.recorder.open(get_args().iteration)
                writer.add_scalar = self.recorder.add_scalar
            self._check_start()
            return provider(num_samples, vp_stage)

        wrapped.is_distributed = True
        return wrapped

    def _go_on_behind_rollbacks(self) -> None:
        """Steps and samples behind the loaded checkpoint that the run went back from are left out."""
        args = get_args()
        loaded, args.iteration = args.iteration, resume_step(read_rollbacks(Path(self.cfg.run.dir)), args.iteration)
        if args.iteration > loaded:
            args.consumed_train_samples += (args.iteration - loaded) * args.global_batch_size
            self.say(f"rolled back to step {loaded}; goes on behind the batch of step {args.iteration}")
            if get_tensorboard_writer() is not None:
                truncate_after(self.recorder.path, loaded)

    def _check_start(self) -> None:
        """Unit norms of the masters before the first step, fresh or loaded."""
        if self.start_deviation is not None:  # asked once for each virtual pipeline stage
            return
        args = get_args()
        if args.iteration == 0:
            self.hook.retract_start(loaded=args.load is not None)
        self.start_deviation = self._check_norms() if self.cfg.model.architecture == "ngpt" else 0.0
        self.probe.active = self._health_due(args.iteration + 1)

    def after_step(self) -> None:
        """Every rank calls this together, after each optimizer step."""
        if not hasattr(get_args(), "curr_iteration"):  # loading a checkpoint makes an empty step
            return
        step = get_args().curr_iteration + 1
        self.step = step
        self.guard.progress.end_step()
        figures = {}
        due = self._health_due(step)
        if step % self.cfg.logging.interval == 0:
            for line in self.guard.stragglers.report():
                self.say(line)
        if self.cfg.model.architecture == "ngpt" and (due or not self.checked):
            figures["worst_norm_deviation"] = self._check_norms()
            self.checked = True
        figures |= self._figures_of_loop(step)
        if due:
            figures |= health_figures(self.chunks, self.hook.parameters, self.probe.drain()) | self.precision.figures()
            figures |= self.guard.stragglers.watch.figures()
        if figures:
            self.recorder.add_figures(step, figures)
        self.probe.active = self._health_due(step + 1)

    def _figures_of_loop(self, step: int) -> dict[str, float]:
        """What Megatron reports wrongly, or for one rank only; {} where the step is not logged. Called before the schedule moves on."""
        if not self.recorder.is_logged(step):
            return {}
        rate = get_canonical_lr_for_logging(self.optimizer.param_groups)
        return memory_figures() | ({} if rate is None else {"learning_rate": rate})

    def evaluate_tasks(self, chunks: list) -> None:
        """Called by Megatron behind each evaluation of data.valid, on every rank, with the chunks in evaluation mode."""
        step = get_args().iteration if self.step is None else self.step
        if figures := self.tasks.figures(chunks, step):
            self.recorder.add_figures(step, figures)

    def after_skipped_step(self) -> None:
        """In place of `after_step` where a step is left out: there is no step of the optimizer to look at."""
        self.step = get_args().curr_iteration + 1
        self.guard.progress.end_step()
        self.recorder.skipped_steps += 1
        if figures := self._figures_of_loop(self.step):
            self.recorder.add_figures(self.step, figures)
        self.probe.drain()
        self.probe.active = self._health_due(self.step + 1)

    def _health_due(self, step: int) -> bool:
        """Step 1 is due, too: it shows where norms and scales begin. Not where the probe's hooks would be captured into CUDA graphs."""
        return step % self.cfg.logging.health_interval == 0 or (step == 1 and not captures(self.cfg.megatron))

    def _check_norms(self) -> float:
        deviation, where = worst_norm_deviation(self.hook.parameters)
        worst = torch.tensor([deviation], dtype=torch.float64, device=torch.cuda.current_device())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if not worst.item() <= self.cfg.debug.norm_tolerance:
            raise RuntimeError(
                f"worst | ||w|| - 1 | of the fp32 masters: {worst.item():.3g} over all ranks, {deviation:.3g} in {where} on this one; "
                f"debug.norm_tolerance is {self.cfg.debug.norm_tolerance:g}. After a step: the retraction did not reach this weight. "
                "After loading: the checkpoint was not written by this model. With a loss that is not finite: the run has diverged, lower "
                "optim.lr."
            )
        return worst.item()


@contextlib.contextmanager
def megatron_log(path: Path) -> Iterator[Callable[[str], None]]:
    """Send what Megatron prints and logs to a file of its own, and give a `say` that still reaches the terminal."""
    terminal = GivenUp(sys.stdout, "the launcher")
    path.parent.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        print(f"{line}\n", end="", file=terminal, flush=True)  # in one piece: trackers speak from threads of their own

    with path.open("a", buffering=1) as file, contextlib.redirect_stdout(GivenUp(file, str(path))) as log:
        logging.basicConfig(stream=log, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True)
        try:
            yield say
        finally:
            logging.getLogger().handlers.clear()  # the file closes; what is logged later goes where Python puts it


def train(
    cfg: Config, rank: int, on_built: Sequence[Callable[[list], None]] = (), stop_request: StopRequest | None = None
) -> Session:
    """Train as rank `rank` of a world that torchrun's environment variables describe.

    Args:
        on_built: called with the wrapped model chunks before the optimizer copies their weights.
        stop_request: what signals ask of this rank; it is told when training starts.

    Writes metrics.jsonl, trackers' files and summary.json (last rank), checkpoints, and logs/megatron-rank<N>.log into the run folder.
    The trackers are still open when it returns: `leave` closes them.

    Raises:
        ConfigError: the config cannot run here.
        RuntimeError: the self-check of norms failed, or Megatron left with an error or before the first step.
    """
    backend = choose_backend(cfg.model.transformer_impl, on_gpu())
    check_backend(cfg, backend)
    executors = choose_executors(cfg, backend)
    log = Path(cfg.run.dir) / "logs" / f"megatron-rank{rank}.log"
    with megatron_log(log) as say, contextlib.ExitStack() as failing:
        guard = StepGuard(cfg, rank, world_size(cfg))
        guard.start()
        args, container = setup_megatron(cfg, backend)
        is_last = args.rank == args.world_size - 1
        session = Session(cfg, backend, executors, guard, args.rank, say if is_last else print, stop_request)
        failing.callback(session.recorder.close_trackers, "failed")
        container.model.on_built += [*on_built, session.attach]
        if is_last:
            for line in run_header(cfg, backend, executors, args):
                say(line)
            if cfg.checkpoint.resume and (note := leftovers(listing(cfg.checkpoint.dir))) is not None:
                say(note)
        status = "failed"
        try:
            provider = session.provide_data(make_iterators_provider(cfg, backend))
            marks = loop_marks(guard.progress, session.attach_optimizer, session.precision.weights.training_step)
            saving = CheckpointSaver(cfg, say).installed()
            with session.stopper.installed(), checked_loading(cfg, say), saving, marks:  # the marks go around what the others do
                evaluate_tasks = session.evaluate_tasks if session.tasks is not None else None
                pretrain(container, provider, ModelType.encoder_or_decoder, session.forward_step, non_loss_data_func=evaluate_tasks)
            status = "finished"
        except SystemExit as leaving:  # Megatron leaves this way after stop_after or a signal, checkpoint saved
            if leaving.code or session.step is None:
                reached = "before the first step" if session.step is None else f"after step {session.step}"
                words = f"Megatron left with code {leaving.code} {reached}; its last words are in {cfg.run.dir}/logs"
                raise RuntimeError(words) from leaving
            status = "stopped"
            if is_last:
                asked = "as train.stop_after asks; a later one, or none, continues" if not session.stopper.agreed else "as a signal asks"
                say(f"stopped after step {session.step} {asked}")
        finally:
            session.close()
            session.status = "signalled" if session.stopper.agreed and status == "stopped" else status
            if is_last:
                last = session.recorder.last | {
                    "step": session.step or session.recorder.start_step,
                    "start_norm_deviation": session.start_deviation,
                    "tokens_per_second": session.recorder.typical_rate(),
                }
                write_summary(cfg, backend, executors, last, status, time.monotonic() - session.started, session.recorder.start_step)
        failing.pop_all()
    return session


def leave(session: Session) -> None:
    """End what outlives training. Called once the outcome is recorded: a tracker may wait for a server.

    Otherwise the process groups' threads may outlive what they use, and abort the process at exit.
    """
    dist.destroy_process_group()
    session.recorder.close_trackers(session.status)
