"Somebody else's package adds parts, and nothing here is changed for it."

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from csrae_nb.catalogue import DATASETS, SMALL, load_data, preset
from csrae_nb.config import TASKS, Config, make_config, resolve, run_name
from csrae_nb.data import from_arrays
from csrae_nb.divergence import GMM
from csrae_nb.estimator import CSRAEEmbedding
from csrae_nb.evaluation import _real_statistics, complete_run, results_table
from csrae_nb.files import runs_folder
from csrae_nb.grids import without_effect
from csrae_nb.likelihoods import LIKELIHOODS, Bernoulli, Gaussian
from csrae_nb.metrics import Features
from csrae_nb.models import CSRAE, DIVERGENCES, MODELS, VAE, BatchTerm, Weight
from csrae_nb.networks import NETWORKS
from csrae_nb.priors import PRIORS, Prior
from csrae_nb.registry import Registry
from csrae_nb.results import read_rows
from csrae_nb.runs import fit, prepare_data
from csrae_nb.sharing import _may_show, check_model
from csrae_nb.tasks import Task, make_model, task_of

ROOT = Path(__file__).parents[1]
THEIRS = '''
import torch
from torch import nn

from csrae_nb.catalogue import DATASETS, SMALL
from csrae_nb.config import TASKS
from csrae_nb.data import from_arrays
from csrae_nb.divergence import GMM, cs_divergence
from csrae_nb.likelihoods import LIKELIHOODS, Bernoulli
from csrae_nb.models import DIVERGENCES, MODELS, BatchTerm, MixtureCSRAE, Weight
from csrae_nb.priors import PRIORS, Prior
from csrae_nb.tasks import Task


@DATASETS.register("theirs", preset=SMALL | dict(latent_dim=2, components=5, epochs=6, warmup=2))
def stripes(likelihood=None, split_seed=0):
    x = (torch.rand(400, 12, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    arrays = dict(x=x, y=torch.arange(400) % 3)
    return from_arrays(arrays, likelihood or "bernoulli", split_seed, "theirs", dict(x="of no file"))


class Ring(Prior):
    "Components on a circle, of which the radius is learned."

    def __init__(self, components, radius):
        super().__init__()
        angle = torch.arange(components) * 2 * torch.pi / components
        self.register_buffer("at", torch.stack([angle.cos(), angle.sin()], 1))
        self.radius = nn.Parameter(torch.tensor(radius))

    def forward(self):
        K = len(self.at)
        return GMM(torch.full((K,), 1 / K).log(), self.radius * self.at, torch.full((K, 2), 0.3))


LIKELIHOODS.add("coin", Bernoulli)


@PRIORS.register("ring", uses=("components",), fields=dict(radius=1.0))
def ring(cfg, encoder, pseudo_inputs):
    return Ring(cfg.components, cfg.radius)


@DIVERGENCES.register("half")
def half(q, p):
    return cs_divergence(q, p) / 2


class Missing(BatchTerm):
    "How far the variance of all codes of a batch is below 1/2."

    def forward(self, q, p):
        return 0.5 - q.mean.var(-2).mean(-1)


class Multiplier(Weight):
    "Grows while its term is above 0, and shrinks below."

    learns = True

    def update(self, terms):
        self.now.add_(0.1 * terms["missing"]).clamp_(min=0)


@MODELS.register(weight="lam", options=dict(objective="objective"))
class Spread(MixtureCSRAE):
    "With a term of the whole batch, whose weight is learned: codes have a variance of at least 1/2."

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.batch_terms["missing"], self.weights["missing"] = Missing(), Multiplier(0.0)


@TASKS.register("backwards")
class Backwards(Task):
    "Each batch in the opposite order."

    @staticmethod
    def serves(cfg):
        return cfg.dataset == "theirs" and not cfg.labels

    def rows(self, data, epoch):
        return super().rows(data, epoch).flip(1)

    def metrics(self, model, data):
        return dict(multiplier=model.weights["missing"]().item() if "missing" in model.weights else 0.0)
'''
FIELDS = dict(dataset="theirs", prior="ring", model="Spread", objective="half", ll_samples=20)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder with the package, as pip would install it."
    site = tmp_path_factory.mktemp("site")
    (site / "their_package.py").write_text(THEIRS)
    info = site / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    broken = "broken = no_such_package.at_all\n"
    (info / "entry_points.txt").write_text(f"[csrae_nb.plugins]\ntheirs = their_package\n{broken}")
    return site


