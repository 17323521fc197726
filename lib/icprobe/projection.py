"""Projected gradients: small stand-ins whose inner products estimate those of the gradients.

The weight gradient W' = G^T X [d_out, d_in] of a linear layer (see `gradients`) is projected from
both sides by random matrices P_out [k_out, d_out] and P_in [k_in, d_in],

    P_out W' P_in^T = (G P_out^T)^T (X P_in^T),

so W' itself is never made (the Kronecker form of LoGra, Choe et al. 2024, "What is your data worth
to GPT?"). Entries are +1 or -1 over sqrt(k), so E[P^T P] = I, and as the two sides are drawn
independently, the inner product of two projections has the inner product of the gradients as its
mean; its standard deviation falls with 1 / sqrt(size). Signs rather than normal entries: P^T P then
has ones on its diagonal for certain, the variance is never larger, and the matrices are the same
bits everywhere. A side with d <= size is not projected and adds no error.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.numpy import save
from torch import nn
from tqdm import tqdm

from icprobe import gradients, store
from icprobe import lm as language_model
from icprobe.experiment import Experiment
from icprobe.lm import LM, Encoded
from icprobe.paths import resolve, shown
from icprobe.store import MANIFEST, StoreError

# training examples in one part of a stored pool
BLOCK_SIZE = 32

FORMAT = 1
OUR_FILE = re.compile(
    r"(?P<target>part-\d{5,}\.safetensors|manifest\.json)(?P<tmp>\.[0-9a-f]{32}\.tmp)?"
)


class Projection:
    """The random matrices of a model's layers, ready for any number of examples.

    A layer's matrices depend on the seed and its name only: not on the other layers chosen, the
    device or the examples.

    Attributes:
        matrices: (P_out, P_in) by layer name.
        columns: Where each layer's k_out k_in numbers stand among the K.
        width: K.
    """

    def __init__(self, lm: LM, size: int, layers: str = "", seed: int = 0) -> None:
        """Draw the matrices.

        Args:
            lm: The model.
            size: k, the most rows of each matrix. K is at most size^2 for each layer.
            layers: See `gradients.linear_layers`.
            seed: Which matrices are drawn.

        Raises:
            ValueError: If the size is not a positive integer, or no layer matches.
        """
        if type(size) is not int or size < 1:
            raise ValueError(f"size is {size!r}, expected a positive integer")
        self.lm, self.layers = lm, layers
        self.matrices: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.columns: dict[str, slice] = {}
        self.width = 0
        for name, layer in gradients.linear_layers(lm, layers).items():
            d_out, d_in = layer.weight.shape
            if not isinstance(layer, nn.Linear):  # a Conv1D's weight is [d_in, d_out]
                d_out, d_in = d_in, d_out
            p_out = _matrix(size, d_out, f"{seed} {name} out").to(lm.device)
            p_in = _matrix(size, d_in, f"{seed} {name} in").to(lm.device)
            self.matrices[name] = p_out, p_in
            start, self.width = self.width, self.width + len(p_out) * len(p_in)
            self.columns[name] = slice(start, self.width)

    def project(
        self, examples: Sequence[Encoded], loss_on: str = "completion", reduction: str = "sum"
    ) -> np.ndarray:
        """Return the projected gradients of n encoded examples: float32 [n, K].

        One forward and backward pass for each example; for arguments and errors see
        `projected_gradients`.
        """
        result = np.empty((len(examples), self.width), np.float32)
        for batch in gradients.batches(self.lm, examples):
            chosen = [examples[i] for i in batch]
            factors = gradients.factors(self.lm, chosen, self.layers, loss_on, reduction)
            rows = torch.zeros(len(batch), self.width, device=self.lm.device)
            for x, group in zip(factors.inputs, factors.outputs, strict=True):
                x = x.float()
                for name, g in group.items():
                    p_out, p_in = self.matrices[name]
                    block = (g.float() @ p_out.T).mT @ (x @ p_in.T)
                    # added, for a layer that is used twice
                    rows[:, self.columns[name]] += block.flatten(1)
            result[batch] = rows.cpu().numpy()
            wrong = [repr(examples[i].id) for i in batch if not np.isfinite(result[i]).all()]
            if wrong:
                raise FloatingPointError(
                    f"projected gradient is not finite: examples {', '.join(wrong)}"
                )
        return result


def projected_gradients(
    lm: LM,
    examples: Iterable,
    size: int,
    layers: str = "",
    seed: int = 0,
    loss_on: str = "completion",
    reduction: str = "sum",
    max_length: int | None = None,
) -> np.ndarray:
    """Return the projected gradients of N examples' losses: float32 [N, K].

    For A [N, K] of training examples and B [M, K] of queries, projected with the same size, layers
    and seed, A @ B.T estimates `influence.gradient_dot` without bias: in nats per unit of learning
    rate, positive = the training example helps. With a size no smaller than any layer's dimensions
    it is exact.

    Args:
        lm: The model.
        examples: N rows with id, prompt, completion (or encoded already).
        size: k; K is at most size^2 for each layer. See `Projection`.
        layers: See `gradients.linear_layers`.
        seed: Which random matrices are drawn.
        loss_on: "completion", or "text" for the prompt, too. Queries take the default.
        reduction: "sum" or "mean" over these tokens. Queries take the default.
        max_length: Most tokens of one example, see `lm.encode`.

    Raises:
        ValueError: If an option is unknown, no layer matches, or an example has no completion
            tokens.
        FloatingPointError: If a gradient is not finite; names the examples.
    """
    encoded = language_model.encode(lm, examples, max_length)
    return Projection(lm, size, layers, seed).project(encoded, loss_on, reduction)


@dataclass(frozen=True)
class ProjectedPool:
    """Projected gradients of a training pool on disk, in blocks of `block_size` examples.

        <scores_dir>/projected-<key>/
            manifest.json            everything that determines the numbers, and the ids of the rows
            part-00000.safetensors   "gradients", float32 [block_size, K], of the first examples
            part-00001.safetensors   ... of the next

    Made by `store_pool`, by the rules of `store`: a file appears whole under its name and never
    changes, so a run may be killed and started again, and many processes may fill one folder.

    Attributes:
        folder: Where the manifest and the parts lie.
        identity: Everything that determines the numbers: model, pool, options.
        train_ids: Ids of the N rows.
        block_size: Training examples in one part (the last part may have fewer).
    """

    folder: Path
    identity: dict
    train_ids: list[str]
    block_size: int

    @property
    def n_blocks(self) -> int:
        """Number of parts of the finished pool."""
        return -(-len(self.train_ids) // self.block_size)

    def scores(self, lm: LM, queries: Iterable) -> np.ndarray:
        """Return the estimated gradient dot products with any queries: float32 [N, M].

        In nats per unit of learning rate, positive = helps. One forward and backward pass for each
        query and none for the pool, which is read one part at a time; the queries' projected
        gradients [M, K] are held in memory.

        Args:
            lm: The model that the pool was projected with.
            queries: M rows with id, prompt, completion (or encoded already).

        Raises:
            ValueError: If the model is another one, or a query has no completion tokens.
            FloatingPointError: If a gradient is not finite; names the queries.
            StoreError: If a part is missing, damaged or foreign; names it.
        """
        if lm.identity != self.identity["model"]:
            raise ValueError(f"model {lm.identity} is not the pool's {self.identity['model']}")
        if missing := self.missing():
            raise StoreError(f"{shown(self.part(missing[0]))} is missing: run `store_pool` again")
        size, layers, seed = (self.identity["options"][name] for name in ("size", "layers", "seed"))
        max_length = self.identity["max_length"]
        theirs = projected_gradients(lm, queries, size, layers, seed, max_length=max_length)
        return np.concatenate([self.read(block) @ theirs.T for block in range(self.n_blocks)])

    def rows(self, block: int) -> range:
        """Return the row numbers of a block."""
        return range(len(self.train_ids))[block * self.block_size : (block + 1) * self.block_size]

    def part(self, block: int) -> Path:
        """Return the path of a block's part, whether or not it is there."""
        return self.folder / f"part-{block:05d}.safetensors"

    def missing(self) -> list[int]:
        """Return the unfinished blocks; no part is opened."""
        return [block for block in range(self.n_blocks) if not self.part(block).exists()]

    def write(self, block: int, projected: np.ndarray) -> None:
        """Write one block, float32 [n, K]; one that is already finished is left as it is."""
        tag = {**self._tag(block), "crc32": zlib.crc32(projected)}
        data = save({"gradients": projected}, metadata={"icprobe": json.dumps(tag)})
        store._publish(self.part(block), data)

    def read(self, block: int) -> np.ndarray:
        """Read and check one block: float32 [n, K].

        Raises:
            StoreError: If the part is truncated, damaged or foreign; names it.
        """
        try:
            with safetensors.safe_open(self.part(block), "np") as file:
                tag = json.loads((file.metadata() or {}).get("icprobe", "{}"))
                projected = file.get_tensor("gradients")
            checksum = tag.pop("crc32", None)
            if tag != self._tag(block):
                raise StoreError(f"it belongs to {tag or 'something else'}")
            if checksum != zlib.crc32(projected):
                raise StoreError("its checksum is wrong")
        except (safetensors.SafetensorError, ValueError) as error:
            raise StoreError(
                f"{shown(self.part(block))} is damaged or foreign: {error}. Delete this file and "
                "run `store_pool` again; only its rows will be computed."
            ) from error
        return projected

    def tidy(self) -> None:
        """Remove temporary files that killed processes left beside the finished file."""
        for path, match in self._our_files():
            if match["tmp"] and (self.folder / match["target"]).exists():
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete this pool's files, the manifest last; other files stay."""
        for path, _ in sorted(self._our_files(), key=lambda file: file[0].name == MANIFEST):
            path.unlink(missing_ok=True)

    def _our_files(self) -> list[tuple[Path, re.Match]]:
        paths = sorted(self.folder.glob("*"))
        return [(path, match) for path in paths if (match := OUR_FILE.fullmatch(path.name))]

    def _tag(self, block: int) -> dict:
        """Return what ties a part to its place in this pool."""
        ids = [self.train_ids[row] for row in self.rows(block)]
        return {"store": self.folder.name, "train_ids": ids}

    def _manifest(self) -> bytes:
        fields = {
            "format": FORMAT,
            "description": "projected gradients; their products are in nats per unit of learning "
            "rate, positive = helps",
            "block_size": self.block_size,
            "identity": self.identity,
            "made_with": store._made_with(),
            "train_ids": self.train_ids,
        }
        return (json.dumps(fields, indent=1) + "\n").encode()


