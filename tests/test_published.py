"""The published scores: full-size synthetic files, a local server, and the real files if there."""

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
from icprobe.published import M, N
from scipy.stats import kendalltau, spearmanr

from icprobe import assets, paths, published, runner

REAL = paths.ROOT.parent / "shared" / "published"
NOTEBOOK = paths.NOTEBOOKS / "07_published_scores.ipynb"
CLOSED = "http://127.0.0.1:9"  # a closed port


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def simulate(rng, n, m, hardness=0.0):
    """Return both scores of n examples and m queries, and the ICP answers [n, m] behind a share."""
    worth = rng.normal(size=(n, 1))
    chances = 1 / (1 + np.exp(-worth - hardness * rng.normal(size=m)))
    helped = rng.random((n, m)) < chances
    influence = 400 + 50 * worth + 60 * rng.normal(size=(n, m))
    return published.Scores(helped.mean(1), influence.astype(np.float32), False), helped


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Write synthetic scores in the authors' layout; return the folder and the scores."""
    scores, _ = simulate(np.random.default_rng(1), N, M)
    folder = tmp_path_factory.mktemp("written")
    (folder / published.FOLDER).mkdir(parents=True)
    shares = {str(i): [share] for i, share in enumerate(scores.icp)}
    (folder / published.FOLDER / published.ICP_FILE).write_text(json.dumps(shares))
    parts = torch.from_numpy(scores.influence.T).split(N // published.PARTS, dim=1)
    for name, part in zip(published.INFLUENCE_FILES, parts, strict=True):
        torch.save(part.clone(), folder / published.FOLDER / name)
    return folder, scores


@pytest.fixture
def layout(written, tmp_path):
    """Copy the synthetic layout, to be damaged."""
    shutil.copytree(written[0], tmp_path / "copy")
    return tmp_path / "copy"


# ------------------------------------------------------------------------------------- files


def test_the_files_come_in_our_orientation(written):
    folder, expected = written
    scores = published.load(folder)
    np.testing.assert_array_equal(scores.icp, expected.icp)
    np.testing.assert_array_equal(scores.influence, expected.influence)
    assert scores.influence.shape == (N, M) and scores.influence.dtype == np.float32
    third = torch.load(folder / published.FOLDER / "infl_ip-3-of-9.pt", weights_only=True)
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


ICP, INFLUENCE = published.ICP_FILE, "infl_ip-4-of-9.pt"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (ICP, lambda f: f.unlink(), "there is no"),
        (INFLUENCE, lambda f: f.unlink(), "there is no"),
        (ICP, lambda f: f.write_text(f.read_text()[:-9]), "cannot be read"),
        (ICP, lambda f: f.write_text("[1, 2]"), "expected one share for each of '0' to '52001'"),
        (ICP, lambda f: f.write_text("7"), "cannot be read"),
        (ICP, shares(lambda e: e.pop("52001")), r"shape \(52001, 1\).*\(52002, 1\)"),
        (ICP, shares(lambda e: e.update(x=e.pop("7"))), "cannot be read"),
        (ICP, shares(lambda e: e["7"].append(0.5)), "cannot be read"),
        (ICP, shares(lambda e: e.update({"7": ["much"]})), "cannot be read"),
        (ICP, shares(lambda e: e.update({"7": [1.01]})), "other numbers than shares of 100"),
        (ICP, shares(lambda e: e.update({"7": [-0.01]})), "other numbers than shares of 100"),
        (ICP, shares(lambda e: e.update({"7": [0.123]})), "other numbers than shares of 100"),
        (ICP, shares(lambda e: e.update({"7": [float("nan")]})), "other numbers than shares"),
        (INFLUENCE, lambda f: f.write_bytes(b""), "cannot be read"),
        (INFLUENCE, lambda f: f.write_bytes(b"no tensor"), "cannot be read"),
        (INFLUENCE, lambda f: f.write_bytes(f.read_bytes()[:99_999]), "cannot be read"),
        (INFLUENCE, tensor(lambda t: {"a": t}), "has a dict"),
        (INFLUENCE, tensor(lambda t: t.T.clone()), r"\[5778, 100\].*expected .*\[100, 5778\]"),
        (INFLUENCE, tensor(lambda t: t.double()), "torch.float64.*expected a float32"),
        (INFLUENCE, tensor(with_one(float("nan"))), "not finite"),
        (INFLUENCE, tensor(with_one(float("inf"))), "not finite"),
    ],
)
def test_a_wrong_file_is_named_with_what_was_expected(layout, name, damage, said):
    damage(layout / published.FOLDER / name)
    with pytest.raises(assets.AssetError, match=f"(?s){name}.*{said}|{said}.*{name}") as raised:
        published.load(layout)
    assert not isinstance(raised.value, published.Unavailable)


