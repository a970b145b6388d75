"""Train many methods with many seeds, and say by how much they differ and how sure that is.

    python -m experiments.compare runs/compare --methods dapo,pgpo,half --seeds 8 --jobs 2
    python -m experiments.compare runs/lr --tune learning_rate=5e-5,1e-4,2e-4 max_grad_norm=1,100 ...
    python -m experiments.compare runs/compare --table          the table again, of what is there
    python -m experiments.report runs/compare/*/seed-*          the curves, a band for each method

Each run has a folder METHOD/seed-N and a process with one thread; --jobs of them at once, on the GPUs in turn if --device cuda.
What is finished is not repeated: the same command goes on where it was interrupted. --data names a folder with train.jsonl,
test.jsonl and model/ (see tiny_data/make.py --task); flags behind -- go to train.py. --tune first trains every method with all
combinations of these flags on the seeds 100, 101, ..., and takes for each the one with the best accuracy over its steps.

A variant on several GPUs, as train.py would run it: torchrun ... -m experiments.compare OUTPUT_DIR --one '{"method": "vppo"}' -- FLAGS

In the table: mean and standard error over the seeds; the difference to the first method with a 95 % interval, both paired by
seed (bootstrap, 10,000 draws); steps and prompts until three steps' mean accuracy reaches --goal.
"""
import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.logs import read_log
from rollout import fail

ENDS = {"save_every": 0, "eval_every": 10 ** 9}      # evaluated before and after, no checkpoints
SETTINGS = {        # flags of train.py, by the name of the method here; those of experiments/variants.py too
    "grpo": {"method": "grpo"}, "dapo": {"method": "dapo"}, "pgpo": {"method": "pgpo"}, "pgpo-grpo": {"method": "pgpo-grpo"},
    "tau-0": {"tau": 0.0}, "tau-1": {"tau": 1.0}, "no-mass": {"conserve_mass": False}, "vppo": {"method": "vppo"},
    "quantile": {"method": "quantile"}, "half": {"method": "half"}, "half-gate": {"method": "half-gate"}, "exact": {"method": "exact"},
    "exact-tau-0": {"method": "exact", "tau": 0.0},
    **{f"tau-{tau}-beta-{beta}": {"tau": tau, "beta": beta} for tau in (0.2, 0.4, 0.6) for beta in (1.0, 2.0)}}     # table 3


