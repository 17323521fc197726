"""The authors' files: full-size synthetic ones, a local server, and the real ones if there."""

import hashlib
import http.server
import json
import os
import shutil
import threading

import numpy as np
import papermill
import pytest
import torch

from icprobe import assets, authors_scores, paths
from icprobe.artifact import runner
from icprobe.authors_scores import M, N
from icprobe.statistics import authors_scores as published

REAL = paths.ROOT.parent / "shared" / "published"
NOTEBOOK = paths.NOTEBOOKS / "07_published_scores.ipynb"
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
    assert scores.influence.shape == (N, M) and scores.influence.dtype == np.float32
    third = torch.load(folder / authors_scores.FOLDER / "infl_ip-3-of-9.pt", weights_only=True)
    assert scores.influence[2 * 5778 + 17, 5] == third[5, 17]
    assert not scores.pinned
    np.testing.assert_allclose(scores.mean_influence, expected.influence.mean(1), rtol=1e-5)


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


def with_one(value):
    def change(part):
        part[3, 4] = value
        return part

    return change


ICP, INFLUENCE = authors_scores.ICP_FILE, "infl_ip-4-of-9.pt"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (ICP, lambda f: f.unlink(), ""),
        (ICP, lambda f: f.write_text(f.read_text()[:-9]), ""),
        (ICP, lambda f: f.write_text("7"), ""),
        (ICP, shares(lambda e: e.pop("52001")), r"\(52001, 1\).*\(52002, 1\)"),
        (ICP, shares(lambda e: e.update(x=e.pop("7"))), ""),
        (ICP, shares(lambda e: e["7"].append(0.5)), ""),
        (ICP, shares(lambda e: e.update({"7": [1.01]})), "100"),
        (ICP, shares(lambda e: e.update({"7": [-0.01]})), "100"),
        (ICP, shares(lambda e: e.update({"7": [0.123]})), "100"),
        (ICP, shares(lambda e: e.update({"7": [float("nan")]})), "100"),
        (INFLUENCE, lambda f: f.write_bytes(f.read_bytes()[:99_999]), ""),
        (INFLUENCE, tensor(lambda t: {"a": t}), "dict"),
        (INFLUENCE, tensor(lambda t: t.T.clone()), r"\[5778, 100\].*\[100, 5778\]"),
        (INFLUENCE, tensor(lambda t: t.double()), "torch.float64"),
        (INFLUENCE, tensor(with_one(float("nan"))), ""),
    ],
)
def test_a_wrong_file_is_named_with_what_was_expected(layout, name, damage, said):
    damage(layout / authors_scores.FOLDER / name)
    with pytest.raises(assets.AssetError, match=f"(?s){name}.*{said}|{said}.*{name}") as raised:
        authors_scores.load(layout)
    assert not isinstance(raised.value, authors_scores.Unavailable)


def test_a_wrong_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(assets.AssetError, match=r"data/scores/icp_scores\.json.*must be a copy"):
        authors_scores.load(tmp_path)


# ---------------------------------------------------------------------------------- fetching


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ICPROBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


def kept(cache):
    return sorted(str(f.relative_to(cache)) for f in cache.rglob("*") if f.is_file())


def test_files_are_fetched_once(cache, served):
    url, files = served
    folder = authors_scores.fetch(url, HASHES)
    assert {f.name: f.read_bytes() for f in (folder / authors_scores.FOLDER).iterdir()} == FILES
    files.clear()
    assert authors_scores.fetch(url, HASHES) == folder == cache / "published"


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (b"other", assets.AssetError, rf"b\.pt has sha256 .*expected {HASHES['b.pt']}"),
        (b"tensor(lost)", authors_scores.Unavailable, r"Tried http://127.*/b\.pt: IncompleteRead"),
        (None, authors_scores.Unavailable, r"b\.pt: HTTP Error 404"),
    ],
)
def test_a_failed_download_leaves_nothing_and_may_be_repeated(cache, served, content, error, said):
    url, files = served
    files["b.pt"] = content
    with pytest.raises(assets.AssetError, match=f"(?s){said}.*-p published_dir PATH") as raised:
        authors_scores.fetch(url, HASHES)
    assert type(raised.value) is error
    assert kept(cache) == ["work/published.lock"]
    files["b.pt"] = FILES["b.pt"]
    folder = authors_scores.fetch(url, HASHES) / authors_scores.FOLDER
    assert (folder / "b.pt").read_bytes() == b"tensor"


def test_without_network_the_message_says_how_to_get_the_files(cache):
    with pytest.raises(authors_scores.Unavailable) as raised:
        authors_scores.fetch(CLOSED)
    for part in (f"{CLOSED}/icp_scores.json", "refused", f"git clone {authors_scores.REPOSITORY}",
                 "data/scores", "-p published_dir PATH"):  # fmt: skip
        assert part in str(raised.value)
    assert kept(cache) == ["work/published.lock"]


def test_a_fetched_copy_is_loaded_without_network(cache, written, monkeypatch):
    monkeypatch.setenv("https_proxy", CLOSED)
    shutil.copytree(written[0], cache / "published")
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


RESULTS = sorted(
    [
        f"07_{name}.{kind}"
        for name in ("agreement", "overlap", "per_query")
        for kind in ("pdf", "png")
    ]
    + ["07_findings.csv", "07_queries.csv", "claims.json"]
)


def test_the_notebook_gives_the_same_files_however_it_is_run(tmp_path, written):
    own = {"published_dir": str(written[0]), "output_dir": str(tmp_path / "out"), "resamples": 5}
    papermill.execute_notebook(
        NOTEBOOK, tmp_path / "copy.ipynb", own, cwd=tmp_path, progress_bar=False,
        kernel_name="python3",
    )  # fmt: skip
    made = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert sorted(made) == RESULTS
    arguments = [text for name, value in own.items() for text in ("-p", name, str(value))]
    shutil.rmtree(tmp_path / "out")
    assert runner.main(["laptop", "--only", "07", *arguments]) == 0
    for name, content in made.items():
        assert (tmp_path / "out" / name).read_bytes() == content


def test_a_run_without_network_skips_the_notebook(tmp_path, cache, monkeypatch, capsys):
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
