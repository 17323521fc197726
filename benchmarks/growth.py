"""Measure how time and memory grow with the pool, the queries and the workers.

    ./run_all.sh python benchmarks/growth.py [--output figures/mine] [--only pool workers]
        [--rounds 3]

Every run is a process of its own, which scores a fresh store through the library's own functions:
seconds without loading the model, and the most memory that it held (with Ray, that of the driver
alone); medians of the rounds. Small ends are runs of SmolLM2-135M on the suite `grid`, long ends of
a tiny model with random weights on random words. Exponents are slopes of log seconds on log size;
one of 1 is proportional.

- pool: N grows 16 times and more, M stays.
- queries: M grows, N stays.
- workers: the same work without Ray, and with one and two of its workers on one thread each.
- resume: opening, checking and reading a finished store of 5,000 parts, and one that lacks a part.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

from icprobe import figures
from icprobe.artifact import provenance
from icprobe.data import assets, paths
from icprobe.methods import icp
from icprobe.methods.gradient import GradientProducts
from icprobe.scores import Experiment, score, store

WORDS = [f"w{k}" for k in range(500)]
PARTS = 5000

# how much: tiny for the long end, the default model for the short one
POOL = {"tiny": ([512, 1024, 2048, 4096, 8192], 8), "smollm2": ([4, 8, 16, 32, 64], 6)}
QUERIES = {"tiny": ([8, 16, 32, 64, 128], 512), "smollm2": ([3, 6, 12, 24, 48], 16)}
METHODS = ("probing", "gradient products")
MEASURED = ("pool", "queries", "workers", "resume")


def tiny_model(folder: Path) -> str:
    """Save a tiny model with random weights, whose tokens are words."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {word: k for k, word in enumerate(["?", *WORDS])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


def random_rows(file: Path, count: int, seed: int) -> str:
    """Write examples of random words: 20 to 60 in the prompt, 2 to 10 in the completion."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high + 1)))

    with file.open("w", encoding="utf-8") as lines:
        for k in range(count):
            row = {"id": f"{seed}-{k}", "prompt": text(20, 60), "completion": f" {text(2, 10)}"}
            lines.write(json.dumps(row) + "\n")
    return str(file)


def experiment(model: str, n: int, m: int, folder: Path) -> Experiment:
    """Return what is to be scored."""
    if model == "tiny":
        sources = {
            "model": tiny_model(folder / "model"),
            "train": random_rows(folder / "train.jsonl", n, 1),
            "queries": random_rows(folder / "queries.jsonl", m, 2),
        }
    else:
        sources = {"model": assets.DEFAULT_MODEL, "train": "grid", "queries": "grid"}
        sources |= {"n_train": n, "n_query": m}
    return Experiment(scores_dir=str(folder / "scores"), **sources)


def run_one(what: dict) -> dict:
    """Score one fresh store in this process; return seconds and GiB."""
    if what["engine"] == "ray":
        import ray

        from icprobe.scores import ray_engine

        ray.init(
            "local", num_cpus=what["workers"], object_store_memory=ray_engine.OBJECT_STORE,
            include_dashboard=False, log_to_driver=False,
        )  # fmt: skip
    torch.set_num_threads(what["threads"])
    with tempfile.TemporaryDirectory() as folder:
        scored = experiment(what["model"], what["n"], what["m"], Path(folder))
        lm = scored.load_model()
        scored.load_data()
        if what["engine"] == "ray":  # models are loaded, as the driver's is
            few = Path(folder, "few")
            few.mkdir()
            warm_up = replace(scored, scores_dir=str(few))
            score(warm_up.part(32, 1), icp.probing(), lm, engine="ray")
            (workers,) = ray_engine._workers.values()
            ray.get([worker.prepare.remote() for worker in workers])
            if len(workers) != what["workers"]:
                sys.exit(f"{len(workers)} workers, expected {what['workers']}: too little memory?")
        start = time.perf_counter()
        if what["method"] == "probing":
            score(scored, icp.probing(), lm, what["engine"])
        else:
            score(scored, GradientProducts(), lm, what["engine"])
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "gib": provenance.peak_memory()}


def in_own_process(what: dict) -> dict:
    """Run `run_one` in a process of its own; return what it returns."""
    command = [sys.executable, __file__, "--one", json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=paths.ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured(runs: list[dict], rounds: int) -> pd.DataFrame:
    """Run all, and all again; return medians of seconds and GiB, and the seconds' range."""
    took = [[] for _ in runs]
    for k in range(rounds):
        for what, found in zip(runs, took, strict=True):
            found.append(in_own_process(what))
            told = ", ".join(f"{name} {value}" for name, value in (what | found[-1]).items())
            print(f"round {k + 1}: {told}", flush=True)
    rows = []
    for what, found in zip(runs, took, strict=True):
        found = pd.DataFrame(found)
        low, high = found["seconds"].min(), found["seconds"].max()
        rows.append(what | found.median().to_dict() | {"low": low, "high": high, "rounds": rounds})
    return pd.DataFrame(rows)


