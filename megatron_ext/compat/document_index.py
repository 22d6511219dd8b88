"""Large corpora: the order of documents is laid out in the memory that it needs.

Upstream (megatron-core 0.19.2): `core/datasets/gpt_dataset.py: _build_document_index` fills `numpy.mgrid[0:epochs, 0:documents]`, two
int64 arrays, to get one int32 array: 16 bytes a document and epoch beside the 4 that it returns.
Reason: a corpus of 1 TB has some 250 million documents; this is most of the time between launch and first step there.
The result and the random numbers drawn are the same, so runs that have begun keep their order of samples.
Goes when: upstream tiles the document numbers.
"""

import numpy as np


def install() -> bool:
    """Replaces the function."""
    from megatron.core.datasets import gpt_dataset

    gpt_dataset._build_document_index = build_document_index
    return True


def build_document_index(documents: np.ndarray, num_epochs: int, random: np.random.RandomState, separate_final_epoch: bool) -> np.ndarray:
    """The documents of all epochs, shuffled together; with `separate_final_epoch` the last epoch's stay behind the others.

    Returns:
        int32 document numbers, [documents * num_epochs].
    """
    whole = np.tile(documents.astype(np.int32, copy=False), num_epochs)
    if separate_final_epoch and num_epochs > 1:
        border = len(documents) * (num_epochs - 1)
        random.shuffle(whole[:border])
        random.shuffle(whole[border:])
    else:
        random.shuffle(whole)
    return whole
