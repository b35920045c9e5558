"The scikit-learn estimator: scikit-learn's own checks, whole, and what they do not ask."

import copy
import io
import pickle
import threading
import warnings

import jaxtyping
import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from csrae_nb import estimator
from csrae_nb.estimator import CSRAEEmbedding
from csrae_nb.config import Config
from csrae_nb.evaluation import complete_run
from csrae_nb.likelihoods import LIKELIHOODS, Gaussian
from csrae_nb.mixtures import FullGMM
from csrae_nb.priors import PRIORS, Prior
from csrae_nb.runs import fit
from csrae_nb.training import NonFiniteLoss

pytestmark = pytest.mark.filterwarnings("ignore:epoch .*(collapsed|no latent dimension)")
X, y = load_iris(return_X_y=True)


def quick(**kw):
    return CSRAEEmbedding(**dict(epochs=3, warmup=1, components=4, random_state=0) | kw)


@pytest.fixture(scope="module")
def fitted():
    return quick().fit(X)


@parametrize_with_checks([CSRAEEmbedding()])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


# --- the same training


def test_fit_is_fit(tmp_path):
    "The weights are those of fit with the Config that the estimator says, on rows as it standardises them."
    mine = quick(validation_fraction=0).fit(X)
    x = StandardScaler().fit_transform(X).astype(np.float32)
    cfg = Config(
        dataset="arrays",
        latent_dim=2,
        components=4,
        epochs=3,
        warmup=1,
        likelihood="gaussian",
        network="mlp",
        lr=1e-3,
    )
    run = fit(cfg, dict(x_train=x, x_val=x, x_test=x), progress=False, folder=tmp_path / "run")
    for k, v in run.model.state_dict().items():
        torch.testing.assert_close(mine.model_.state_dict()[k].float(), v, rtol=1e-4, atol=1e-6)
    assert mine.config_.seed == 0
    assert mine.config_.network == "mlp"
    assert (mine.n_iter_, mine.best_epoch_) == (len(run.history), run.best_epoch)


def test_without_checkpoints_a_run_ends_the_same(tmp_path):
    cfg, x = Config(dataset="arrays", epochs=4, warmup=1, components=3), dict(x=X)
    a, b = (fit(cfg, x, progress=False, folder=tmp_path / str(c), checkpoints=c) for c in (True, False))
    assert a.history == b.history
    assert sorted(p.name for p in a.path.iterdir()) == sorted(p.name for p in b.path.iterdir())
    assert (a.path / "history.csv").read_text() == (b.path / "history.csv").read_text()
    assert all(map(torch.equal, a.model.state_dict().values(), b.model.state_dict().values()))


def test_one_partial_fit_is_one_epoch_of_fit():
    "Over the k-means, which comes after epoch 3, and over scales, order and noise."
    there = quick(epochs=5, validation_fraction=0, batch_size=75).fit(X)
    here = quick(epochs=5, batch_size=75)
    for _ in range(5):
        here.partial_fit(X)
    assert there.best_epoch_ == 5
    assert [r["train_reconstruction"] for r in here.history_] == [
        r["train_reconstruction"] for r in there.history_
    ]
    assert np.array_equal(here.transform(X), there.transform(X)) and here.score(X) == there.score(X)


def test_partial_fit_after_fit_has_no_best_epoch():
    "It had that of fit, of other weights."
    est = quick().fit(X)
    assert est.best_epoch_
    assert not hasattr(est.partial_fit(X), "best_epoch_")


def test_partial_fit_on_chunks_of_all_sizes():
    est = quick()
    for rows in (slice(100), slice(1), slice(3), slice(50, 150), slice(100, 150)):
        est.partial_fit(X[rows])
    assert est.config_.components == 4 and est.n_iter_ == 5 and np.isfinite(est.transform(X)).all()
    assert quick().partial_fit(X[:3]).config_.components == 3
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        quick().partial_fit(X[:1])  # which has no scale


@pytest.mark.parametrize("n, steps, size", [(40, 1, 40), (41, 2, 21), (79, 2, 40), (80, 2, 40), (81, 3, 27)])
def test_partial_fit_learns_from_all_rows(n, steps, size, monkeypatch):
    seen, epoch = [], estimator.train_epoch

    def spied(task, acc, model, opt, data, *args):
        rows = task.rows(data, args[0])
        seen.append((tuple(rows.shape), len(data.x_train[rows.flatten()].unique(dim=0))))
        return epoch(task, acc, model, opt, data, *args)

    monkeypatch.setattr(estimator, "train_epoch", spied)
    quick(batch_size=40).partial_fit(np.random.default_rng(0).normal(size=(n, 3)))
    assert seen == [((steps, size), n)]


