"What is relied on between a run and its tables, in examples so small that the right answer is known."

import struct
from argparse import ArgumentTypeError
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock

from csrae_nb import data as data_module
from csrae_nb import faces as faces_module
from csrae_nb import frames, kernels, predict, runs, sharing, sweeps, trained, training, verbs
from csrae_nb.catalogue import load_data
from csrae_nb.config import Config, resolve
from csrae_nb.data import CENTRED, SPLITS, as_named_arrays
from csrae_nb.drawings import FERA_AUS
from csrae_nb.estimator import CSRAEEmbedding
from csrae_nb.faces import FACES, FaceData
from csrae_nb.files import generator
from csrae_nb.grids import state_in
from csrae_nb.kernels import check_memory, log_z, log_z_by_side
from csrae_nb.labels import Intensities, each_answer
from csrae_nb.mixtures import GMM
from csrae_nb.overlap import naive_log_z
from csrae_nb.reading import files_below, read_mat, read_text
from csrae_nb.runs import fit, load_run, prepare_data
from csrae_nb.sweeps import ray_engine, run_sweep
from csrae_nb.tasks import task_of
from csrae_nb.training import Training, place_components, untrained
from csrae_nb.trained import Examples
from small_runs import ROWS, TINY, stopped_after_two_epochs, tiny


# kernels


def sides(dtype=torch.float64):
    "Means and variances of three Gaussians, and of two others."
    g = torch.Generator().manual_seed(0)
    return [
        f(n, 2, generator=g, dtype=dtype) + c for n in (3, 2) for f, c in ((torch.randn, 0), (torch.rand, 1))
    ]


def test_each_side_learns_from_its_own_overlaps_alone():
    "Also by torch.func, and in a second derivative."
    for own, other, k in ((0, 2, 0), (2, 0, 1)):
        grads = torch.func.grad(lambda *s: log_z_by_side(*s)[k].sum(), (0, 1, 2, 3))(*sides())
        assert all(grads[i].any() and not grads[i - 2].any() for i in (own, own + 1))
        leaves = [t[None].requires_grad_() for t in sides()]
        z = log_z_by_side(*leaves)[k].square().sum()
        first = torch.autograd.grad(z, leaves[own : own + 2], create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), leaves, allow_unused=True)
        assert [t is None for t in second] == [i in (other, other + 1) for i in range(4)]


def test_overlaps_by_side_are_as_precise_as_the_more_precise_side():
    single, double = sides(torch.float32)[:2], sides()[2:]
    for both in ((*single, *double), (*double, *single)):
        exact = log_z(*(t.double() for t in both))
        for z in log_z_by_side(*both):
            torch.testing.assert_close(z, exact, atol=1e-12, rtol=0)


def test_memory_is_asked_for_all_numbers_of_a_pair(monkeypatch):
    monkeypatch.setattr(kernels, "free_memory", lambda device: 2**32)
    check_memory(2**26, torch.zeros(1), 2)
    with pytest.raises(kernels.NotEnoughMemory, match="67,108,864 pairs of components need about 6 GiB"):
        check_memory(2**26, torch.zeros(1), 8)


def test_a_gradient_that_is_no_number_is_passed_on():
    "Of one pair among so many that loops, where there are some, leave out what hardly counts."
    mu, g = torch.zeros(64, 32, requires_grad=True), torch.ones(64, 64)
    g[3, 5] = torch.nan
    (found,) = torch.autograd.grad(
        log_z(mu, torch.ones(64, 32), torch.ones(64, 32), torch.ones(64, 32)), mu, g
    )
    assert found[3].isnan().all() and found[:3].isfinite().all() and found[4:].isfinite().all()


def exact(mu, var):
    "Overlaps of all with all, in double precision and in the plain way."
    return naive_log_z(*2 * (mu.double(), var.double())).float()


@pytest.mark.parametrize("size", [1e-8, 1e4, 1e12])
def test_overlaps_of_variances_far_from_one_are_right(size):
    mu = size**0.5 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    var = torch.full_like(mu, size)
    torch.testing.assert_close(log_z(mu, var), exact(mu, var), rtol=1e-4, atol=1e-2)


