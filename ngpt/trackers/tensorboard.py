"""TensorBoard: event files in <run.dir>/tensorboard."""

from collections.abc import Mapping
from pathlib import Path

from ngpt.config.compose import to_yaml
from ngpt.config.schema import Config


class TensorBoard:
    """Scalars, and the resolved config as text. A launch continues after some step; TensorBoard purges later events when it reads them."""

    name = "TensorBoard"

    def __init__(self, cfg: Config):
        from torch.utils.tensorboard import SummaryWriter

        self.cfg, self.writer_class = cfg, SummaryWriter

    def open(self, start_step: int) -> None:
        self.events = self.writer_class(str(Path(self.cfg.run.dir) / "tensorboard"), purge_step=start_step + 1)
        self.events.add_text("config", f"```yaml\n{to_yaml(self.cfg)}```", start_step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.events.add_scalar(name, value, step)
        self.events.flush()

    def close(self, status: str) -> None:
        self.events.close()

    def abandon(self) -> None:
        """The writer waits for the disk alone."""