@pytest.fixture
def run(site, tmp_path):
    "A command, in a process that has the package."
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "CSRAE_RUNS": str(tmp_path / "runs"), "PYTHONPATH": path}
    env.pop("CSRAE_TYPECHECK", None)

    def run(*words, status=0):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def script(*lines):
    head = (
        "import os, torch",
        "from csrae_nb import Config, fit, load_run",
        "from csrae_nb.training import Training",
    )
    return "\n".join([*head, *lines])


def test_a_likelihood_of_a_plugin_is_known_where_it_is_the_first_that_is_asked_for(run):
    words = "import numpy as np", "from csrae_nb import load_data"
    run("-c", "\n".join([*words, "load_data(dict(x=(np.random.rand(50, 4) > 0.5) * 1.0), 'coin')"]))


def test_what_plugins_add_is_trained_killed_resumed_and_evaluated(run, tmp_path):
    whole = script(f"fit(Config(**{FIELDS!r}, name='whole'), progress=False)")
    assert "the plugin broken (no_such_package.at_all) is left out" in run("-c", whole)
    dying = script(
        "saves, save = iter(range(3)), Training.save",
        "Training.save = lambda t: save(t) if next(saves, None) is not None else os._exit(9)",
        f"fit(Config(**{FIELDS!r}, name='killed'), progress=False)",
    )
    run("-c", dying, status=9)
    words = [w for k, v in {**FIELDS, "name": "killed"}.items() for w in ("-p", k, str(v))]
    run("-m", "papermill", "nbs/train.ipynb", str(tmp_path / "out.ipynb"), *words)
    same = script(
        "folder = os.environ['CSRAE_RUNS']",
        "a, b = (load_run(f'{folder}/{n}').model.state_dict() for n in ('whole', 'killed'))",
        "assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)",
        "assert a['weights.missing.now'] > 0 and a['prior.radius'] != 1",
    )
    run("-c", same)
    content = json.loads((tmp_path / "runs" / "killed" / "metrics.json").read_text())
    metrics = content["metrics"]
    assert content["provenance"]["versions"]["their-package"] == "1.0"
    assert metrics["multiplier"] > 0 and metrics["knn3"] is not None


def test_what_plugins_add_is_swept_by_processes(run, tmp_path):
    words = ["dataset=theirs", "prior=ring,mog", "epochs=2", "ll_samples=0", "--jobs", "2"]
    main = "import sys; from csrae_nb.sweeps import main; sys.exit(main(sys.argv[1:]))"
    run("-c", main, *words, "--csv", str(tmp_path / "table.csv"))
    rows = (tmp_path / "table.csv").read_text().splitlines()
    assert len(rows) == 3 and "ring" in rows[1]


def test_a_field_that_a_plugin_brings_is_set_as_any_other(run, tmp_path):
    "By a grid and by papermill; of a mog it is no part. It is found again in tables and commands."
    words, table = ["dataset=theirs", "epochs=2", "ll_samples=0"], tmp_path / "table.csv"
    sweep = "import sys; from csrae_nb.sweeps import main; sys.exit(main(sys.argv[1:]))"
    run("-c", sweep, *words, "prior=ring,mog", "radius=1,3", "--jobs", "1", "--csv", str(table))
    rows = {(r["prior"], r["settings"]): r["command"] for r in read_rows(table)}
    assert rows.keys() == {("ring", None), ("ring", "radius=3.0"), ("mog", None)}
    assert [("-p radius 3.0" in c) for c in rows.values()] == [s is not None for _, s in rows]
    papermill = Path(sysconfig.get_path("scripts")) / "papermill"
    typed = [w for k in (*words, "prior=ring", "radius=3") for w in ("-p", *k.split("="))]
    run(str(papermill), "nbs/train.ipynb", *typed)
    same = script(
        "from csrae_nb.config import make_config, run_name",
        "from csrae_nb.files import runs_folder",
        "from csrae_nb.grids import sweep_fields",
        "cfg = make_config(dict(dataset='theirs', epochs=2, prior='ring', radius=3))",
        "assert len(list(runs_folder().glob('theirs-*'))) == 3 and sweep_fields()[-1] == 'radius'",
        "run = load_run(runs_folder() / run_name(cfg))",
        "assert run.cfg.radius == 3 and 2 < run.model.prior.radius < 4",
    )
    run("-c", same)


def test_what_plugins_add_trains_in_a_fleet(run):
    "Their task, prior, term of a batch and weight, none of which knows of fleets."
    checks = script(
        "from csrae_nb.fleet import fit_fleet",
        f"usual = {FIELDS}",
        "together = [Config(**usual, seed=s, name=f'together{s}') for s in range(2)]",
        "alone = [fit(Config(**usual, seed=s, name=f'alone{s}'), progress=False) for s in range(2)]",
        "for a, b in zip(alone, fit_fleet(together, progress=False), strict=True):",
        "    assert all(abs(b.history[-1][k] - v) <= 1e-3 * abs(v) + 1e-4 for k, v in a.history[-1].items())",
        "    assert a.history[-1]['weight_missing'] > 0",
    )
    run("-c", checks)