def test_overlaps_of_those_that_are_very_far_apart_are_right():
    mu = torch.zeros(64, 32)
    mu[40:] = 1e8 * torch.arange(1.0, 25)[:, None]
    var = torch.ones_like(mu)
    torch.testing.assert_close(log_z(mu, var), exact(mu, var), rtol=1e-4, atol=1e-2)


# runs


def test_values_of_every_split_have_to_fit_the_likelihood():
    data = load_data(dict(x=ROWS))
    for split in ("x_train", "x_val", "x_test"):
        odd = replace(data, **{split: getattr(data, split) + 2})
        with pytest.raises(ValueError, match=f"{split} ranges from 2 to 3"):
            prepare_data(resolve(Config(**TINY)), odd)


def test_data_are_split_by_the_seed_of_the_run():
    data = prepare_data(resolve(Config(split_seed=3)))
    assert data.x_test.equal(load_data("digits", split_seed=3).x_test)


def test_a_mixture_has_at_most_as_many_components_as_examples():
    many = TINY | dict(components=200)
    with pytest.raises(ValueError, match="components=200: more than the 96 training examples of arrays"):
        prepare_data(resolve(Config(**many)), dict(x=ROWS))
    assert prepare_data(resolve(Config(**many, model="VAE")), dict(x=ROWS))


def test_faces_of_an_earlier_version_were_centred():
    cfg = Config(dataset="disfa", image_size=32)
    assert [runs._values(meta, cfg) for meta in ({}, dict(values="bytes"))] == [CENTRED] * 2
    assert runs._values({}, Config()) is None and runs._values(dict(values="floats"), cfg) == "floats"


@pytest.mark.filterwarnings("error")
def test_a_warm_up_may_take_all_epochs(own_runs):
    assert len(tiny("all", epochs=2, warmup=2).history) == 2


@pytest.mark.filterwarnings("error:without effect")
def test_what_a_run_starts_from_lies_in_its_folder(tmp_path):
    "And what is said of labels is not said to be without effect on it."
    cfg = Config(**TINY | dict(network="mlp", epochs=1, pretrain=1, labels=30, labelled_batch=5, alpha=0.3))
    fit(cfg, dict(x=ROWS, y=np.arange(120) % 3), progress=False, folder=tmp_path / "run")
    assert (tmp_path / "run" / "first" / "model.safetensors").exists()


# training and its checkpoints


def test_a_disk_has_to_hold_two_checkpoints(monkeypatch, own_runs):
    "The first of a run has no state of the optimiser yet, which takes twice as much as the weights."
    times = []
    monkeypatch.setattr(training, "_check_space", lambda file, n: times.append(n))
    stopped_after_two_epochs(monkeypatch, epochs=3)
    assert times == [10, 10, 2]


def test_a_run_that_goes_on_is_evaluated_as_is_asked_now(monkeypatch, own_runs):
    def stop(t, bar):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Training, "train_and_validate", stop)
        tiny("a", epochs=1, ll_samples=2)
    assert load_run(tiny("a", epochs=1, ll_samples=7).path).cfg.ll_samples == 7


def test_the_seconds_of_a_run_are_those_of_all_epochs(monkeypatch, own_runs):
    "An epoch looks at the clock twice."
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=partial(next, count(0.0, 1.0))))
    assert tiny("a", epochs=3).seconds == 3


def test_pseudo_inputs_are_chosen_by_the_seed():
    data = load_data(dict(x=ROWS))
    tasks = [task_of(resolve(Config(**TINY, model="VampPriorVAE", seed=s))) for s in (0, 1)]
    first = [untrained(task, data, "cpu")[0].state_dict()["prior.pseudo_inputs"] for task in tasks]
    assert not first[0].equal(first[1])


