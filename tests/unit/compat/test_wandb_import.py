"""A process that trains imports neither wandb's client nor other large packages that it has no use for; a tracker can import the client."""


def test_upstream_still_imports_the_client_with_its_timers(upstream_source):
    assert "writer == wandb and wandb is not None" in upstream_source("core/timers.py", "Timers.write")


def test_a_process_that_is_ready_to_train_has_not_imported_what_it_does_not_use(run_installed, tmp_path):
    said = run_installed(f"""
        import os, sys
        os.environ |= {{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}}
        from pathlib import Path
        Path("wandb").mkdir()
        Path("wandb/__init__.py").write_text("")
        sys.path.insert(0, os.getcwd())
        from megatron_ext.training.bridge import setup_megatron
        from megatron_ext.training.run import train
        from ngpt.config import compose

        setup_megatron(compose(["experiment=ngpt_tiny", "run.dir={tmp_path}/run"]), "local")
        print(sorted({{"transformers", "transformer_engine", "wandb"}} & {{name for name, module in sys.modules.items() if module}}))
        import wandb
        print(Path(wandb.__file__).parent == Path("wandb").absolute())
    """)
    assert said.splitlines()[-2:] == ["[]", "True"]
