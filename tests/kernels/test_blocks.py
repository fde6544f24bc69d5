import threading

import pytest
import torch
from kernels.networks import inputs

from pysciml_node.kernels import ntk
from pysciml_node.kernels.blocks import map_blocks


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def seen_by_new_threads():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_blocks_keep_their_order_and_the_setting_of_threads(threads):
    positions = torch.arange(10.0, requires_grad=True)
    joined = map_blocks(lambda block: torch.stack((block, -block)), torch.split(positions, 3))
    assert torch.equal(joined, torch.stack((positions, -positions)))
    assert not joined.requires_grad
    assert torch.get_num_threads() == seen_by_new_threads() == threads


def test_an_error_in_a_block_is_raised_and_the_setting_restored(threads):
    def fail(block):
        raise ValueError(f"no {block}")

    with pytest.raises(ValueError, match="no "):
        map_blocks(fail, torch.split(torch.arange(10), 3))
    assert torch.get_num_threads() == seen_by_new_threads() == threads


@pytest.mark.parametrize("activation", ["softplus", "relu", "elu"])
@pytest.mark.parametrize("steps", [None, 20])
def test_threads_do_not_change_a_kernel(threads, activation, steps):
    x = inputs(70, 4)
    several = ntk(x, activation=activation, steps=steps)
    torch.set_num_threads(1)
    torch.testing.assert_close(
        several, ntk(x, activation=activation, steps=steps), rtol=1e-11, atol=0
    )