def test_names_that_nobody_added_are_refused(run):
    said = run("-c", script("Config(dataset='theirs', prior='rings')"), status=1)
    assert "unknown prior 'rings'; expected one of mog, vamp, ring" in said


def test_a_part_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match="unknown prior 'ring', to which 'radius' may belong; install"):
        Config(prior="ring", extra=dict(radius=3.0))
    with pytest.raises(ValueError, match="extra names 'radius'; the fields that registered parts bring"):
        Config(extra=dict(radius=3.0))


def test_another_module_does_not_replace_an_entry_of_the_same_name():
    "Only its own module does, when it is loaded again, and a chapter that is run as a notebook."
    shapes = Registry("shape")
    ours, again, theirs, on_a_page = (type("Square", (), {}) for _ in range(4))
    for square, module in (ours, "ours"), (again, "ours"), (theirs, "theirs"), (on_a_page, "__main__"):
        square.__module__ = module
    shapes.add("Square", ours)
    shapes.add("Square", again)
    with pytest.raises(
        ValueError, match="the shape 'Square' is there already: Square of ours; choose another"
    ):
        shapes.add("Square", theirs)
    shapes.add("Square", on_a_page)
    assert shapes["Square"] is on_a_page


def test_what_must_be_said_of_an_entry_is_asked_for():
    for about, says in (
        (dict(prior="normal"), "without weight="),
        (dict(weight="lam", wieght=1), "with wieght="),
    ):
        with pytest.raises(ValueError, match=says):
            MODELS.register("Mine", **about)(CSRAE)
    with pytest.raises(ValueError, match="'mine' is registered without uses="):
        PRIORS.register("mine")(lambda cfg, encoder, pseudo_inputs: None)
    assert "Mine" not in MODELS and "mine" not in PRIORS


def test_a_data_sets_fields_are_not_a_clones(tmp_path, monkeypatch):
    "What belongs to the data that a run was trained on, the rows that a clone gets do not have."
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))

    @DATASETS.register("spread", preset=SMALL, fields=dict(width=1.0))
    def spread(likelihood=None, split_seed=0, width=1.0):
        x = width * np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
        return from_arrays(dict(x=x), likelihood, split_seed, "spread", dict(x="of no file"))

    try:
        cfg = make_config(dict(dataset="spread", width=0.5, epochs=1, warmup=0, components=3, batch_size=20))
        assert load_data("spread", width=0.5).x_train.equal(load_data("spread").x_train / 2)
        assert prepare_data(resolve(cfg)).x_train.equal(load_data("spread").x_train / 2)
        est = CSRAEEmbedding.from_run(fit(cfg, progress=False))
        assert clone(est).fit(np.random.default_rng(1).normal(size=(60, 4))).transform(np.zeros((2, 4))).shape
    finally:
        del DATASETS["spread"]


def test_a_brought_field_without_effect_is_named_itself():
    PRIORS.register("tilted", uses=("components",), fields=dict(tilt=1.0))(lambda *a: None)
    try:
        grid = [make_config(dict(model="VAE", tilt=t)) for t in (1.0, 2.0)]
        assert without_effect(grid) == ["without effect on VAE: tilt"]
    finally:
        del PRIORS["tilted"]


def test_what_was_said_of_an_entry_holds_for_what_replaces_it():
    shapes = Registry("shape", needs=("sides",))
    shapes.add("square", "a", sides=4)
    shapes["square"] = "b"
    assert (shapes.find("square"), shapes.about("square", "sides")) == ("b", 4)
    with pytest.raises(ValueError, match=r"add\(…, sides=…\) takes a new shape, 'cube'"):
        shapes["cube"] = "c"