def test_codes_for_k_means_are_drawn_by_the_seed(monkeypatch):
    cfg, data, seeds = resolve(Config(**TINY, seed=5)), load_data(dict(x=ROWS)), []

    def codes(model, x, g):
        seeds.append(g.initial_seed())
        return torch.randn(20, 2)

    monkeypatch.setattr(training, "draw_codes", codes)
    place_components(*untrained(task_of(cfg), data, "cpu"), data, cfg)
    assert seeds == [generator(5, "kmeans").initial_seed()]


def test_the_best_weights_of_a_checkpoint_are_kept_apart_from_the_last():
    model, opt = untrained(task_of(resolve(Config(**TINY))), load_data(dict(x=ROWS)), "cpu")
    best = {k: v + 1 for k, v in model.state_dict().items()}
    found = training._unpack(training._pack(model, opt, best), model, opt)
    assert found.keys() == best.keys() and all(found[k].equal(v) for k, v in best.items())


def test_a_constraint_has_no_warm_up(own_runs):
    run = tiny("a", epochs=2, warmup=2, constraint="divergence<=10")
    assert [row["weight"] for row in run.history] == [1, 1]


def test_a_finished_run_is_ready_for_use_and_evaluated_as_is_asked_now(own_runs):
    first, again = (tiny("a", epochs=1, ll_samples=n) for n in (2, 7))
    assert not first.model.training and not load_run(first.path).model.training
    assert (load_run(first.path).cfg.ll_samples, again.cfg.ll_samples) == (2, 7)


# labels


def test_a_picture_of_intensities_shows_each_at_its_strongest():
    codes, names = Intensities(10, ("smile", "open")).shown()
    assert names == ["none", "smile", "open"]
    assert codes.tolist() == [[0] * 10, [1] * 5 + [0] * 5, [0] * 5 + [1] * 5]


def test_yes_is_what_was_found_and_what_was_missed():
    assert each_answer(dict(tp_a=1, fn_a=2, fp_a=4, tn_a=8)) == dict(a=dict(yes=3, known=15))


# sharing


def test_how_one_machine_computes_and_logs_is_not_shared():
    cfg = sharing._to_share(Config(dataset="arrays", device="cpu", threads=4, tracker="tensorboard"))
    assert (cfg.dataset, cfg.device, cfg.threads, cfg.tracker) == ("arrays", "auto", 1, None)


# grids and sweeps


def test_a_run_that_is_tried_again_is_running(tmp_path):
    (tmp_path / "failed.json").write_text("{}")
    with FileLock(tmp_path / ".lock"):
        assert state_in(tmp_path, False) == "running"
    assert state_in(tmp_path, False) == "failed"


def test_a_table_is_of_the_whole_grid_whatever_part_is_run(monkeypatch, tmp_path):
    ran, written = [], []
    monkeypatch.setattr(sweeps, "_run", lambda configs, *how: ran.append(len(configs)) or 0)
    monkeypatch.setattr(sweeps, "_write_csv", lambda path, configs: written.append(len(configs)))
    words = "dataset=digits model=VAE seed=0,1,2,3 --shard 1/2 --csv".split()
    assert sweeps.main([*words, str(tmp_path / "table.csv")]) == 0
    assert (ran, written) == ([2], [4])


def test_what_is_finished_elsewhere_meanwhile_is_finished(monkeypatch, own_runs):
    finished = []
    monkeypatch.setattr(sweeps, "is_finished", lambda cfg: bool(finished))

    def engine(work, jobs):
        finished.append(1)
        yield work[0], "running elsewhere"

    outcome = run_sweep([Config(**TINY)], engine=engine, progress=False)
    assert [*outcome.values()] == ["finished"]


def test_ray_is_told_the_cluster_and_the_gpus():
    words = "seed=0 --engine ray --gpus 0.25 --address auto --fleet --fleet-size 8"
    asked = sweeps._engine(sweeps._parser().parse_intermixed_args(words.split()))
    assert asked == dict(engine=ray_engine, address="auto", gpus=0.25, fleet_size=8)


# estimator


@pytest.fixture
def fitted():
    x = np.random.default_rng(0).normal(size=(60, 3))
    return CSRAEEmbedding(epochs=1, components=4, latent_dim=2, random_state=0).fit(x), x