def run(folder: Path, flags: dict, rest: list[str], device: int | None) -> None:
    """One run in a process of its own, unless it is there already; what was interrupted begins anew."""
    done, name = folder / "done.json", folder.parent.name
    if done.exists():
        if json.loads(done.read_text()) != [flags, rest]:
            fail(f"{folder} was made with other flags: choose another folder, or delete it")
        return
    shutil.rmtree(folder, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
    begun = time.perf_counter()
    process = subprocess.run([sys.executable, "-m", "experiments.compare", str(folder), "--one", json.dumps(flags), "--", *rest],
                             env=environment, capture_output=True, text=True)
    if process.returncode:
        fail(f"{name}, {folder.name}: {process.stderr.strip().splitlines()[-1]}")
    done.write_text(json.dumps([flags, rest]))
    (folder / "seconds").write_text(f"{time.perf_counter() - begun:.1f}")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def one(folder: Path, flags: dict, rest: list[str]) -> None:
    """The work of such a process: train.py with a method or variant, and these flags."""
    import experiments.variants  # noqa: F401    # its methods are now train.py's
    import train
    config = train.parse(rest)
    for name, value in flags.items():
        setattr(config, name, value)
    config.output_dir = str(folder)
    train.main(config)


def figures(folder: Path, goal: float) -> dict[str, float]:
    """What the table says of one run."""
    log = read_log(str(folder))
    steps = [record for record in log if "reward" in record]
    held_out = [record["eval_accuracy"] for record in log if "eval_accuracy" in record]
    accuracy = np.array([record["accuracy"] for record in steps])
    smooth = np.convolve(accuracy, np.ones(3) / 3, "valid")
    reached = int(np.argmax(smooth >= goal)) + 3 if smooth.max() >= goal else np.nan
    prompts = np.cumsum([record["groups_sampled"] for record in steps])
    return {"mean accuracy": accuracy.mean(), "last ten": accuracy[-10:].mean(), "held-out": held_out[-1], "steps to goal": reached,
            "prompts to goal": prompts[reached - 1] if reached == reached else np.nan, "entropy at end": steps[-1]["entropy"],
            "S~ at end": steps[-1]["visual_dependency"] or np.nan, "effective": np.mean([record["effective_tokens"] for record in steps]),
            "grad norm": np.median([record["grad_norm"] for record in steps]), "fall": smooth.max() - smooth[-1]}


def difference(values: np.ndarray, others: np.ndarray) -> str:
    """The mean difference of paired values, and its 95 % interval by the bootstrap over pairs.

    >>> difference(np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.5, 2.5]))
    '+0.500 [+0.500, +0.500]'
    """
    apart = values - others
    drawn = np.random.default_rng(0).choice(apart, (10000, len(apart))).mean(1)
    return f"{apart.mean():+.3f} [{np.quantile(drawn, 0.025):+.3f}, {np.quantile(drawn, 0.975):+.3f}]"


def cells(runs: dict[str, dict], others: dict[str, dict]) -> list[str]:
    """A method's cells of the table: the figures of its runs by seed, and of those of the method that it is compared with."""
    column = {name: np.array([row[name] for row in runs.values()]) for name in next(iter(runs.values()))}
    both = [] if runs is others else sorted(runs.keys() & others.keys())
    found = [str(len(runs))]
    for name in ("mean accuracy", "last ten", "held-out"):
        error = f" ({column[name].std(ddof=1) / len(runs) ** 0.5:.3f})" if len(runs) > 1 else ""
        found.append(f"{column[name].mean():.3f}{error}")
    for name in ("mean accuracy", "held-out"):
        mine, theirs = (np.array([by_seed[seed][name] for seed in both]) for by_seed in (runs, others))
        found.append(difference(mine, theirs) if both else "-")
    reached = ~np.isnan(column["steps to goal"])
    found += [f"{column[name][reached].mean():.{digits}f}" if reached.any() else "-"
              for name, digits in (("steps to goal", 1), ("prompts to goal", 0))]
    found.append(f"{reached.sum()} of {len(runs)}")
    found.append(f"{column['entropy at end'].mean():.3f}, {column['S~ at end'].mean():.3f}")
    return found + [f"{column['effective'].mean():.3f}", f"{column['grad norm'].mean():.2f}", f"{column['fall'].max():.3f}"]


def table(folder: Path, methods: list[str], goal: float) -> str:
    """A row for each method, in Markdown. The first is what the others are compared with."""
    found = {method: {run.name: figures(run, goal) for run in sorted((folder / method).glob("seed-*")) if (run / "done.json").exists()}
             for method in methods}
    head = ["method", "seeds", "mean accuracy", "last ten", "held-out", f"mean accuracy, minus {methods[0]}'s", f"held-out, minus {methods[0]}'s",
            f"steps to {goal:g}", "prompts", "runs that reach it", "entropy, S~ at end", "effective tokens", "gradient norm", "largest fall"]
    rows = [head, ["---"] * len(head), *([method, *cells(runs, found[methods[0]])] for method, runs in found.items() if runs)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", default="dapo,pgpo", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--gpus", type=int, default=0, help="spread the jobs over so many")
    parser.add_argument("--data", type=Path, default=Path("tiny_data"))
    parser.add_argument("--goal", type=float, default=0.9)
    parser.add_argument("--tune", nargs="+", default=[], metavar="FLAG=A,B", help="choose these for each method, on other seeds")
    parser.add_argument("--tune_seeds", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--one", type=json.loads, metavar="JSON", help="one run, in this process, with these flags of train.py")
    arguments, rest = sys.argv[1:], []
    if "--" in arguments:
        arguments, rest = arguments[:arguments.index("--")], arguments[arguments.index("--") + 1:]
    args = parser.parse_args(arguments)
    if args.one is not None:
        one(args.folder, args.one, rest)
        return
    methods = args.methods.split(",")
    if unknown := set(methods) - set(SETTINGS):
        parser.error(f"--methods {min(unknown)}: it must be one of {', '.join(SETTINGS)}")
    if min(args.seeds, args.jobs, args.tune_seeds) < 1 or not all("=" in tuned for tuned in args.tune):
        parser.error("--seeds, --jobs and --tune_seeds are at least 1, --tune is FLAG=A,B")
    rest = [f"--model={args.data}/model", f"--train_data={args.data}/train.jsonl", f"--eval_data={args.data}/test.jsonl", *rest]

    def train_all(work: list[tuple[Path, dict]], label: str) -> None:
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(run, folder, flags, rest, number % args.gpus if args.gpus else None) for number, (folder, flags) in enumerate(work)]
            try:
                for job in tqdm(jobs, label, disable=None):
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    chosen = {method: {} for method in methods}
    if args.tune and not args.table:
        grid = [dict(zip([tuned.partition("=")[0] for tuned in args.tune], map(json.loads, values)))
                for values in itertools.product(*(tuned.partition("=")[2].split(",") for tuned in args.tune))]
        places = {method: [args.folder / "tuning" / f"{method}-{number}" for number in range(len(grid))] for method in methods}
        train_all([(place / f"seed-{seed}", SETTINGS[method] | flags | ENDS | {"seed": seed}) for method in methods
                   for place, flags in zip(places[method], grid) for seed in range(100, 100 + args.tune_seeds)], "tuning")
        for method in methods:
            scores = [np.mean([figures(path, args.goal)["mean accuracy"] for path in place.glob("seed-*")]) for place in places[method]]
            chosen[method] = grid[int(np.argmax(scores))]
            print(f"{method}: {chosen[method]} of " + ", ".join(f"{flags} {score:.3f}" for flags, score in zip(grid, scores)), flush=True)
    if not args.table:
        train_all([(args.folder / method / f"seed-{seed}", SETTINGS[method] | chosen[method] | ENDS | {"seed": seed})
                   for seed in range(args.seeds) for method in methods], "training")
    print(table(args.folder, methods, args.goal))


if __name__ == "__main__":
    main()
