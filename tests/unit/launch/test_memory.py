"""What cannot fit is told with its size, and what may fit is left alone."""

from types import SimpleNamespace

import pytest

from launch import memory
from launch.memory import check_memory
from ngpt.config import ConfigError, compose


@pytest.fixture(autouse=True)
def a_machine_of_24_gb(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=24e9))


def test_weights_and_gradients_beyond_the_memory_are_refused_on_a_cpu_alone():
    large = compose(["experiment=ngpt_1p2b_dense_bf16"])  # 1.26e9 parameters: 7.6 GB at 6 bytes
    check_memory(large, 1, cuda=False)
    told = r"model: 1,2\d\d,\d\d\d,\d\d\d parameters a process. Weights and gradients of 4 processes take 30 GB, "
    with pytest.raises(ConfigError, match=told):
        check_memory(large, 4, cuda=False)
    check_memory(large, 4, cuda=True)


def test_hidden_states_beyond_the_memory_are_refused_on_a_cpu_alone():
    words = ["experiment=ngpt_tiny", "train.micro_batch_size=2", "model.hidden_size=64"]  # 128 bytes a token
    check_memory(compose([*words, "train.seq_length=90000000"]), 1, cuda=False)
    long = compose([*words, "train.seq_length=100000000"])
    told = r"seq_length: 2 \* 100,000,000 tokens. Their hidden states of one layer take 26 GB in one process, and this machine has 24"
    with pytest.raises(ConfigError, match=told):
        check_memory(long, 1, cuda=False)
    check_memory(long, 1, cuda=True)


def test_an_order_of_sequences_beyond_the_memory_is_refused():
    check_memory(compose(["experiment=ngpt_tiny", "train.steps=1000000", "train.global_batch_size=1024"]), 1, cuda=True)  # 8.2 GB
    with pytest.raises(ConfigError, match=r"5,000,000 \* 1,024 sequences. Their order takes 41 GB, and this machine has 24"):
        check_memory(compose(["experiment=ngpt_tiny", "train.steps=5000000", "train.global_batch_size=1024"]), 1, cuda=True)
