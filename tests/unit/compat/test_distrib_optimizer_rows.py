"""Rows of the optimizer state: upstream still needs the patch, and every entry is saved once, from its own place, however ranks cut it.

Runs over several padded buckets: `resume_dp2`, `resume_ep2` in tests/distributed, and tests/faults/test_buckets.py.
"""

import json

import torch

OPTIMIZER = "core/optimizer/distrib_optimizer.py"


def test_upstream_still_cuts_a_tensor_without_padding_by_offsets_that_count_it(upstream_source):
    saving = upstream_source(OPTIMIZER, "DistributedOptimizer.sharded_param_state_fully_reshardable")
    assert "state_ten = world_tensors[state_key][param_world_start:param_world_end]" in saving
    assert "buffer.param_index_map.items()" in saving and "padded with zeros" in saving
    gathering = upstream_source(OPTIMIZER, "DistributedOptimizer.get_parameter_state_dp_zero")
    assert "offset_in_world_tensors += gbuf_world_numel_unpadded" in gathering
    assert "torch.distributed.all_gather(" in gathering


def test_upstream_still_calls_both_directions_as_they_are_replaced(upstream_source):
    describing = upstream_source(OPTIMIZER, "DistributedOptimizer.sharded_state_dict")
    assert "self.sharded_param_state_fully_reshardable(\n                model_sharded_state_dict, is_loading, metadata" in describing
    loading = upstream_source(OPTIMIZER, "DistributedOptimizer.load_state_dict")
    assert "self.load_parameter_state_from_fully_reshardable(param_state)" in loading
    assert "return tensors" in upstream_source(OPTIMIZER, "DistributedOptimizer._get_main_param_and_optimizer_states")


def test_uneven_pieces_of_a_tensor_are_still_those_without_a_grid(upstream_source):
    assert "self.axis_fragmentations is not None" in upstream_source("core/dist_checkpointing/mapping.py", "ShardedTensor.has_regular_grid")


SCRIPT = """
    import json
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron_ext.compat import distrib_optimizer_rows as rows

    SHAPES = [(5, 7), (3,), (4, 1, 6), (40, 2), (2, 700)]


    class Rank:
        '''One rank's optimizer over one padded bucket: parameter i, state s, entry e holds 1000 i + e + s / 4.'''

        optimizer_state_keys = ("exp_avg", "exp_avg_sq")
        distributed_optimizer_instance_id = 0

        def __init__(self, rank, world):
            self.params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
            group = SimpleNamespace(rank=lambda: rank, size=lambda: world)
            places, end = {}, 0
            for param in reversed(self.params):
                start = -(-end // 64) * 64
                end = start + param.numel()
                places[param] = (start, end, 0)
            whole = -(-end // (world * 128)) * world * 128
            bucket = SimpleNamespace(grad_data=torch.zeros(whole), params_list=list(places), offset=0)
            self.buffers = [SimpleNamespace(buckets=[bucket], data_parallel_group=group, param_index_map=places)]
            held = range(rank * whole // world, (rank + 1) * whole // world)
            local = DistributedOptimizer._build_model_gbuf_param_range_map(places, rows_range(held), 0)
            self.gbuf_ranges = [{"dtype": [{"param_map": local}]}]
            self.data_parallel_group = group

        def _get_main_param_and_optimizer_states(self, param):
            index = next(i for i, p in enumerate(self.params) if p is param)
            piece = self.gbuf_ranges[0]["dtype"][0]["param_map"][param]["param"]
            entries = torch.arange(piece.start, piece.end).float() + 1000 * index
            return {name: entries + s / 4 for s, name in enumerate(("param", "exp_avg", "exp_avg_sq"))}


    def rows_range(held):
        from megatron.core.optimizer.distrib_optimizer import Range
        return Range(held.start, held.stop)


    def halves(key, tensor, replica_id, flattened_range):
        return [ShardedTensor.from_rank_offsets(f"{key}.{n}", part, replica_id=replica_id)
                for n, part in enumerate(torch.split(tensor, [3, len(tensor) - 3]))]


    def base(index, param, rank):
        if index == 3:
            return ShardedTensorFactory("p3", param, halves, torch.cat, (0, 0, rank))
        return ShardedTensor.from_rank_offsets(f"p{index}", param, replica_id=(0, 0, rank))


    def pieces_of(rank, world):
        optimizer = Rank(rank, world)
        model = {f"p{i}": base(i, param, rank) for i, param in enumerate(optimizer.params)}
        state = rows.sharded_param_state(optimizer, model)
        state.pop(rows.KEYS)
        pieces = [piece for tensors in state.values() for pieces in tensors.values() for piece in pieces]
        return [(piece.key, list(piece.global_offset), piece.data.tolist(), list(piece.replica_id)) for piece in pieces]


    # The all-gather of all ranks in one process: a first round collects what each sends, a second delivers it.
    def deliver(heads, head, group):
        for place, part in zip(heads, sent):
            place.copy_(part)


    for world in (1, 2, 3, 4):
        sent = []
        dist.all_gather = lambda heads, head, group: sent.append(head.clone())
        for rank in range(world):
            pieces_of(rank, world)
        dist.all_gather = deliver
        print(json.dumps([piece for rank in range(world) for piece in pieces_of(rank, world)]))
"""


def test_every_row_is_saved_once_from_its_place_by_any_number_of_ranks(run_installed):
    shapes = {"p0": (5, 7), "p1": (3,), "p2": (4, 1, 6), "p3.0": (3, 2), "p3.1": (37, 2), "p4": (2, 700)}
    worlds = run_installed(SCRIPT).splitlines()[-4:]
    for pieces in map(json.loads, worlds):
        assert all(replica == [0, 0, 0] for *_, replica in pieces)
        for number, state in enumerate(("param", "exp_avg", "exp_avg_sq")):
            for name, shape in shapes.items():
                whole, times = torch.full(shape, -1.0), torch.zeros(shape)
                for key, offset, data, _ in pieces:
                    if key == f"optimizer.state.{state}.{name}":
                        data = torch.tensor(data)
                        whole[offset[0] : offset[0] + len(data)] = data
                        times[offset[0] : offset[0] + len(data)] += 1
                first = 1000 * int(name[1]) + (6 if name == "p3.1" else 0)
                assert torch.equal(times, torch.ones(shape)), name
                assert torch.equal(whole.flatten(), first + number / 4 + torch.arange(whole.numel())), name