def test_two_threads_ask_for_a_plugin_at_once():
    script = """
        import threading
        from csrae_nb.models import MODELS

        found, both = [], threading.Barrier(2)

        def ask():
            both.wait()
            found.append(MODELS.find("WAE").__name__)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert found == ["WAE"] * 2, found
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_real_statistics_are_kept_apart_by_a_data_sets_own_fields(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_CACHE", str(tmp_path))
    x = torch.rand(60, 4)

    def part(likelihood=None, split_seed=0, part=0):
        arrays = dict(x_train=x, x_val=x[:10], x_test=x[30 * part :][:30])
        return from_arrays(arrays, "gaussian", split_seed, "parts", dict(file="0" * 64))

    DATASETS.add("parts", part, preset=SMALL, fields=dict(part=0), uses=("part",))
    try:
        features, some = Features("flat", lambda x: x.flatten(1)), torch.arange(30)
        configs = [resolve(make_config(dict(dataset="parts", part=k))) for k in (0, 1)]
        found = [_real_statistics(c, part(part=k), features, some).mean for k, c in enumerate(configs)]
    finally:
        del DATASETS["parts"]
    assert not torch.equal(*found)


SMALL_RUN = dict(
    dataset="arrays", latent_dim=2, components=3, network="mlp", epochs=2, warmup=0, batch_size=20
)
SMALL_RUN |= dict(ll_samples=0, fid_layer=0, expost_components=2)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    "A place for runs; what a test registers is gone after it."
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path))
    tables = DATASETS, DIVERGENCES, LIKELIHOODS, MODELS, NETWORKS, PRIORS, TASKS
    before = [[*t] for t in tables]
    yield
    for table, names in zip(tables, before):
        for name in {*table} - {*names}:
            del table[name]


def rows_of(n=100, scale=1.0):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)).numpy() * scale
    return load_data(dict(x=x, y=np.arange(n) % 3))


class Wheel(Prior):
    "Components on a circle; without `own`, weights that are not normalised."

    def __init__(self, n, own=True):
        super().__init__()
        self.mu = nn.Parameter(torch.randn(n, 2, generator=torch.Generator().manual_seed(0)))
        self.own = own

    def forward(self):
        logw = torch.zeros(len(self.mu))
        return GMM(logw.log_softmax(0) if self.own else logw, self.mu, torch.ones_like(self.mu))


def test_a_prior_whose_weights_are_not_normalised_is_refused_before_training(parts):
    PRIORS.register("wheel", uses=())(lambda cfg, *_: Wheel(5, own=False))
    with pytest.raises(ValueError, match="the prior Wheel: .*logw"):
        fit(make_config(SMALL_RUN | dict(prior="wheel")), rows_of(), progress=False)


def test_components_of_a_prior_that_has_its_own_are_not_those_of_a_configuration(parts):
    PRIORS.register("wheel", uses=(), fields=dict(spokes=5))(lambda cfg, *_: Wheel(cfg.spokes))
    cfg = make_config(SMALL_RUN | dict(prior="wheel", spokes=4, name=None))
    assert "-wheel-z2" in run_name(cfg)
    measured = complete_run(cfg, rows_of(), progress=False)
    (row,) = results_table([runs_folder() / run_name(cfg)])
    assert measured and row["components"] is None and row["settings"].startswith("batch_size=20 spokes=4")
    est = CSRAEEmbedding(
        latent_dim=2, prior="wheel", components=2, clusters=4, epochs=1, config=dict(spokes=6)
    )
    assert {*est.fit(rows_of().x_train.numpy()).predict(np.eye(4))} <= {*range(4)}


def test_a_loss_of_ones_own_is_not_passed_by_labels(parts):
    @MODELS.register(weight="beta", prior="normal")
    class Own(VAE):
        def loss(self, x, generator=None):
            raise AssertionError("is called")

    with pytest.raises(ValueError, match="labels have no Own: its loss is one of its own"):
        make_config(SMALL_RUN | dict(model="Own", labels=10))


def test_the_best_epoch_is_that_of_what_is_trained(parts):
    class Term(BatchTerm):
        def forward(self, q, p):
            return q.mu.square().mean()

    class Growing(Weight):
        learns = True

    cfg = resolve(Config(**SMALL_RUN, model="VAE"))
    model = make_model(cfg, (4,), "gaussian")
    row = dict(val_reconstruction=1.0, val_divergence=2.0, val_more=4.0)
    model.batch_terms["more"] = Term()
    assert task_of(cfg).score(model, row) == 7.0
    model.weights["more"] = Growing(0.5)
    model.weights["more"].now.fill_(100.0)
    assert task_of(cfg).score(model, row) == 5.0


@pytest.mark.parametrize("table", [DIVERGENCES, LIKELIHOODS, NETWORKS])
def test_a_field_that_would_reach_nobody_is_refused(table):
    with pytest.raises(ValueError, match="is registered with fields=…; expected"):
        table.add("mine", None, fields=dict(temper=2.0))


@pytest.mark.parametrize("default", [None, (1, 2), [1.0]])
def test_a_field_has_a_default_of_a_type(parts, default):
    PRIORS.register("wheel", uses=(), fields=dict(spokes=default))(lambda *_: None)
    with pytest.raises(ValueError, match="'wheel' brings a field spokes=.*; expected a default that is"):
        make_config({})


def test_a_fields_value_is_finite(parts):
    PRIORS.register("wheel", uses=(), fields=dict(turns=2.0))(lambda *_: None)
    with pytest.raises(ValueError, match="turns=nan; expected a finite number"):
        make_config(dict(turns=float("nan")))


@pytest.mark.parametrize("kind", ["objective", "prior_objective", "dataset"])
def test_an_objective_or_data_that_are_not_installed_are_named(kind):
    with pytest.raises(ValueError, match=f"unknown {kind} 'theirs', to which 'temper' may belong; install"):
        Config(**{kind: "theirs"}, extra=dict(temper=2.0))


def test_a_likelihood_says_what_bytes_become(parts):
    class Counts(Gaussian):
        low, of_bytes = 0.0, None

    class Coin(Bernoulli):
        pass

    LIKELIHOODS.update(counts=Counts, coin=Coin)
    x = np.arange(240, dtype=np.uint8).reshape(60, 4)
    assert load_data(dict(x=x), "counts").x_train.max() > 200
    grey = load_data(dict(x=x), "coin")
    assert grey.dynamic and grey.x_train.max() <= 1


def test_a_networks_rows_are_looked_at_before_training(parts):
    good = NETWORKS["mlp"]
    longer = replace(good, encoder=lambda x_shape, n, g: good.encoder(x_shape, n + 2, g))
    NETWORKS.add("longer", longer)
    with pytest.raises(ValueError, match=r"'longer': of two rows of 4 numbers its encoder makes \(2, 6\)"):
        fit(Config(**SMALL_RUN | dict(network="longer")), rows_of(), progress=False)


def test_layers_that_draw_without_a_generator_depend_on_the_seed(parts, tmp_path):
    def encoder(x_shape, n, generator):
        return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, n))

    NETWORKS.add("plain", replace(NETWORKS["mlp"], encoder=encoder))
    found, data = [], rows_of()
    for k, seed in enumerate((0, 0, 1)):
        torch.manual_seed(k)
        before = torch.get_rng_state()
        run = fit(Config(**SMALL_RUN | dict(network="plain"), seed=seed, name=f"r{k}"), data, progress=False)
        assert torch.get_rng_state().equal(before)
        found.append([{k: v for k, v in r.items() if k != "seconds"} for r in run.history])
    assert found[0] == found[1] != found[2]


def test_what_a_task_measures_is_in_the_table(parts):
    class Mine(Task):
        @staticmethod
        def serves(cfg):
            return cfg.name == "mine"

        def metrics(self, model, data):
            return dict(my_metric=3.5, words="no number")

    TASKS.register("mine")(Mine)
    complete_run(Config(**SMALL_RUN, name="mine"), rows_of(), progress=False)
    (row,) = results_table([runs_folder() / "mine"])
    assert row["my_metric_mean"] == 3.5 and "words_mean" not in row and "images_mean" not in row


def test_a_preset_is_of_files_whose_names_begin_with_a_whole_word(parts):
    DATASETS.add("blob", load_data, preset=dict(latent_dim=3))
    dims = [preset(f"/tmp/{name}.npz")["latent_dim"] for name in ("blob", "blob_of_mine", "blobs")]
    assert dims == [3, 3, preset("/tmp/other.npz")["latent_dim"]]


def test_a_plugins_data_are_not_public(parts):
    DATASETS.add("clinic", load_data, preset=SMALL)
    model = SimpleNamespace(state_dict=lambda: {"prior.pseudo_inputs": torch.zeros(4, 2)})
    run = SimpleNamespace(cfg=SimpleNamespace(dataset="clinic"), model=model, path=Path("a"))
    assert "may show them" in _may_show(run)


def test_a_field_that_two_bring_names_both(parts):
    PRIORS.register("wheel", uses=(), fields=dict(spokes=5))(lambda *_: None)
    DATASETS.add("blob", load_data, fields=dict(spokes=6))
    there = "the dataset 'blob' brings a field 'spokes', which is there already, of the prior 'wheel', with"
    with pytest.raises(ValueError, match=f"{there} default 5; choose another name"):
        make_config({})


def test_a_prior_that_needs_numbers_is_opened(parts):
    class Counted(Wheel):
        def __init__(self, n):
            super().__init__(n)
            self.names = [f"{m:.2f}" for m in self.mu[:, 0].tolist()]

    PRIORS.register("counted", uses=("components",))(lambda cfg, *_: Counted(cfg.components))
    run = fit(make_config(SMALL_RUN | dict(prior="counted", name="a")), rows_of(), progress=False)
    check_model(run.path / "model.safetensors")
