import pytest
from torch.utils.data import DataLoader

from vlmfast.data import EpochSampler


def epoch_order(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_each_index_comes_once_with_its_epoch():
    order = epoch_order(EpochSampler(50, seed=3), 2)
    assert len(EpochSampler(50)) == len(order) == 50
    assert {epoch for epoch, _ in order} == {2}
    assert sorted(index for _, index in order) == list(range(50))
    assert all(type(index) is int for _, index in order)


def test_the_order_is_a_function_of_seed_and_epoch():
    sampler = EpochSampler(50, seed=3)
    first, second = epoch_order(sampler, 0), epoch_order(sampler, 1)
    assert epoch_order(EpochSampler(50, seed=3), 1) == second  # with no epoch 0 before it
    assert epoch_order(sampler, 0) == first
    orders = [[index for _, index in order] for order in (first, second, epoch_order(EpochSampler(50, seed=4), 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert list(range(50)) not in orders


def test_without_shuffling_indices_ascend():
    assert epoch_order(EpochSampler(3, shuffle=False), 5) == [(5, 0), (5, 1), (5, 2)]


def test_a_started_epoch_keeps_its_number():
    sampler = EpochSampler(3)
    running = iter(sampler)
    next(running)
    sampler.set_epoch(1)
    assert {epoch for epoch, _ in running} == {0}


@pytest.mark.parametrize("arguments", [{"length": 0}, {"length": 5, "seed": -1}])
def test_arguments_out_of_range_are_named(arguments):
    with pytest.raises(ValueError, match=r"^(length|seed): expected at least"):
        EpochSampler(**arguments)


def test_a_data_loader_hands_the_pairs_on():
    class Echo:
        def __len__(self):
            return 4

        def __getitem__(self, position):
            return position

    loader = DataLoader(Echo(), sampler=EpochSampler(4, shuffle=False), batch_size=3, collate_fn=list)
    assert list(loader) == [[(0, 0), (0, 1), (0, 2)], [(0, 3)]]