def test_a_wrong_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(assets.AssetError, match=r"data/scores/icp_scores\.json.*must be a copy"):
        published.load(tmp_path)


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
    folder = published.fetch(url, HASHES)
    assert {f.name: f.read_bytes() for f in (folder / published.FOLDER).iterdir()} == FILES
    files.clear()
    assert published.fetch(url, HASHES) == folder == cache / "published"


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (b"other", assets.AssetError, rf"b\.pt has sha256 .*expected {HASHES['b.pt']}"),
        (b"tensor(lost)", published.Unavailable, r"Tried http://127.*/b\.pt: IncompleteRead"),
        (None, published.Unavailable, r"b\.pt: HTTP Error 404"),
    ],
)
def test_a_failed_download_leaves_nothing_and_may_be_repeated(cache, served, content, error, said):
    url, files = served
    files["b.pt"] = content
    with pytest.raises(assets.AssetError, match=f"(?s){said}.*-p published_dir PATH") as raised:
        published.fetch(url, HASHES)
    assert type(raised.value) is error
    assert kept(cache) == ["work/published.lock"]
    files["b.pt"] = FILES["b.pt"]
    assert (published.fetch(url, HASHES) / published.FOLDER / "b.pt").read_bytes() == b"tensor"


def test_without_network_the_message_says_how_to_get_the_files(cache):
    with pytest.raises(published.Unavailable) as raised:
        published.fetch(CLOSED)
    for part in (f"{CLOSED}/icp_scores.json", "refused", f"git clone {published.REPOSITORY}",
                 "data/scores", "-p published_dir PATH"):  # fmt: skip
        assert part in str(raised.value)
    assert kept(cache) == ["work/published.lock"]


def test_a_fetched_copy_is_loaded_without_network(cache, written, monkeypatch):
    monkeypatch.setenv("https_proxy", CLOSED)
    shutil.copytree(written[0], cache / "published")
    np.testing.assert_array_equal(published.load().icp, written[1].icp)


# -------------------------------------------------------------------------------- statistics


def test_agreement_is_scipys_and_overlaps_those_of_sets(rng):
    scores, _ = simulate(rng, 400, 30)
    icp, influence = scores.icp, scores.mean_influence
    sizes = published.cut_sizes(icp)
    found = published.agreement(icp, influence, 30, sizes, reliable=0.9)
    both = "ICP score against mean influence"
    assert found[both, "Spearman"] == pytest.approx(spearmanr(icp, influence).statistic)
    assert found[both, "Kendall"] == pytest.approx(kendalltau(icp, influence).statistic)
    assert found[both, "Pearson"] == pytest.approx(np.corrcoef(icp, influence)[0, 1])
    ceiling = np.sqrt(0.9 * published.share_reliability(icp, 30))
    assert found["noise ceiling, at least", "correlation"] == pytest.approx(ceiling)
    over = found[f"{both} over the ceiling, at most", "Pearson"]
    assert over == pytest.approx(found[both, "Pearson"] / ceiling)
    for name, (end, k) in sizes.items():  # no influence is tied
        cut = float(name.split()[-1])
        chosen = np.flatnonzero(icp > cut if end == "top" else icp <= cut)
        order = np.argsort(influence if end == "bottom" else -influence)
        expected = len(set(chosen) & set(order[:k])) / k
        assert found[name, published.IN_COMMON] == pytest.approx(expected)
    assert len(sizes) == 4


def test_cut_sizes_by_hand():
    icp = np.array([0.95, 0.9, 0.86, 0.85, 0.81, 0.8, 0.6, 0.51, 0.5, 0.2])
    expected = {
        "in common, ICP score > 0.8": ("top", 5),
        "in common, ICP score > 0.85": ("top", 3),
        "in common, ICP score > 0.9": ("top", 1),
        "in common, ICP score <= 0.5": ("bottom", 2),
    }
    assert published.cut_sizes(icp) == expected
    assert list(published.cut_sizes(icp[5:])) == ["in common, ICP score <= 0.5"]