def test_who_trains_on_has_the_prior_of_the_training_again(fitted):
    est, x = fitted
    assert est.refit_prior(x).refitted_ is not None
    assert est.partial_fit(x).refitted_ is None
    assert est.refit_prior(x).fit(x).refitted_ is None


def test_components_are_joined_by_the_prior_that_serves(fitted):
    est, _ = fitted
    mu = torch.tensor([[0.0, 0], [9, 9], [0, 0.1], [9, 9.1]], dtype=torch.float64)
    est.refitted_ = GMM(torch.full((4,), 0.25, dtype=torch.float64).log(), mu, torch.full_like(mu, 0.1))
    a, b, c, d = est.join(2).component_clusters_
    assert a == c != b == d


# reading


def test_a_link_to_a_folder_above_is_a_circle(tmp_path):
    (tmp_path / "other.txt").write_text("")
    (folder := tmp_path / "inside").mkdir()
    (folder / "a.txt").write_text("")
    (folder / "up").symlink_to(tmp_path)
    assert [*files_below(folder)] == [folder / "a.txt"]


@pytest.mark.parametrize("mark, place", [("", 5), ("\ufeff", 8)])
def test_what_is_no_utf_8_is_told_by_its_place(tmp_path, mark, place):
    (file := tmp_path / "a.csv").write_bytes(mark.encode() + b"abcd\xe9")
    with pytest.raises(ValueError, match=rf"\(byte {place} is e9\)"):
        read_text(file)


def test_arrays_of_matlab_in_either_order_of_bytes():
    for order, sign in (("<", b"IM"), (">", b"MI")):
        parts = (6, struct.pack(f"{order}II", 6, 0)), (5, struct.pack(f"{order}ii", 1, 2)), (1, b"pts")
        parts += ((9, struct.pack(f"{order}dd", 0.5, 2.0)),)
        tags = [struct.pack(f"{order}II", kind, len(raw)) + raw + bytes(-len(raw) % 8) for kind, raw in parts]
        body = b"".join(tags)
        head = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}H", 0x0100) + sign
        found = read_mat(head + struct.pack(f"{order}II", 14, len(body)) + body)
        assert found["pts"].tolist() == [[0.5, 2.0]]


# columns


def test_splits_of_hugging_face_are_brought_into_one_order(monkeypatch):
    def split(**columns):
        whole = type("Whole", (), dict(__getitem__=lambda self, rows: columns))()
        return SimpleNamespace(with_format=lambda kind: whole)

    monkeypatch.setattr(data_module, "_is_hub", lambda x: isinstance(x, SimpleNamespace))
    tall, heavy = np.array([1.0, 2.0]), np.array([70.0, 80.0])
    arrays, columns = as_named_arrays(
        dict(train=split(height=tall, weight=heavy), validation=split(weight=heavy, height=tall))
    )
    assert columns == ("height", "weight")
    assert arrays["x_train"].tolist() == arrays["x_val"].tolist() == [[1, 70], [2, 80]]


# faces


def test_what_is_coded_counts_before_what_is_said_not_to_occur(monkeypatch, tmp_path):
    codes = np.array([[3, 2], [4, 9], [5, 9]])
    monkeypatch.setattr(frames, "_fera_occurrence", lambda *a: {3: {*FERA_AUS}, 4: {*FERA_AUS}})
    monkeypatch.setattr(frames, "_only", lambda *a: tmp_path)
    monkeypatch.setattr(frames, "_table", lambda *a: codes)
    found, odd = frames._fera_intensities(tmp_path, "F001_T1", [3, 4, 5])
    assert found[:, 0].tolist() == [2, 0, frames.UNKNOWN] and odd == []


def test_beyond_the_edge_of_a_picture_its_edge_goes_on():
    pytest.importorskip("cv2")
    image = np.full((40, 40, 3), 200, np.uint8)
    assert (frames.aligned(image, np.array([[1.0, 0, 10], [0, 1, -10]]), 40) == 200).all()