def store_pool(
    experiment: Experiment,
    lm: LM,
    size: int,
    layers: str = "",
    seed: int = 0,
    loss_on: str = "completion",
    reduction: str = "sum",
    fresh: bool = False,
) -> ProjectedPool:
    """Project the gradients of the experiment's pool once, for any number of query sets.

    Finished parts are reused, so an interrupted run goes on where it stopped. The folder's key does
    not depend on the experiment's queries.

    Args:
        experiment: Which pool of N, and where scores lie.
        lm: The experiment's model; one forward and backward pass for each training example.
        size: See `projected_gradients`; a training example takes 4 K bytes.
        layers: The same.
        seed: The same.
        loss_on: The same.
        reduction: The same.
        fresh: Delete this pool's files first, so that everything is computed anew.

    Raises:
        ValueError: If the model is not the experiment's, an option is unknown, no layer matches, or
            an example has no completion tokens.
        FloatingPointError: If a gradient is not finite; names the examples. Finished parts stay.
        StoreError: If the manifest is damaged or of another pool (the fields that differ are
            named), or the folder cannot be written.
    """
    if lm.identity != experiment.identity["model"]:
        raise ValueError(f"model {lm.identity} is not {experiment.identity['model']}")
    examples = language_model.encode(lm, experiment.load_data()[0], experiment.max_length)
    options = {
        "size": size,
        "seed": seed,
        "layers": layers,
        "loss_on": loss_on,
        "reduction": reduction,
    }
    identity = experiment.identity_of("projected", options)
    del identity["queries"]  # new query sets meet the same pool
    pool = _open(experiment.scores_dir, identity, [example.id for example in examples], fresh)
    missing = pool.missing()
    done = len(examples) - sum(len(pool.rows(block)) for block in missing)
    print(f"projected: reused {done} of {len(examples)} rows from {shown(pool.folder)}")
    if missing:
        projection = Projection(lm, size, layers, seed)
        with tqdm(desc="projected", total=len(examples), initial=done, unit=" examples") as bar:
            for block in missing:
                rows = pool.rows(block)
                if not pool.part(block).exists():  # another process may have been faster
                    mine = examples[rows.start : rows.stop]
                    pool.write(block, projection.project(mine, loss_on, reduction))
                bar.update(len(rows))
        pool.tidy()
    return pool