def test_each_query_is_correlated_with_the_share(rng):
    scores, _ = simulate(rng, 200, 5)
    expected = [spearmanr(scores.icp, scores.influence[:, j]).statistic for j in range(5)]
    np.testing.assert_allclose(published.by_query(scores), expected)


def formula_20(helped):
    M = helped.shape[1]
    return M / (M - 1) * (1 - helped.var(0).sum() / helped.sum(1).var())


def test_the_reliability_of_shares_is_formula_20_where_queries_are_alike_and_less_elsewhere(rng):
    n, m = 20_000, 40
    _, helped = simulate(rng, n, m)
    reliable = published.share_reliability(helped.mean(1), m)
    assert reliable == pytest.approx(formula_20(helped), abs=1e-3)
    # the same examples with new queries
    chances = rng.beta(4, 2, size=n)
    first, second = rng.binomial(m, chances) / m, rng.binomial(m, chances) / m
    # the standard error of this correlation is 0.003
    expected = np.corrcoef(first, second)[0, 1]
    assert published.share_reliability(first, m) == pytest.approx(expected, abs=0.015)
    _, helped = simulate(rng, n, m, hardness=2)
    assert published.share_reliability(helped.mean(1), m) < formula_20(helped) - 0.05
    assert np.isnan(published.share_reliability(np.full(5, 0.5), m))


def test_repeated_overlaps_of_known_shares(rng):
    certain = np.repeat([0.0, 1.0], [70, 30])
    found = published.repeated_overlaps(certain, 10**6, rng, repeats=3)
    for values in found.values():
        np.testing.assert_allclose(values, 1)
    m, n = 20, 20_000
    chances = rng.beta(6, 2, size=n)
    first, second = rng.binomial(m, chances) / m, rng.binomial(m, chances) / m
    for name, values in published.repeated_overlaps(first, m, rng, repeats=3).items():
        end, k = published.cut_sizes(first)[name]
        measure = published.statistics.overlap(first[:, None], second[:, None], k, end)
        # the shares' form is kept only roughly
        assert values.mean() == pytest.approx(measure(np.arange(n), np.zeros(1, int)), abs=0.06)


def test_the_interval_of_the_reliability_holds_it(rng):
    """Row means of signal + noise over m queries, whose Spearman has a closed form."""
    n, m, noise = 1000, 20, 2.0
    truth = 6 / np.pi * np.arcsin(1 / (1 + noise**2 / m) / 2)
    hits = 0
    for _ in range(10):
        values = rng.normal(size=(n, 1)) + noise * rng.normal(size=(n, m))
        low, high = published.reliability_interval(values, rng, resamples=40)
        assert high - low < 0.1
        hits += low - 0.01 <= truth <= high + 0.01  # of the sample of examples
    assert hits >= 8


def test_findings_are_complete_and_repeatable(rng):
    scores, _ = simulate(rng, 300, 12)
    tables = [published.findings(scores, np.random.default_rng(3), 40, 10) for _ in range(2)]
    assert tables[0].equals(tables[1])
    table = tables[0].set_index(["quantity", "unit"])
    assert table.index.is_unique and np.isfinite(table.to_numpy()).all()
    assert (table["low"] <= table["high"]).all()
    both = "ICP score against mean influence"
    row = table.loc[(both, "Spearman")]
    assert row["estimate"] == pytest.approx(spearmanr(scores.icp, scores.mean_influence).statistic)
    same = table.loc[(f"{both}, these queries", "Spearman")]
    assert same["estimate"] == row["estimate"] and same["low"] < row["estimate"] < same["high"]
    # fewer things are drawn
    assert same["high"] - same["low"] < row["high"] - row["low"]
    curve = published.overlap_curve(scores, "top")
    assert curve.index[-1] == 300 and curve.iloc[-1] == 1


@pytest.mark.skipif(not REAL.is_dir(), reason="the authors' files are not beside this checkout")
def test_the_authors_files_give_what_is_known_of_them(rng):
    scores = published.load(REAL)
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
