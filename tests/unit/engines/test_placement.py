"""Parts of tensors in any shape, layout and number of copies, as pieces of a checkpoint and
back.
"""

from __future__ import annotations

import torch
from kit.placement import Written

from scaletrain.engines.placement import Shard, fill, pieces, replica, whole


def test_elements_keep_their_place_whatever_holds_them() -> None:
    kernel = torch.arange(24.0).view(2, 3, 2, 2)
    ranks = [
        {
            "kernel": Shard(kernel[:1].flatten(), 0, (2, 3, 2, 2)),
            "one": Shard(torch.ones(1), 0, (1,)),
            "number": Shard(torch.tensor(7.0), 0, ()),
        },
        {
            "kernel": Shard(kernel[1:].to(memory_format=torch.channels_last), 12, (2, 3, 2, 2)),
            "one": Shard(torch.ones(0), 1, (1,)),
            "number": Shard(torch.empty(0), 0, ()),
        },
    ]
    saved = Written([pieces(rank) for rank in ranks])
    assert torch.equal(saved.flat["kernel"], torch.arange(24.0))
    there = {
        "kernel": replica(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last)),
        "one": replica(torch.zeros(1)),
        "number": replica(torch.zeros(())),
    }
    fill(there, saved)
    assert torch.equal(there["kernel"].tensor, kernel)
    assert there["kernel"].tensor.is_contiguous(memory_format=torch.channels_last)
    assert (there["one"].tensor.item(), there["number"].tensor.item()) == (1, 7)
    for rank in ranks:
        before = {name: at.tensor.clone() for name, at in rank.items()}
        for at in rank.values():
            at.tensor.zero_()
        fill(rank, saved)
        assert all(torch.equal(at.tensor, before[name]) for name, at in rank.items())
    assert torch.equal(whole(ranks[0]["number"]), torch.tensor(7.0))


def test_copies_are_written_once_and_evenly() -> None:
    held = {f"{i}": torch.full((100,), float(i)) for i in range(30)} | {"part": torch.ones(6)}
    written = []
    for rank in range(4):  # two copies of two halves each, and what all four hold
        placed = {
            name: Shard(tensor, 0, (100,), rank, 4)
            for name, tensor in held.items()
            if name != "part"
        }
        start = 3 * (rank % 2)
        placed["part"] = Shard(held["part"][start : start + 3], start, (6,), rank // 2, 2)
        written.append(pieces(placed))
    saved = Written(written)
    assert all(torch.equal(saved.flat[name], tensor) for name, tensor in held.items())
    assert max(len(rank) for rank in written) <= 9