def test_of_few_subjects_one_is_kept_to_validate_on():
    who = np.repeat(["Ann", "Bob", "Cem"], 4)
    rows = faces_module.fold_rows(who, (("Ann",), ("Bob",), ("Cem",)), 0, 0, "subjects")
    assert rows["test"].tolist() == [0, 1, 2, 3] and len(rows["val"]) == len(rows["train"]) == 4


def test_an_action_unit_is_present_from_an_intensity_of_two_on():
    "Or of any other that a question has of its own."
    levels = np.array([[0, 0], [1, 1], [2, 2], [5, 5], [-1, 2]], np.int8)
    faces, rows = replace(FACES["disfa"], aus=(1, 2), least=(2, 1)), dict.fromkeys(SPLITS, np.arange(5))
    store = SimpleNamespace(name="a", intensities=levels, faces=faces)
    for answers, wanted in (
        ("presence", [[0, 0], [0, 1], [1, 1], [1, 1], [-1, 1]]),
        ("intensity", levels.tolist()),
    ):
        assert [y.tolist() for y in faces_module._answers(store, rows, 0, answers)] == [wanted] * 3


def test_eyes_are_averaged_over_frames_and_not_over_recordings(monkeypatch, tmp_path):
    of = dict(a=(1, np.zeros((2, 2))), b=(3, 3 * np.ones((2, 2))))
    faces = replace(FACES["disfa"], folds=(("a",), ("b",)))
    monkeypatch.setattr(faces_module, "eye_sums", lambda read, root, name: of[name])
    assert faces_module.mean_eyes(faces, tmp_path) == ((0.75, 0.75),) * 2


def test_a_data_set_of_faces_is_loaded_as_is_asked_for(monkeypatch):
    asked = []

    def load(*args, **how):
        asked.append((args, how))
        return FaceData.__new__(FaceData)

    monkeypatch.setattr(faces_module, "load_faces", load)
    faces_module._loader("disfa")("gaussian", 5, fold=1, image_size=64, mirror=False)
    assert asked == [(("disfa", 1, 64, 5, "gaussian"), dict(mirror=False))]


# predictions


def test_pictures_after_a_stop_keep_their_names(monkeypatch, tmp_path):
    cv2, names = pytest.importorskip("cv2"), ("a.png", "b.png", "c.png")
    for k, name in enumerate(names):
        cv2.imwrite(str(tmp_path / name), np.full((8, 8, 3), k, np.uint8))
    clip = predict.Clip(names, tuple(tmp_path / name for name in names))
    found = predict.seen_in(clip, lambda image: None, 1, False)
    assert [(name, n, s.image[0, 0, 0]) for name, n, s in found] == [("b.png", 0, 1), ("c.png", 0, 2)]


def test_an_answer_that_is_called_like_a_column_has_its_own_yes(tmp_path):
    (table := tmp_path / "a").write_text("name,found,answer found\na,1,0.3\nb,1,0.7\n")
    predict._with_yes(table, out := tmp_path / "out.csv", dict(found=0.5))
    assert out.read_text().splitlines() == ["name,found,answer found,found yes", "a,1,0.3,0", "b,1,0.7,1"]


# pages, samples and test splits


def test_a_page_tells_the_epoch_that_was_kept(monkeypatch, own_runs):
    run = replace(tiny("a", epochs=2), best_epoch=1)
    for name, gives in dict(plot_history=None, _pictures={}, _drawn="").items():
        monkeypatch.setattr(trained, name, lambda *a, gives=gives: gives)
    assert "<td>epochs<td>2" in (page := trained.report(run)) and "<td>kept<td>1<" in page


def test_a_page_shows_the_heaviest_components(monkeypatch):
    asked, row, p = [], torch.zeros(1, 2), SimpleNamespace(logw=(torch.arange(1.0, 15) / 105).log())
    run = SimpleNamespace(model=SimpleNamespace(prior=lambda: p), cfg=Config(), columns=(), x_shape=(2,))
    monkeypatch.setattr(trained, "sample_examples", lambda run, n, k=None, **how: asked.append(k) or row)
    monkeypatch.setattr(trained, "show_sheet", lambda *a: None)
    monkeypatch.setattr(trained, "_map", lambda run: None)
    trained._pictures(run)
    assert asked == [None, *range(13, 1, -1)]


