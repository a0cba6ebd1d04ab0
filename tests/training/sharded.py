"""Two steps of the training module under ``fully_shard`` on two processes (gloo), beside the same steps on one."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dpo_rank.scoring.logps import TokenLogProbs
from dpo_rank.scoring.pack import Group
from dpo_rank.training.collate import layout_of, packed, per_candidate
from dpo_rank.training.losses import sigmoid
from dpo_rank.training.prepare import TrainingGroup
from tests.models import tiny


def rows() -> list[TrainingGroup]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 60, (count,), generator=generator).tolist()

    return [TrainingGroup(Group(tokens(5 + n), [tokens(4 + n), tokens(6)]), (1.0, 0.0)) for n in range(4)]


def steps(model: Any, items: list[TrainingGroup], shared: bool) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(2):
        part = packed(items)
        loss = sigmoid(per_candidate(model(layout_of(part)), part).float(), part["mask"], part["targets"]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach()
        if shared:
            dist.all_reduce(value)
            value /= dist.get_world_size()
        losses.append(float(value))
    return losses


def main() -> None:
    dist.init_process_group("gloo")
    rank, items = dist.get_rank(), rows()
    plain = TokenLogProbs(tiny("llama"), borrow=False)
    plain_losses = steps(plain, items, shared=False)
    module = TokenLogProbs(tiny("llama"), borrow=False)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in module.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    parameters = dict(module.named_parameters())
    sharded = all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in parameters.values() if p.shape[0] >= 2)
    losses = steps(module, items[rank::2], shared=True)
    difference = max(float((p.full_tensor() - q).abs().max()) for p, q in zip(module.parameters(), plain.parameters(), strict=True))
    if rank == 0:
        sys.stdout.write(
            json.dumps({"sharded": sharded, "losses": losses, "plain_losses": plain_losses, "largest_difference": difference}) + "\n"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