def _open(scores_dir: str, identity: dict, train_ids: list[str], fresh: bool) -> ProjectedPool:
    """Create a pool's folder and manifest, or return to those that are there."""
    folder = resolve(scores_dir) / store._folder_name("projected", identity)
    asked = ProjectedPool(folder, store._plain(identity), train_ids, BLOCK_SIZE)
    if fresh:
        asked.clear()
    path = folder / MANIFEST
    if not path.exists():
        store._publish(path, asked._manifest())
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise StoreError(f"format: stored {fields['format']!r}, asked {FORMAT!r}")
        stored = ProjectedPool(
            folder, fields["identity"], fields["train_ids"], int(fields["block_size"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{shown(path)} cannot be used ({error!r}): restore it, or start this pool anew "
            "(fresh=True)"
        ) from error
    store._require_same(stored, identity=asked.identity, train_ids=asked.train_ids)
    stored.tidy()
    return stored


def _matrix(size: int, d: int, key: str) -> torch.Tensor:
    """Return P: random signs over sqrt(size), float32 [size, d], or the identity [d, d].

    The signs are bits of a hash of the key, the same on every machine and with every library
    version: a pool that is stored today can be compared with the queries of any other day.
    """
    if size >= d:
        return torch.eye(d)
    stream = hashlib.shake_256(key.encode()).digest(-(-size * d // 8))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=size * d)
    signs = torch.from_numpy(bits).view(size, d).float().mul_(2).sub_(1)
    return signs / size**0.5
