"""The authors' files: full-size synthetic ones, a local server, and the real ones if there."""

import hashlib
import http.server
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch

from icprobe.artifact import runner
from icprobe.data import assets, authors_scores, cache, paths
from icprobe.data.authors_scores import M, N
from icprobe.statistics import authors_scores as published

REAL = paths.ROOT.parent / "shared" / "published"
CLOSED = "http://127.0.0.1:9"  # a closed port


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Write synthetic scores in the authors' layout; return the folder and the scores."""
    rng = np.random.default_rng(1)
    icp, influence = rng.integers(M + 1, size=N) / M, rng.normal(400, 60, size=(N, M))
    scores = authors_scores.Scores(icp, influence.astype(np.float32), False)
    folder = tmp_path_factory.mktemp("written")
    (folder / authors_scores.FOLDER).mkdir(parents=True)
    shares = {str(i): [share] for i, share in enumerate(scores.icp)}
    (folder / authors_scores.FOLDER / authors_scores.ICP_FILE).write_text(json.dumps(shares))
    parts = torch.from_numpy(scores.influence.T).split(N // authors_scores.PARTS, dim=1)
    for name, part in zip(authors_scores.INFLUENCE_FILES, parts, strict=True):
        torch.save(part.clone(), folder / authors_scores.FOLDER / name)
    return folder, scores


@pytest.fixture
def layout(written, tmp_path):
    """Copy the synthetic layout, to be damaged."""
    shutil.copytree(written[0], tmp_path / "copy")
    return tmp_path / "copy"


# ------------------------------------------------------------------------------------- files


def test_the_files_come_in_our_orientation(written):
    folder, expected = written
    scores = authors_scores.load(folder)
    np.testing.assert_array_equal(scores.icp, expected.icp)
    np.testing.assert_array_equal(scores.influence, expected.influence)
    np.testing.assert_allclose(scores.mean_influence, expected.influence.mean(1), rtol=1e-5)
    assert scores.influence.dtype == np.float32 and not scores.pinned


def shares(change):
    """Return a function that rewrites the ICP file with its entries changed."""

    def damage(file):
        entries = json.loads(file.read_text())
        change(entries)
        file.write_text(json.dumps(entries))

    return damage


def tensor(change):
    """Return a function that rewrites an influence file with its tensor changed."""
    return lambda file: torch.save(change(torch.load(file, weights_only=True)), file)


ICP, INFLUENCE = authors_scores.ICP_FILE, "infl_ip-4-of-9.pt"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (ICP, lambda f: f.unlink(), authors_scores.REPOSITORY),
        (ICP, lambda f: f.write_text(f.read_text()[:-9]), "'0' to '52001'"),
        (ICP, lambda f: f.write_text("7"), "'0' to '52001'"),
        (ICP, shares(lambda e: e.pop("52001")), r"\(52001, 1\).*\(52002, 1\)"),
        (ICP, shares(lambda e: e.update(x=e.pop("7"))), "'7'.*'0' to '52001'"),
        (ICP, shares(lambda e: e["7"].append(0.5)), "'0' to '52001'"),
        (ICP, shares(lambda e: e.update({"7": ["much"]})), "much.*'0' to '52001'"),
        (ICP, shares(lambda e: e.update({"7": [1.01]})), "100"),
        (ICP, shares(lambda e: e.update({"7": [0.123]})), "100"),
        (ICP, shares(lambda e: e.update({"7": [float("nan")]})), "100"),
        (INFLUENCE, lambda f: f.write_bytes(b""), r"\[100, 5778\]"),
        (INFLUENCE, lambda f: f.write_bytes(f.read_bytes()[:99_999]), r"\[100, 5778\]"),
        (INFLUENCE, tensor(lambda t: {"a": t}), r"dict.*\[100, 5778\]"),
        (INFLUENCE, tensor(lambda t: t.T.clone()), r"\[5778, 100\].*\[100, 5778\]"),
        (INFLUENCE, tensor(lambda t: t.double()), "float64.*float32"),
        (INFLUENCE, tensor(lambda t: t.fill_(float("nan"))), "finite"),
    ],
)
def test_a_wrong_file_is_named_with_what_was_expected(layout, name, damage, said):
    damage(layout / authors_scores.FOLDER / name)
    with pytest.raises(assets.AssetError, match=f"(?s){name}.*{said}") as raised:
        authors_scores.load(layout)
    assert not isinstance(raised.value, authors_scores.Unavailable)


