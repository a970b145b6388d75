"""A process of tests/test_distributed.py: `optimizer_process.py FOLDER FIRST LAST` takes these steps with the shared optimizer."""
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from train import RANK, WORLD, MasterAdamW

SHAPES = {"large": (64, 33), "small": (7,), "other": (40, 40), "unused": (5,)}


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def gradient(name: str, step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(step * 10 + len(name))).to(dtype)


def steps(folder: Path, dtype: torch.dtype, first: int, last: int) -> None:
    """Each parameter's gradient comes from one process, in turn; the others have none, or zeros. Resumes if it can."""
    weights = parameters(dtype)
    optimizer = MasterAdamW(weights.items(), 1e-2, 0.1, "cpu")
    if first:
        for name, weight in torch.load(folder / "weights.pt").items():
            weights[name].data.copy_(weight)
        for path in sorted(folder.glob("optimizer-*.pt")):
            optimizer.load_state_dict(torch.load(path, mmap=True))
    norms = []
    for step in range(first, last):
        for index, name in enumerate(SHAPES):
            if name != "unused" and (step + index) % WORLD == RANK:
                weights[name].grad = gradient(name, step, dtype)
            elif name == "small":
                weights[name].grad = torch.zeros_like(weights[name])
        norms.append(optimizer.step(1.0))
    if WORLD > 1:
        dist.barrier()
    for path in folder.glob("optimizer-*.pt") if RANK == 0 else ():
        path.unlink()
    if WORLD > 1:
        dist.barrier()
    torch.save(optimizer.state_dict(), folder / f"optimizer-{RANK}.pt")
    torch.save({name: weight.data for name, weight in weights.items()}, folder / ("weights.pt" if RANK == 0 else f"own-{RANK}.pt"))
    torch.save(norms, folder / f"norms-{RANK}.pt")


if __name__ == "__main__":
    if WORLD > 1:
        dist.init_process_group("gloo")
    for dtype in (torch.bfloat16, torch.float32):
        place = Path(sys.argv[1]) / str(dtype)
        place.mkdir(exist_ok=True, parents=True)
        steps(place, dtype, int(sys.argv[2]), int(sys.argv[3]))
    if WORLD > 1:
        dist.destroy_process_group()
