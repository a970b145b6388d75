"""A process of tests/test_distributed.py: `ddp_process.py FOLDER FIRST LAST` takes these steps with the shared optimizer; two
processes then check the gradients that DDP makes."""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

import train
from experiments.processes import norm
from model import Group
from rollout import RANK, WORLD, gather, load_prompt
from train import MasterAdamW

SHAPES = {"large": (64, 33), "small": (7,), "other": (40, 40), "unused": (5,)}
QUIET = 5       # no parameter has a gradient in this step; "small" has none in odd ones, "unused" in any


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def gradient(name: str, step: int, dtype: torch.dtype) -> torch.Tensor:
    """What DDP leaves in every process."""
    rests = step == QUIET or name == "unused" or name == "small" and step % 2
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(step * 10 + len(name))).to(dtype) * (not rests)


def steps(folder: Path, dtype: torch.dtype, first: int, last: int) -> None:
    """Take these steps and save what this process knows; goes on from what others saved if first > 0."""
    weights = parameters(dtype)
    optimizer = MasterAdamW(weights.items(), 1e-2, 0.1, "cpu")
    if first:
        for name, weight in torch.load(folder / "weights.pt").items():
            weights[name].data.copy_(weight)
        for path in sorted(folder.glob("optimizer-*.pt")):
            optimizer.load_state_dict(torch.load(path, mmap=True))
    norms = []
    for step in range(first, last):
        for name, weight in weights.items():
            weight.grad.copy_(gradient(name, step, dtype))
        norms.append(optimizer.step(1.0))
        if step == 5:       # for others to go on from
            save(folder.parent / "at-6" / folder.name, weights, optimizer)
    gather(None)    # all have read
    save(folder, weights, optimizer)
    torch.save(norms, folder / f"norms-{RANK}.pt")


def save(folder: Path, weights: dict[str, torch.nn.Parameter], optimizer: MasterAdamW) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"optimizer-{RANK}.pt").unlink(missing_ok=True)       # it may still be mapped into memory
    torch.save(optimizer.state_dict(), folder / f"optimizer-{RANK}.pt")
    torch.save({name: weight.data for name, weight in weights.items()}, folder / ("weights.pt" if RANK == 0 else f"own-{RANK}.pt"))


# Which groups each of two processes holds: places 0 and 1 have an image, 2 and 3 do not. One group is a micro-batch, and the last one
# of a process is the only one that is not under no_sync.
CASES = {"the image on one process only": ([0, 1], [2, 3]), "the image only under no_sync": ([0, 2], [1, 3]), "the image nowhere": ([2], [3]),
         "the image only under no_sync, of one process": ([0, 2], [3]), "an empty process": ([0, 1, 3], []), "an empty main process": ([], [1, 3]),
         "unequal micro-batches": ([0, 2, 1], [3]), "nothing anywhere": ([], [])}


def check_gradients(folder: Path) -> None:
    """update_policy under DDP in two processes against one backward pass over everything, in this process, without DDP."""
    Qwen2_5_VLRMSNorm.forward = norm        # float64 throughout
    config = train.Config(output_dir=str(folder / "run"), dtype="float64", device="cpu", group_size=3, prompts_per_rollout=4, prompts_per_update=4,
                          micro_batch_tokens=1, eval_data="tiny_data/test.jsonl")
    run = train.start(config)
    assert isinstance(run.engine, DistributedDataParallel) and run.engine.module is run.policy
    places = check_places(run)
    generator, groups = torch.Generator().manual_seed(0), []
    texts = [{"question": f"How much is {a} plus 3?", "images": []} for a in range(2)]
    for longest, example in zip((9, 5, 7, 4), run.train_examples[:2] + texts):
        mask = torch.arange(longest) < torch.tensor([longest, 1, 3])[:, None]
        groups.append(Group(load_prompt(run.policy, example, 4096), torch.randint(10, 250, mask.shape, generator=generator), mask, [""] * 3))
    found = []
    run.optimizer.step = lambda max_grad_norm: found.append({name: p.grad.clone() for name, p in run.policy.named_parameters()}) or [
        p.grad.zero_() for p in run.policy.parameters()] and 1.0
    for name, shares in CASES.items():
        rewards = torch.tensor([[0.0, 1.0, 0.1], [1.0, 1.0, 0.0], [0.3, 0.2, 0.0], [0.0, 0.0, 1.0]])
        batches = [train.dual_pass(run.policy, config, [groups[i] for i in share], rewards[share], torch.tensor(share, dtype=torch.long))
                   for share in (*shares, sum(shares, []))]
        found.clear()
        train.update_policy(run, batches[RANK])
        whole, loss = batches[2], 0.0
        for i, group in enumerate(whole.groups):
            logps, _ = run.policy([group])
            rows = slice(3 * i, 3 * i + 3)
            losses = -(logps - logps.detach()).exp() * whole.token_advantages[rows, :logps.shape[1]]
            loss = loss + losses[group.mask].sum() / whole.mask.sum()
        if not whole.groups:
            assert not found, name          # no update at all
            continue
        expected = torch.autograd.grad(loss, list(run.policy.parameters()), allow_unused=True)      # leaves p.grad and DDP alone
        assert len(found) == 1 and max(grad.abs().max() for grad in found[0].values()) > 1e-3, name
        largest = max(grad.abs().max() for grad in expected if grad is not None)
        for (key, ours), grad in zip(found[0].items(), expected):
            difference = (ours - (0 if grad is None else grad)).abs().max()
            assert difference < 1e-12 * largest, (name, key, difference, largest)
    assert places == [p.grad.data_ptr() for p in run.policy.parameters()]
    (folder / f"checked-{RANK}").write_text(" ".join(CASES))
    run.engine = run.policy         # DDP must go before its process group


def check_places(run) -> list[int]:
    """Gradients stay where they are: DDP's buckets, from before the first backward pass."""
    pointers = lambda: [p.grad.data_ptr() for p in run.policy.parameters()]     # noqa: E731
    places, one = pointers(), [Group(load_prompt(run.policy, run.train_examples[0], 4096), torch.tensor([[11, 12]]), torch.ones(1, 2).bool(), [""])]
    for _ in range(2):
        with run.engine.no_sync():
            run.engine(one)[0].sum().backward()
        assert pointers() == places
        run.engine(one)[0].sum().backward()
        assert pointers() == places and any(p.grad.any() for p in run.policy.parameters())
        run.optimizer.step(1.0)
        assert pointers() == places and not any(p.grad.any() for p in run.policy.parameters())
    # Views of a few large buckets, not tensors of their own that happen to stay.
    storages = {p.grad.untyped_storage().data_ptr() for p in run.policy.parameters()}
    assert len(storages) < len(places) / 10
    return places


def main(folder: Path, first: int, last: int) -> None:
    if WORLD > 1:
        dist.init_process_group("gloo")
    for dtype in (torch.bfloat16, torch.float32):
        steps(folder / str(dtype), dtype, first, last)
    if WORLD == 2:
        dist.init_process_group = lambda *args, **kwargs: None      # train.start finds it done
        check_gradients(folder)
    gather(None)    # wait for all
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