TABLE = pd.DataFrame(X[:, :3], columns=list("abc"))
ODD = {
    "X, row 1, column 'd' holds nothing": TABLE.assign(d=[None] + [1.0] * (len(X) - 1)),
    "X, row 2, column 'd' holds nothing": TABLE.assign(d=[1.0, np.nan] + [1.0] * (len(X) - 2)),
    "columns d hold no numbers: .* OneHotEncoder": TABLE.assign(d="x"),
    "more than one column a": pd.DataFrame(X[:, :2], columns=["a", "a"]),
    r"X holds datetime64\[D\]; expected real numbers": X.astype("M8[D]"),
    "X.s columns d hold no numbers: leave": TABLE.assign(d=1j),
}


@pytest.mark.parametrize("says", ODD)
def test_what_is_wrong_with_a_table_is_said_with_its_place(says):
    with pytest.raises(ValueError, match=says):
        quick().fit(ODD[says])


def test_columns_unseen_at_fit_are_called_so_whatever_they_hold():
    est = quick().fit(TABLE)
    with pytest.raises(ValueError, match="unseen at fit time:\n- city"):
        est.transform(TABLE.assign(city="Rome"))


@pytest.mark.parametrize("field", ["components", "latent_dim", "epochs", "batch_size", "prior"])
def test_none_is_no_value(field):
    with pytest.raises(ValueError, match=f"{field}=None; expected a value, such as"):
        quick(**{field: None}).fit(X)


def test_partial_fit_goes_on_after_fit(fitted):
    est = copy.deepcopy(fitted)
    before = est.transform(X)
    est.partial_fit(X)
    assert est.n_iter_ == 4
    assert est.history_[:3] == fitted.history_
    assert 0 < abs(est.transform(X) - before).max() < 1
    est.fit(X)
    assert np.array_equal(est.transform(X), before)  # fit forgets


def test_partial_fit_can_be_interrupted_by_a_pickle():
    one = quick().partial_fit(X[:80]).partial_fit(X[80:])
    two = pickle.loads(pickle.dumps(quick().partial_fit(X[:80]))).partial_fit(X[80:])
    assert np.array_equal(one.transform(X), two.transform(X))


# --- scikit-learn's machinery


