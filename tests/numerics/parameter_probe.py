"""Builds every shipped model without memory for its weights, and counts its parameters.

    torchrun --nproc-per-node 1 parameter_probe.py OUT.json

What Megatron or our layers make on a named device lands on torch's `meta` device, which has shapes only: no values are drawn, and none
are normalised.
"""

import json
import sys
from pathlib import Path


def main(out: str) -> None:
    from launch.worker import install_compat

    install_compat()
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import destroy_global_state
    from repeats import keep_what_repeats
    from torch.overrides import TorchFunctionMode

    from megatron_ext.models import builder as our_builder
    from megatron_ext.training.bridge import setup_megatron
    from ngpt.config import compose, config_dir
    from ngpt.estimate.counts import count_parameters
    from ngpt.estimate.rank import chunks_by_rank
    from ngpt.estimate.states import rank_parameters

    keep_what_repeats()

    class OnMeta(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is torch.Tensor.normal_:
                return args[0]
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": "meta"}
            return func(*args, **kwargs)

    our_builder.retract_weights_ = lambda parameters: None
    alone = ["experiment=ngpt_tiny", "model.transformer_impl=local", f"run.root={Path(out).parent}"]
    results = {}
    for model in sorted(path.stem for path in config_dir().glob("model/*.yaml")):
        cfg = compose([*alone, f"model={model}"])
        _, container = setup_megatron(cfg, "local", save=None, save_interval=None, tensorboard_dir=None)
        initialize_megatron()
        builder = container.model.get_builder_cls()(container.model)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        with OnMeta():
            parameters = builder.build_model(groups, pre_process=True, post_process=True).parameters()
        (held,) = chunks_by_rank(cfg)
        results[model] = {
            "built": sum(param.numel() for param in parameters),
            "counted": count_parameters(cfg.model).total,
            "held": rank_parameters(cfg, held).total,
        }
        destroy_global_state()
    Path(out).write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
