"""Upstream gives all data-parallel ranks one random state; the patch keeps the expert streams apart. A whole run: tests/distributed."""

CHECKPOINTING = "training/checkpointing.py"


def test_upstream_still_saves_one_state_and_loads_the_first(upstream_source):
    save = upstream_source(CHECKPOINTING, "get_rng_state")
    assert "rng_state_list = [rng_state]" in save and "expert" not in save
    assert "rng_state = rng_state[0]" in upstream_source(CHECKPOINTING, "load_checkpoint")


def test_upstream_still_returns_the_state_dict_first_and_seeds_experts_apart(upstream_source):
    assert "state_dict, checkpoint_name, release, ckpt_type = _load_base_checkpoint(" in upstream_source(CHECKPOINTING, "load_checkpoint")
    seeding = upstream_source("core/tensor_parallel/random.py", "model_parallel_cuda_manual_seed")
    assert "_EXPERT_PARALLEL_RNG_TRACKER_NAME" in seeding and "100 * ep_rank" in seeding


def test_a_rank_finds_its_own_state_or_keeps_its_own_expert_stream(run_installed):
    out = run_installed(
        """
        from megatron.core import tensor_parallel
        from megatron_ext.compat.expert_rng import own_first

        states = [{"rng_tracker_states": {"expert-parallel-rng": number, "model-parallel-rng": number}} for number in range(3)]
        tracker = tensor_parallel.get_cuda_rng_tracker()
        tracker.get_states = lambda: {"expert-parallel-rng": "fresh", "model-parallel-rng": "fresh"}
        print(own_first(states, 3, 2)[0]["rng_tracker_states"], len(own_first(states, 3, 2)))
        print(own_first(states, 2, 1)[0]["rng_tracker_states"], states[0]["rng_tracker_states"])
        """
    )
    own, other = out.splitlines()[-2:]
    assert own == "{'expert-parallel-rng': 2, 'model-parallel-rng': 2} 3"
    assert other == "{'expert-parallel-rng': 'fresh', 'model-parallel-rng': 0} {'expert-parallel-rng': 0, 'model-parallel-rng': 0}"