def test_pipeline_and_grid_search_in_two_processes():
    pipe = make_pipeline(quick(), KNeighborsClassifier())
    grid = {"csraeembedding__lam": [0.1, 1.0]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = GridSearchCV(pipe, grid, cv=2, n_jobs=2, error_score="raise").fit(X, y)
        alone = GridSearchCV(pipe, grid, cv=2).fit(X, y)
    assert np.allclose(search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
    assert search.best_score_ > 0.5
    assert GridSearchCV(
        quick(), {"components": np.arange(2, 4), "lr": np.geomspace(1e-3, 1e-2, 2)}, cv=2, error_score="raise"
    ).fit(X).best_params_["components"] in (2, 3)  # by score


def test_pandas_output():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(X, index=np.arange(len(X)) + 7, columns=list("abcd"))
    est = quick().set_output(transform="pandas").fit(frame)
    z = est.transform(frame)
    assert list(z.columns) == list(est.get_feature_names_out()) == ["csraeembedding0", "csraeembedding1"]
    assert (z.index == frame.index).all()
    assert list(quick().set_output(transform="pandas").fit_transform(frame).columns) == list(z.columns)
    assert list(est.feature_names_in_) == list("abcd")
    assert est.inverse_transform(z).shape == X.shape
    with pytest.raises(ValueError, match="feature names"):
        est.transform(frame[["b", "a", "c", "d"]])


def test_copies_give_the_same_codes(fitted):
    file = io.BytesIO()
    joblib.dump(fitted, file)
    file.seek(0)
    for other in (
        pickle.loads(pickle.dumps(fitted)),
        joblib.load(file),
        copy.deepcopy(fitted),
        clone(fitted).fit(X),
    ):
        assert np.array_equal(other.transform(X), fitted.transform(X)) and other.score(X) == fitted.score(X)
        assert all(map(np.array_equal, other.sample(9), fitted.sample(9)))
    with pytest.raises(NotFittedError):
        clone(fitted).transform(X)


def test_bound_methods_pickle(fitted):
    for name in ("fit", "partial_fit", "transform", "inverse_transform", "predict", "score", "sample"):
        assert pickle.loads(pickle.dumps(getattr(fitted, name))).__name__ == name
        assert getattr(CSRAEEmbedding, name).__qualname__.split(".")[1] == name


def test_rows_do_not_depend_on_each_other(fitted):
    z = fitted.transform(X)
    assert np.allclose(
        np.concatenate([fitted.transform(X[i : i + 1]) for i in range(20)]), z[:20], rtol=1e-10, atol=1e-12
    )


# --- what is of the process stays as it was


def test_random_state_and_threads_of_torch_are_left_alone():
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    before = np.random.get_state()[1].copy()
    est = quick().fit(X).partial_fit(X)
    est.transform(X), est.sample(3), est.score(X)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert (np.random.get_state()[1] == before).all()


def test_random_states():
    same = [
        quick(random_state=s).fit(X).transform(X)
        for s in (np.random.RandomState(5), np.random.RandomState(5), 1)
    ]
    assert np.array_equal(*same[:2]) and not np.array_equal(*same[1:])
    assert quick(random_state=np.int64(7)).fit(X).config_.seed == 7


def test_two_threads_fit_at_once():
    alone, done, state = (
        [quick(random_state=s).fit(X).transform(X) for s in (0, 1, 2)],
        {},
        torch.get_rng_state(),
    )

    def work(s):
        done[s] = quick(random_state=s).fit(X).transform(X)

    threads = [threading.Thread(target=work, args=(s,)) for s in (0, 1, 2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(np.array_equal(done[s], alone[s]) for s in (0, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CSRAE_RUNS", raising=False)
    quick().fit(X).partial_fit(X)
    assert not list(tmp_path.iterdir())


# --- all sorts of rows


@pytest.mark.parametrize(
    "rows",
    [
        X[:, :1],
        np.c_[X, np.full(len(X), 1e6)],
        np.zeros((20, 3)) + 7,
        X * 1e-6,
        X + 1e6,
        X * 1e150,
        X[:2],
        X[:9],
        X.astype(np.float32),
        X.astype(int),
        X > 2,
        (X > 2).astype(np.uint8),
        X.tolist(),
        np.asfortranarray(X),
        np.zeros((9, 2), bool),
    ],
    ids=[
        "one column",
        "a constant column",
        "constant",
        "tiny",
        "far away",
        "huge",
        "two rows",
        "nine rows",
        "float32",
        "int",
        "bool",
        "uint8",
        "list",
        "fortran",
        "all false",
    ],
)
def test_rows_of_many_kinds(rows):
    est = quick().fit(rows)
    z, n = est.transform(rows), len(rows)
    back = est.inverse_transform(z)
    assert z.shape == (n, 2)
    assert np.isfinite(z).all()
    assert np.isfinite(back).all()
    assert np.isfinite(est.score(rows))
    assert back.shape == np.shape(rows)
    assert z.dtype == back.dtype == (np.float32 if getattr(rows, "dtype", None) == np.float32 else np.float64)
    assert est.predict(rows).shape == (n,) and np.allclose(est.predict_proba(rows).sum(1), 1, atol=1e-5)
    new, k = est.sample(5)
    assert new.shape == (5, np.shape(rows)[1]) and np.isfinite(new).all() and k.max() < est.config_.components


def test_units_do_not_matter():
    "Codes are the same in any unit, and the score changes by the log of the unit."
    a, b = quick().fit(X), quick().fit(X * 1000)
    assert np.allclose(a.transform(X), b.transform(X * 1000), atol=1e-6)
    assert np.isclose(b.score(X * 1000), a.score(X) - 4 * np.log(1000), atol=1e-4)
    assert np.allclose(
        b.inverse_transform(b.transform(X * 1000)), 1000 * a.inverse_transform(a.transform(X)), rtol=1e-4
    )


def test_score_is_a_density_in_the_datas_units():
    "With q = p for a decoder that ignores z, the score is the mean log density of the decoder's normal."
    from scipy.stats import norm

    est = quick(components=1, model="CSRAE").fit(X)
    for net in (est.model_.encoder.net, est.model_.decoder.net):
        for w in net[-1].parameters():
            w.data.zero_()
    want = norm(X.mean(0), X.std(0) * np.sqrt(1 + 1e-4)).logpdf(X).sum(1).mean()
    assert np.isclose(est.score(X), want)


def test_grey_levels_under_bernoulli():
    x = (X / X.max()).astype(np.float32)
    est = quick(likelihood="bernoulli").fit(x)
    assert est.scaler_ is None
    assert 0 <= est.inverse_transform(est.transform(x)).min()
    assert np.isfinite(est.score(x))
    assert set(np.unique(est.sample(50, noise=True)[0])) <= {0, 1}


class Own(Gaussian):
    "A likelihood of somebody else's, of any numbers."


def test_columns_are_standardised_under_any_likelihood_without_bounds(monkeypatch):
    monkeypatch.setitem(LIKELIHOODS, "own", Own)
    wide = X * [1, 100, 10_000, 1] + 50
    est = quick(likelihood="own").fit(wide)
    assert est.scaler_ is not None and np.allclose(est.scaler_.mean_, wide.mean(0))
    plain = quick(likelihood="own").fit((wide - wide.mean(0)) / wide.std(0))
    assert np.isclose(
        est.score(wide), plain.score((wide - wide.mean(0)) / wide.std(0)) - np.log(wide.std(0)).sum()
    )


def test_noise_has_the_likelihoods_spread():
    est = quick().fit(X)
    a, b = est.sample(4000)[0], est.sample(4000, noise=True)[0]
    assert (b.std(0) > 1.5 * a.std(0)).all() and np.allclose(a.mean(0), b.mean(0), atol=0.1)


@pytest.mark.parametrize("model", ["CSRAE", "MixtureCSRAE", "VAE", "IWAE", "MixtureVAE", "VampPriorVAE"])
def test_all_models(model):
    est = quick(model=model).fit(X).partial_fit(X)
    K = 1 if model in ("VAE", "CSRAE", "IWAE") else 4
    assert est.predict_proba(X).shape == (150, K)
    assert np.isfinite(est.score(X))
    assert np.isfinite(est.sample(5)[0]).all()


def test_a_vamp_prior_moves_with_its_encoder():
    est = quick(prior="vamp").fit(X)
    again = pickle.loads(pickle.dumps(est)).partial_fit(X)
    assert again.model_.prior._encoder[0] is again.model_.encoder
    assert not np.array_equal(again.model_.prior().mu.detach(), est.model_.prior().mu.detach())


# --- what is refused


@pytest.mark.parametrize(
    "rows, says",
    [
        ([["a", "b"], ["c", "d"]], "convert string"),
        ([[1.0, np.nan], [2.0, 3.0]], "contains NaN"),
        ([[1.0, np.inf], [2.0, 3.0]], "contains infinity"),
        (X[:1], "1 sample"),
        (X[0], "Expected 2D array"),
        (X[:0], "0 sample"),
        (X[:, :0], "0 feature"),
        (X * 1j, "Complex data"),
        (X * 1e200, "too far for a variance"),
        ([[1, 2], [3]], "inhomogeneous"),
    ],
)
def test_rows_that_cannot_be(rows, says):
    with pytest.raises(ValueError, match=says):
        quick().fit(rows)


def test_sparse_rows():
    from scipy.sparse import csr_matrix

    with pytest.raises(TypeError, match="dense"):
        quick().fit(csr_matrix(X))


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(likelihood="bernoulli"), "X ranges from 0.1 to 7.9, but Bernoulli needs values from 0 to 1"),
        (dict(likelihood="discretized_logistic"), "needs values from -0.5 to 0.5"),
        (dict(likelihood="normal"), "unknown likelihood 'normal'"),
        (dict(model="GAN"), "unknown model 'GAN'"),
        (dict(epochs=0), "epochs=0; expected at least 1"),
        (dict(latent_dim=1.5), "latent_dim=1.5; expected int"),
        (dict(components=0), "components=0"),
        (dict(batch_size="all"), "batch_size='all'"),
        (dict(lam=-1), "lam=-1"),
        (dict(beta=2.0), "beta=2.0 has no effect on MixtureCSRAE; set lam"),
        (dict(lr=0.0), "lr=0.0"),
        (dict(random_state=-1), "random_state=-1; expected at least 0"),
        (dict(validation_fraction=1), "validation_fraction=1; expected"),
        (dict(validation_fraction="a"), "validation_fraction='a'; expected"),
        (dict(config=dict(lr=1.0)), "config sets lr"),
        (dict(config=dict(labels=0.5)), "config sets labels"),
        (dict(config=dict(colour=1)), "unknown field 'colour'"),
        (dict(network="residual"), "residual network takes images"),
        (dict(random_state="x"), "cannot be used to seed"),
    ],
)
def test_parameters_that_cannot_be(kw, says, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # the package's own answer is wanted, not the shape checker's
    est = quick(**kw)
    for train in (est.fit, est.partial_fit):
        if "validation_fraction" in kw and train == est.partial_fit:
            continue
        with pytest.raises(ValueError, match=says):
            train(X)


def test_later_rows_beyond_the_range():
    est = quick().fit(X > 2)
    for method in (est.transform, est.partial_fit, est.score):
        with pytest.raises(ValueError, match="Bernoulli needs values from 0 to 1"):
            method(X)


def test_codes_and_samples_that_cannot_be(fitted):
    with pytest.raises(ValueError, match="X has 4 columns; expected codes of 2"):
        fitted.inverse_transform(X)
    for n in (0, -1, 1.5, "many"):
        with pytest.raises(ValueError, match="n_samples="):
            fitted.sample(n)


def test_samples_of_a_component_or_a_cluster(fitted):
    "As they are among those of all, by the weights of their components; the same again with the same state."
    p = fitted.model_.prior()
    for k in range(len(p.logw)):
        x, of = fitted.sample(4000, component=k)
        z = np.random.default_rng(k).normal(p.mu[k].detach(), p.var[k].detach().sqrt(), (4000, 2))
        ours, other = x, fitted.inverse_transform(z)
        assert set(of) == {k} and np.allclose(ours.mean(0), other.mean(0), atol=0.1)
        assert np.allclose(ours.std(0), other.std(0), rtol=0.15, atol=0.02)
    joined = copy.copy(fitted)
    joined.component_clusters_ = np.array([0, 1, 1, 0])
    of = joined.sample(20_000, cluster=1)[1]
    share = p.logw.exp().numpy()[1:3]
    assert set(of) == {1, 2} and np.isclose((of == 1).mean(), share[0] / share.sum(), atol=0.02)
    for a, b in ((3, np.int64(3)), (np.random.RandomState(1), np.random.RandomState(1))):
        assert all(map(np.array_equal, fitted.sample(9, random_state=a), fitted.sample(9, random_state=b)))
    state = np.random.RandomState(1)
    assert not np.array_equal(*(fitted.sample(9, random_state=state)[0] for _ in range(2)))
    assert np.array_equal(fitted.sample(9)[0], fitted.sample(9, random_state=fitted.config_.seed)[0])
    for kw in (
        dict(component=4),
        dict(component=-1),
        dict(component="a"),
        dict(cluster=9),
        dict(cluster=1.0),
    ):
        with pytest.raises(ValueError, match="expected None, or an integer from 0 to 3"):
            fitted.sample(3, **kw)
    with pytest.raises(ValueError, match="random_state=-1"):
        fitted.sample(3, random_state=-1)


def test_a_loss_that_fails_says_so_without_a_folder():
    for train in ("fit", "partial_fit"):
        est = quick(lr=1e20)
        with pytest.raises(NonFiniteLoss, match="lower lr") as e:
            for _ in range(3):
                getattr(est, train)(X)
        assert "checkpoint" not in str(e.value) and "/" not in str(e.value)


def test_a_failed_fit_leaves_the_class_unfitted():
    est = quick(epochs=0)
    with pytest.raises(ValueError):
        est.partial_fit(X)
    assert not hasattr(est, "model_")
    est.set_params(epochs=2).partial_fit(X)


def test_a_fit_that_fails_leaves_no_half_a_model():
    est = quick().fit(X)
    with pytest.raises(ValueError, match="residual"):
        est.set_params(network="residual").fit(X * 1000)
    with pytest.raises(NotFittedError):
        est.transform(X)
    kept = quick().fit(X)
    before = kept.transform(X)
    with pytest.raises(ValueError, match="NaN"):
        kept.partial_fit(X * np.nan)
    assert np.array_equal(kept.transform(X), before)


# --- clusters that cannot be


@pytest.mark.parametrize(
    "rows, fields, says",
    [
        (150, dict(components=2, clusters=2), "fewer than 3 components: 2"),
        (150, dict(components=2, clusters="auto"), "fewer than 3 components: 2"),
        (150, dict(model="CSRAE", clusters=2), "this CSRAE has fewer than 3 components: 1"),
        (150, dict(model="VAE", components=50, clusters="auto"), "this VAE has fewer than 3 components: 1"),
        (12, dict(components=20, clusters=15), "from 1 to components=12, as many as rows"),
        (2, dict(components=20, clusters=2), "fewer than 3 components: 2"),
        (150, dict(components=4, clusters=5), "from 1 to components=4"),
        (150, dict(components=4, clusters="many"), "clusters='many'"),
        (150, dict(components=4, clusters=2.0), "clusters=2.0"),
    ],
)
def test_clusters_that_cannot_be_are_refused_before_training(rows, fields, says, monkeypatch):
    def trained(*args, **kw):
        raise AssertionError("trained")

    monkeypatch.setattr("csrae_nb.estimator.fit", trained)
    monkeypatch.setattr("csrae_nb.estimator.train_epoch", trained)
    for learn in ("fit", "partial_fit"):
        with pytest.raises(ValueError, match=says):
            getattr(quick(**fields), learn)(X[:rows])


def test_clusters_may_be_asked_for_between_passes():
    est = quick(components=3).partial_fit(X)
    before = est.transform(X)
    with pytest.raises(ValueError, match="from 1 to components=3"):
        est.set_params(clusters=4).partial_fit(X)
    assert np.array_equal(est.transform(X), before) and est.n_iter_ == 1
    for clusters in (1, 2, 3, "auto"):
        est.set_params(clusters=clusters).partial_fit(X)
        assert clusters == "auto" or len(set(est.component_clusters_)) <= clusters


# --- parameters that are set between two passes


def changed_between():
    return dict(
        lr=0.1, lam=2.0, beta=2.0, prior="vamp", model="VAE", components=3, latent_dim=3, warmup=2
    ) | dict(
        network="wide", likelihood="bernoulli", standardize=False, config=dict(kmeans_epoch=1), random_state=1
    )


@pytest.mark.parametrize("field, value", changed_between().items())
@pytest.mark.parametrize("learn", ["fit", "partial_fit"])
def test_a_parameter_set_between_passes_is_not_ignored(learn, field, value):
    est = getattr(quick(epochs=1, warmup=1), learn)(X)
    before, kept = est.transform(X), getattr(est, field)
    with pytest.raises(ValueError, match=rf"{field}=.*\(was .*begin anew with fit"):
        est.set_params(**{field: value}).partial_fit(X)
    assert np.array_equal(pickle.loads(pickle.dumps(est)).transform(X), before) and est.n_iter_ == 1
    est.set_params(**{field: kept}).partial_fit(X)


def test_what_may_be_set_between_passes():
    state = np.random.RandomState(3)
    est = quick(random_state=state, config=dict(kmeans_epoch=1)).partial_fit(X)
    anew = dict(batch_size=20, clusters=3, verbose=False, patience=3, validation_fraction=0.5)
    pickle.loads(pickle.dumps(est)).set_params(**anew).partial_fit(X)
    est.set_params(**anew).partial_fit(X)
    est.config["kmeans_epoch"] = 9  # in place
    with pytest.raises(ValueError, match="config="):
        est.partial_fit(X)
    assert est.set_params(lr=0.01, config=None).fit(X).partial_fit(X).n_iter_ == 4


# --- a prior of one's own


class Tilted(Prior):
    "Gaussians whose covariances are learned, too."

    def __init__(self, components, latent_dim):
        super().__init__()
        self.mu = torch.nn.Parameter(torch.randn(components, latent_dim))
        self.factor = torch.nn.Parameter(torch.eye(latent_dim).repeat(components, 1, 1))

    def forward(self):
        logw = torch.full((len(self.mu),), -np.log(len(self.mu)), dtype=self.mu.dtype)
        return FullGMM(logw, self.mu, self.factor @ self.factor.mT + 0.01 * torch.eye(2))


@pytest.fixture
def tilted():
    PRIORS.register("tilted", uses=("components",))(lambda cfg, *_: Tilted(cfg.components, cfg.latent_dim))
    yield
    del PRIORS["tilted"]


def test_a_prior_with_full_covariances_is_evaluated(tilted, own_runs):
    common = dict(epochs=2, warmup=1, components=4, latent_dim=2, ll_samples=5, fid_layer=0, batch_size=50)
    metrics = complete_run(Config(dataset="arrays", prior="tilted", **common), dict(x=X, y=y), progress=False)
    assert np.isfinite([metrics[k] for k in ("log_likelihood", "log_prior", "log_prior_refit")]).all()


def test_a_prior_with_full_covariances_in_an_estimator(tilted):
    est = quick(prior="tilted", latent_dim=2).fit(X)
    new, k = est.sample(500, component=1)
    assert new.shape == (500, 4) and set(k) == {1}
    codes, prior = est.transform(X), est.model_.prior()
    oracle = prior.to_distribution()
    among = oracle.component_distribution.log_prob(torch.from_numpy(codes)[:, None]) + prior.logw
    np.testing.assert_allclose(est.predict_proba(X), among.softmax(-1).detach(), rtol=1e-6)
    assert np.isfinite(est.score_samples(X[:5])).all() and set(est.join(2).predict(X)) <= {0, 1}


def test_what_is_no_model_and_no_config_of_an_estimator():
    with pytest.raises(ValueError, match="unknown model 'Supervised'; expected one of VAE, "):
        quick(model="Supervised").fit(X)
    with pytest.raises(ValueError, match="config='objective'; expected fields of a Config by name"):
        quick(config="objective").fit(X)


@pytest.mark.parametrize(
    "kw",
    [
        *(dict(model=m) for m in ("CSRAE", "VAE", "IWAE", "VampPriorVAE", "MixtureVAE", "WAE")),
        dict(config=dict(layers=2)),
        dict(config=dict(posterior_components=2)),
        dict(likelihood="bernoulli"),
    ],
    ids=str,
)
def test_a_refitted_prior_serves_every_model(kw):
    "In samples, components and densities, and in a pickle; another fit is without it."
    x = (X > X.mean(0)).astype(float) if "likelihood" in kw else X
    est = quick(**kw).fit(x)
    before = est.sample(200)[0]
    assert est.refit_prior(x) is est
    new, k = est.sample(200)
    assert np.isfinite(new).all() and k.max() < len(est.component_clusters_)
    assert np.allclose(new, before) == (not isinstance(est.refitted_, FullGMM))  # where no step helps
    assert est.predict_proba(x).shape == (len(x), len(est.component_clusters_))
    if est.model_.has_likelihood:
        assert np.isfinite(est.score_samples(x[:5], 16)).all()
    again = pickle.loads(pickle.dumps(est))
    np.testing.assert_array_equal(again.sample(20)[0], est.sample(20)[0])
    assert clone(est).fit(x).refitted_ is None


def test_a_run_as_an_estimator_takes_a_refitted_prior(own_runs):
    run = fit(Config(dataset="arrays", epochs=2, warmup=1, components=4, latent_dim=2), dict(x=X), False)
    est = CSRAEEmbedding.from_run(run).refit_prior(X)
    codes = torch.from_numpy(est.transform(X))
    assert est.refitted_.log_prob(codes).mean() > est.model_.prior().log_prob(codes).mean() + 0.1


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(config=dict(ll_samples=9, name="mine")), "config sets ll_samples, name, which an estimator"),
        (dict(standardize="no"), "standardize='no'; expected True or False"),
        (dict(clusters=True), "clusters=True; expected None, 'auto', or an integer"),
    ],
)
def test_what_an_estimator_would_not_look_at_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        quick(**fields).fit(X)


def test_components_that_are_asked_for_and_too_many_are_said():
    with pytest.warns(UserWarning, match="components=50, but 20 rows to train on"):
        est = quick(components=50, validation_fraction=0.0).fit(X[:20])
    assert est.config_.components == 20


def test_a_run_takes_its_columns_of_a_table_by_name(tmp_path):
    cfg = Config(dataset="arrays", latent_dim=2, epochs=1, components=4, batch_size=50)
    run = fit(cfg, TABLE, progress=False, folder=tmp_path / "run")
    est = CSRAEEmbedding.from_run(run)
    assert np.array_equal(est.transform(TABLE.assign(y="x")[["c", "y", "a", "b"]]), est.transform(TABLE))