def growing(sizes: dict, varied: str) -> Iterator[dict]:
    """Yield the runs in which N or M grows."""
    plain = {"engine": "local", "workers": 1, "threads": torch.get_num_threads()}
    for model, (values, other) in sizes.items():
        for method in METHODS:
            for value in values:
                n, m = (value, other) if varied == "n" else (other, value)
                yield {"model": model, "method": method, "n": n, "m": m, **plain}


def spread() -> Iterator[dict]:
    """Yield the runs without Ray and with it."""
    for method, n in zip(METHODS, (32, 128), strict=True):
        work = {"model": "smollm2", "method": method, "n": n, "m": 12}
        yield work | {"engine": "local", "workers": 1, "threads": 1}
        yield work | {"engine": "local", "workers": 1, "threads": 2}
        for workers in (1, 2):
            yield work | {"engine": "ray", "workers": workers, "threads": 1}


def exponents(table: pd.DataFrame, varied: str) -> pd.DataFrame:
    """Return the slopes of log seconds, and of log GiB, on log size: all sizes, and the upper half.

    And by how many MiB memory grew from the first size to the last.
    """
    rows = []
    for (model, method), part in table.groupby(["model", "method"], sort=False):
        part = part.sort_values(varied)
        size = np.log(part[varied])
        slopes = [
            np.polyfit(size[at], np.log(part[of])[at], 1)[0]
            for of in ("seconds", "gib")
            for at in (slice(None), slice(len(size) // 2, None))
        ]
        grown = (part["gib"].iloc[-1] - part["gib"].iloc[0]) * 1024
        ends = part[varied].iloc[[0, -1]].astype(int)
        rows.append((model, method, varied.upper(), *ends, *slopes, grown))
    columns = ["model", "method", "grows", "first", "last", "seconds", "seconds_upper"]
    return pd.DataFrame(rows, columns=[*columns, "gib", "gib_upper", "grown"])


def resume() -> pd.DataFrame:
    """Return the seconds of opening a store of many parts, of one missing part, and of reading."""
    rng, M = np.random.default_rng(0), 100
    ids = [f"train-{k}" for k in range(PARTS)], [f"query-{j}" for j in range(M)]
    rows = {}

    def timed(name: str, work) -> object:
        start = time.perf_counter()
        result = work()
        rows[name] = time.perf_counter() - start
        return result

    def opened() -> store.ScoreStore:
        return store.open(folder, "made_up", {}, *ids, block_size=1)

    def resumed() -> np.ndarray:
        kept = opened()
        for block in kept.missing():
            kept.write(block, scores[[block]])
        return kept.matrix()

    with tempfile.TemporaryDirectory() as folder:
        scores = rng.normal(size=(PARTS, M)).astype(np.float32)
        first = timed("create", opened)
        timed("write all parts", lambda: [first.write(k, scores[[k]]) for k in range(PARTS)])
        timed("open", opened)
        timed("find what is missing", first.missing)
        timed("read all scores", first.matrix)
        first.part(PARTS // 2).unlink()
        timed("resume one missing part and read all", resumed)
    return pd.DataFrame({"what": rows.keys(), "parts": PARTS, "seconds": rows.values()})


def main() -> None:
    """Run what is asked for, and write growth.csv, exponents.csv, workers.csv and resume.csv."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="figures/mine", help="a folder (figures/mine)")
    parser.add_argument(
        "--only", nargs="+", choices=MEASURED, default=MEASURED, help="what to measure (all)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(json.loads(options.one))))
        return
    growth, slopes = [], []
    for name, sizes, varied in (("pool", POOL, "n"), ("queries", QUERIES, "m")):
        if name in options.only:
            table = measured(list(growing(sizes, varied)), options.rounds)
            growth.append(table.assign(grows=varied.upper()))
            slopes.append(exponents(table, varied))
    if growth:
        figures.save_table(pd.concat(growth), "growth", paths.resolve(options.output))
        figures.save_table(pd.concat(slopes), "exponents", paths.resolve(options.output))
        print(pd.concat(slopes).to_string())
    if "workers" in options.only:
        table = measured(list(spread()), options.rounds)
        figures.save_table(table, "workers", paths.resolve(options.output))
        print(table.to_string())
    if "resume" in options.only:
        table = resume()
        figures.save_table(table, "resume", paths.resolve(options.output))
        print(table.to_string())


if __name__ == "__main__":
    main()
