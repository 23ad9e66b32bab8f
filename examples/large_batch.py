"""A training loop of one's own with the batch of all processes and GradCache: transformers' CLIP, vlmfast's loss.

The losses that it prints are the same, however many processes there are and however small the chunks:

    python examples/large_batch.py --chunk 8
    torchrun --nproc-per-node 2 examples/large_batch.py --chunk 8               # DistributedDataParallel
    torchrun --nproc-per-node 2 examples/large_batch.py --chunk 8 --how fsdp
    accelerate launch --num_processes 2 examples/large_batch.py --chunk 8 --how accelerate
"""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from vlmfast.nn import ClipLoss
from vlmfast.training.grad_cache import forward_backward

SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZE, "image_size": 32, "patch_size": 8}
TEXT = {**SIZE, "vocab_size": 100, "max_position_embeddings": 8, "eos_token_id": 99, "bos_token_id": None}


class Encoder(nn.Module):
    """A model whose forward gives unit-norm features, so that wrappers around it see every forward."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        image = self.clip.get_image_features(pixel_values).pooler_output
        text = self.clip.get_text_features(input_ids).pooler_output
        features = {"image_features": F.normalize(image, dim=-1), "text_features": F.normalize(text, dim=-1)}
        return features | {"logit_scale": self.clip.logit_scale.exp()}


def sharded(encoder: Encoder) -> Any:
    """By FSDP, all but logit_scale: it takes no scalars. ClipLoss gives that the same gradient on all ranks."""
    for layer in [*encoder.clip.vision_model.encoder.layers, *encoder.clip.text_model.encoder.layers]:
        fully_shard(layer)
    return fully_shard(encoder, ignored_params={encoder.clip.logit_scale})


@contextlib.contextmanager
def without_reduction(model: Any) -> Iterator[None]:
    """FSDP's no_sync: the gradients of all chunks are reduced once, with the last one's."""
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--how", choices=["ddp", "fsdp", "accelerate"], default="ddp")
    parser.add_argument("--batch", type=int, default=64, help="pairs per step, of all processes together")
    parser.add_argument("--chunk", type=int, default=16, help="pairs that a process has activations of at a time")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()

    torch.manual_seed(0)  # the same weights on every rank
    model: Any = Encoder(CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)  # where FSDP and NCCL look for it
    model.to(device)
    options: dict[str, Any] = {}
    if args.how == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator()
        model = accelerator.prepare(model)
        options = {"backward": accelerator.backward, "no_sync": lambda: accelerator.no_sync(model)}
        rank, world_size = accelerator.process_index, accelerator.num_processes
    else:
        if "RANK" in os.environ:
            dist.init_process_group()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if args.how == "fsdp":
            model = sharded(model)
            options = {"no_sync": lambda: without_reduction(model)}
        elif world_size > 1:
            model = nn.parallel.DistributedDataParallel(model)
            options = {"no_sync": model.no_sync}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_fn = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)

    data = torch.Generator().manual_seed(1)
    pixels = torch.randn(args.batch, 3, 32, 32, generator=data)
    ids = torch.randint(3, 100, (args.batch, 8), generator=data)
    own = slice(rank, None, world_size)  # a loader would read this rank's pairs only, and others at every step
    for step in range(args.steps):
        optimizer.zero_grad()
        loss = forward_backward(
            encode=lambda chunk: model(**chunk),
            loss_of=lambda features: loss_fn(**features),
            batch={"pixel_values": pixels[own].to(device), "input_ids": ids[own].to(device)},
            chunk_size=args.chunk,
            **options,
        )
        optimizer.step()
        if world_size > 1:
            dist.all_reduce(loss, op=dist.ReduceOp.SUM)
        if rank == 0:
            print(f"step {step}: loss {loss.item() / world_size:.5f}")
    if dist.is_initialized():
        time.sleep(0.1)  # for gloo's threads to let go of tensors, which aborts when Python has ended: pytorch#179291
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
