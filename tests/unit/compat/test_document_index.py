"""The order of documents is upstream's, number for number, and so are the random numbers that follow it."""

import numpy as np
import pytest


def test_upstream_still_fills_two_arrays_of_int64(upstream_source):
    source = upstream_source("core/datasets/gpt_dataset.py", "_build_document_index")
    assert "numpy.mgrid[0:num_epochs, 0 : len(documents)][1]" in source and "astype(numpy.int32)" in source
    called = upstream_source("core/datasets/gpt_dataset.py", "GPTDataset._build_document_sample_shuffle_indices")
    assert "_build_document_index(\n                self.indices, num_epochs, numpy_random_state, separate_final_epoch" in called


@pytest.mark.parametrize("separate_final_epoch", [False, True])
@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("documents", [1, 7, 1000])
def test_same_order_and_same_random_state(upstream_source, documents, epochs, separate_final_epoch):
    from megatron_ext.compat.document_index import build_document_index

    names = {"numpy": np}
    exec(upstream_source("core/datasets/gpt_dataset.py", "_build_document_index"), names)
    ours, theirs = np.random.RandomState(5), np.random.RandomState(5)
    numbers = np.arange(documents, dtype=np.int32)
    got = build_document_index(numbers, epochs, ours, separate_final_epoch)
    wanted = names["_build_document_index"](numbers, epochs, theirs, separate_final_epoch)
    assert got.dtype == wanted.dtype == np.int32 and np.array_equal(got, wanted)
    assert ours.randint(2**31) == theirs.randint(2**31)
    assert np.array_equal(numbers, np.arange(documents))


def test_the_patch_reaches_the_dataset(run_installed):
    out = run_installed(
        """
        from megatron.core.datasets import gpt_dataset
        print(gpt_dataset._build_document_index.__module__)
        """
    )
    assert out.strip() == "megatron_ext.compat.document_index"