# ---------------------------------------------------------------------------------- fetching


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Give an empty cache; return the folder in it that the files are fetched to."""
    monkeypatch.setenv("ICPROBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "published"


FILES = {"a.json": b"{}", "b.pt": b"tensor"}
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


@pytest.fixture
def served():
    """Serve some files; return the address, and the dict of what is served."""
    files = dict(FILES)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = files.get(self.path.lstrip("/"))
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.removesuffix(b"(lost)"))  # less than was promised

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", files
        server.shutdown()


def kept(folder):
    return {file.name: file.read_bytes() for file in (folder / authors_scores.FOLDER).glob("*")}


def test_files_are_fetched_once_and_again_when_damaged(folder, served, capsys):
    url, files = served
    assert authors_scores.fetch(url, HASHES) == folder
    assert kept(folder) == FILES
    files.clear()
    assert authors_scores.fetch(url, HASHES) == folder
    files.update(FILES)
    damaged = folder / authors_scores.FOLDER / "b.pt"
    damaged.write_bytes(b"uensor")  # one bit
    authors_scores.fetch(url, HASHES)
    assert kept(folder) == FILES and str(damaged) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (b"other", assets.AssetError, HASHES["b.pt"]),
        (b"tensor(lost)", authors_scores.Unavailable, "IncompleteRead"),
        (None, authors_scores.Unavailable, "404"),
    ],
)
def test_a_failed_download_leaves_nothing_and_may_be_repeated(folder, served, content, error, said):
    url, files = served
    files["b.pt"] = content
    with pytest.raises(error, match=rf"(?s){url}/b\.pt.*{said}.*-p published_dir PATH") as raised:
        authors_scores.fetch(url, HASHES)
    assert type(raised.value) is error
    assert not folder.exists() and len(list(folder.parent.rglob("*"))) == 2  # work, and its lock
    files["b.pt"] = FILES["b.pt"]
    authors_scores.fetch(url, HASHES)
    assert kept(folder) == FILES


def test_without_network_a_fetched_copy_is_loaded_or_the_way_to_one_is_said(
    folder, written, tmp_path, monkeypatch
):
    monkeypatch.setenv("https_proxy", CLOSED)
    with pytest.raises(authors_scores.Unavailable) as raised:
        authors_scores.load()
    for part in (authors_scores.URL, "icp_scores.json", f"git clone {authors_scores.REPOSITORY}",
                 "data/scores", "-p published_dir PATH"):  # fmt: skip
        assert part in str(raised.value)
    shutil.copytree(written[0], tmp_path / "copy")
    cache.keep(tmp_path / "copy", folder)
    np.testing.assert_array_equal(authors_scores.load().icp, written[1].icp)


# -------------------------------------------------------------------------------- real files


@pytest.mark.skipif(not REAL.is_dir(), reason="the authors' files are not beside this checkout")
def test_the_real_files_give_what_is_known_of_them():
    scores = authors_scores.load(REAL)
    assert scores.pinned
    assert len(np.unique(scores.icp)) == 79
    sizes = published.cut_sizes(scores.icp)
    found = published.agreement(scores.icp, scores.mean_influence, M, sizes, reliable=1)
    both = "ICP score against mean influence"
    expected = {
        (both, "Spearman"): 0.729, (both, "Kendall"): 0.530, (both, "Pearson"): 0.752,
    }  # fmt: skip
    cuts = {"> 0.8": 0.707, "> 0.85": 0.332, "> 0.9": 0.040, "<= 0.5": 0.396}
    for cut, value in cuts.items():
        expected[f"in common, ICP score {cut}", published.IN_COMMON] = value
    assert {name: round(found[name], 3) for name in expected} == expected
    chance = [round(k / N, 3) for _, k in sizes.values()]
    assert [k for _, k in sizes.values()] == [20_513, 8_012, 792, 4_186]
    assert chance == [0.394, 0.154, 0.015, 0.080]


# ---------------------------------------------------------------------------------- notebook


RESULTS = {"07_findings.csv", "07_queries.csv", "claims.json"} | {
    f"07_{name}.{kind}" for name in ("agreement", "overlap", "per_query") for kind in ("pdf", "png")
}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, written):
    own = {"published_dir": str(written[0]), "output_dir": str(tmp_path / "out"), "resamples": 5}
    arguments = [text for name, value in own.items() for text in ("-p", name, str(value))]
    assert runner.main(["laptop", "--only", "07", *arguments]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} >= RESULTS


@pytest.mark.slow
def test_a_run_without_network_skips_the_notebook(tmp_path, folder, monkeypatch, capsys):
    for name in [name for name in os.environ if name.lower() in ("no_proxy", "https_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("https_proxy", CLOSED)
    where = ["-p", "output_dir", str(tmp_path / "out")]
    assert runner.main(["smoke", "--only", "07", *where]) == 0
    said = capsys.readouterr().out
    assert "SKIPPED: 07_published_scores" in said and "git clone" in said
    lacking = ["-p", "published_dir", str(tmp_path)]  # a folder, but none of the files
    assert runner.main(["smoke", "--only", "07", *where, *lacking]) == 1
    assert "FAILED: 07_published_scores" in capsys.readouterr().out