def test_samples_are_of_the_prior_that_is_given(monkeypatch, own_runs):
    run, p = tiny("a", epochs=1), GMM(torch.zeros(1), torch.full((1, 2), 3.0), torch.ones(1, 2))
    monkeypatch.setattr(run.model, "sample", lambda n, g, component, p, noise: p.mu)
    assert trained.sample_examples(run, 1, prior=p).equal(p.mu)
    assert trained.sample_examples(run, 3).equal(run.model.prior().mu)


@pytest.mark.parametrize("who", ["Ann", "Bob"])
def test_who_chose_the_epoch_of_a_run_is_no_test_of_it(monkeypatch, tmp_path, who):
    there = dict(subjects=dict(train=["Ann"], val=["Bob"], test=["Zoe"]))
    monkeypatch.setattr(trained, "read_metrics", lambda path: there)
    run = SimpleNamespace(path=tmp_path, cfg=Config(dataset="disfa"), sha256={})
    with pytest.raises(ValueError, match=f"its test split would have {who}, from whom the run learned"):
        trained._check_subjects(run, "disfa", SimpleNamespace(subjects=dict(test=(who, "Zoe")), sha256={}))


def test_columns_without_names_are_counted_from_one():
    assert verbs._table(torch.tensor([[0.5, 2.0]]), ()) == b"x1,x2\n0.5,2\n"


def test_a_count_may_be_the_least_that_is_asked_for():
    assert (verbs._count("1"), verbs._count("0", 0)) == (1, 0)
    with pytest.raises(ArgumentTypeError, match="'0'; expected a whole number of at least 1"):
        verbs._count("0")


# the command line

ON_A_RUN = "encode a b --out c.csv,score a b,predict a b --out c.csv,sample a --out c.npz,"
ON_A_RUN += "reconstruct a b --out c.npz,clusters a --out c.csv,report a --out c.html"


@pytest.mark.parametrize("words", ON_A_RUN.split(","))
def test_a_model_goes_to_the_device_that_is_asked_for(monkeypatch, tmp_path, words):
    asked = []

    def opened(*args, **how):
        asked.append(args)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verbs, "open_run", opened)
    assert verbs.main([*words.split(), "--device", "cuda"]) == 130
    assert asked == [("a", "cuda")]


def test_videos_are_looked_at_as_is_asked_for(monkeypatch, tmp_path):
    asked = {}

    def write(run, data, out, **how):
        asked.update(how)
        out.write_text("recording\n")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verbs, "open_run", lambda *a, **how: None)
    monkeypatch.setattr(verbs, "write_predictions", write)
    words = "predict a b --out c.csv --detector yunet --model d --jobs 2 --overlay e --every 3 --yes --force"
    assert verbs.main(words.split()) == 0
    asked = {k: v.name if isinstance(v, Path) else v for k, v in asked.items()}
    assert asked == dict(detector="yunet", model="d", jobs=2, overlay="e", every=3, yes=True, force=True)


def test_each_example_comes_before_its_reconstruction(monkeypatch, tmp_path):
    shown, x = [], torch.arange(6.0).view(3, 2)
    model = SimpleNamespace(reconstruct=lambda x: x + 10)
    run = SimpleNamespace(model=model, device="cpu", x_shape=(2,), columns=())
    monkeypatch.setattr(verbs, "open_run", lambda *a: run)
    monkeypatch.setattr(verbs, "examples_of", lambda *a: Examples(x, ("a", "b", "c")))
    monkeypatch.setattr(verbs, "_picture", lambda xs, *a: shown.append(xs) or b"")
    assert verbs.main(["reconstruct", "a", "b", "--out", str(tmp_path / "c.png")]) == 0
    assert shown[0].tolist() == [[0, 1], [10, 11], [2, 3], [12, 13], [4, 5], [14, 15]]
