"Clusters of codes: the same each time, errors that say what to do, and the table of them."

import sys
from functools import partial

import pytest
import torch

pytest.importorskip("umap", reason="umap-learn is not installed: pip install 'csrae_nb[clusters]'")

import bench.clusters
from csrae_nb.clusters import cluster_codes, code_map
from csrae_nb.config import Config
from csrae_nb.metrics import clustering
from csrae_nb.mixtures import GMM
from csrae_nb.priors import cut_map, merge_components
from csrae_nb.results import read_rows
from csrae_nb.runs import fit


def heaps(n, D=5, C=4, dtype=torch.float32):
    "Codes near C corners, and whose they are."
    g, of = torch.Generator().manual_seed(1), torch.arange(n) % C
    return 6 * torch.eye(D)[of].to(dtype) + torch.randn(n, D, generator=g).to(dtype), of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heaps_are_found_the_same_each_time(dtype):
    codes, of = heaps(400, dtype=dtype)
    one, again = cluster_codes(codes, 4, seed=3), cluster_codes(codes, 4, seed=3)
    assert torch.equal(one.places, again.places) and torch.equal(one.cluster, again.cluster)
    assert one.places.dtype == dtype
    assert clustering(of, one.cluster)["cluster_accuracy"] > 0.97
    assert torch.equal(one.predict(codes, neighbours=1), one.cluster)  # a code is its own nearest


def test_a_few_of_many_are_laid_out():
    codes, of = heaps(600)
    found = cluster_codes(codes, 4, most=100)
    assert len(found.codes) == len(found.cluster) == 100
    assert {tuple(c) for c in found.codes.tolist()} < {tuple(c) for c in codes.tolist()}
    assert clustering(of, found.predict(codes))["cluster_accuracy"] > 0.95


def test_without_umap(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'csrae_nb\[clusters\]'"):
        code_map(heaps(50)[0])


def test_table_of_clusters(monkeypatch, tmp_path):
    "A row for a run, three for the pixels, and none a second time."
    cfg = Config(name="clusters", model="MixtureCSRAE", components=12, latent_dim=3, epochs=3, kmeans_epoch=1)
    folder, table = fit(cfg, progress=False).path, tmp_path / "clusters.csv"
    once, made = partial(cluster_codes, layouts=1), []
    monkeypatch.setattr(
        bench.clusters, "cluster_codes", lambda z, C, seed: made.append(seed) or once(z, C, seed)
    )
    monkeypatch.setattr(sys, "argv", ["clusters", str(folder), "--csv", str(table)])
    for _ in range(2):
        bench.clusters.main()
        assert made == [0, 0, 1, 2]
    run, *pixels = read_rows(table, bench.clusters.KEY)
    assert (run["model"], run["components"], run["seed"]) == ("MixtureCSRAE", 12, 0)
    assert 0.2 < run["accuracy"] <= 1 and 0.1 < run["joined_accuracy"] <= run["purity"] <= 1
    assert [r["seed"] for r in pixels] == [0, 1, 2] and all(r["accuracy"] > 0.7 for r in pixels)
    assert all(r["purity"] is None for r in pixels)


def test_two_components_are_two_clusters():
    assert cut_map(torch.tensor([[0.0, 0.0], [9.0, 1.0]])).unique().tolist() == [0, 1]


def test_as_many_clusters_as_components_are_the_components(recwarn):
    places = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    assert cut_map(places, 7).tolist() == list(range(7)) and not recwarn


@pytest.mark.parametrize("clusters", [-2, 0, True, 7])
def test_clusters_that_cannot_be_are_refused(clusters):
    prior = GMM.mixture(torch.ones(6) / 6, torch.randn(6, 2), torch.ones(6, 2))
    with pytest.raises(ValueError, match=f"clusters={clusters!r}; expected"):
        merge_components(prior, clusters)
