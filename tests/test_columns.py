"""Tables of other people's tools: pandas, polars, pyarrow, torch and Hugging Face in memory, and .parquet;
by the names of their columns from training to codes. What is not installed is skipped."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import trapezoid
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from csrae_nb import formats, trained
from csrae_nb.catalogue import load_data
from csrae_nb.config import Config, resolve
from csrae_nb.data import LazyImages, as_named_arrays, from_arrays
from csrae_nb.estimator import CSRAEEmbedding
from csrae_nb.runs import fit, load_run
from csrae_nb.tasks import task_of
from csrae_nb.verbs import main

BRIEF = dict(dataset="arrays", epochs=2, warmup=1, latent_dim=2, components=4, batch_size=20)
NAMES = "height", "weight", "age"
VALUES = np.random.default_rng(0).normal(size=(80, 3)) * (1, 30, 9) + (0, 70, 40)
FRAME = pd.DataFrame(VALUES, columns=NAMES).assign(y=["a", "b"] * 40)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Trained on a table in memory."
    return fit(Config(**BRIEF), FRAME, progress=False, folder=tmp_path_factory.mktemp("runs") / "table")


def as_polars(frame):
    return pytest.importorskip("polars").from_dict({k: frame[k].to_list() for k in frame})


def as_arrow(frame):
    return pytest.importorskip("pyarrow").table({k: frame[k].to_list() for k in frame})


def as_hub(frame):
    return pytest.importorskip("datasets").Dataset.from_dict({k: frame[k].to_list() for k in frame})


class Dataset:
    "Stands for a Dataset of Hugging Face, as far as it is asked."

    def __init__(self, columns):
        self.columns = columns

    column_names = property(lambda self: [*self.columns])

    def with_format(self, kind):
        assert kind == "numpy"
        return self

    def __getitem__(self, rows):
        return {k: np.array(v)[rows] for k, v in self.columns.items()}


Dataset.__module__ = "datasets.arrow_dataset"


def as_stand_in(frame):
    return Dataset({k: frame[k].to_list() for k in frame})


KINDS = [pd.DataFrame, as_polars, as_arrow, as_hub, as_stand_in]


# --- in memory, by name


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_read_by_names_and_not_by_places(run, kind):
    assert run.columns == NAMES
    shuffled = kind(FRAME[["age", "y", "weight", "height"]].assign(who="someone"))
    assert torch.equal(trained.read_examples(run, shuffled).x, torch.from_numpy(VALUES).float())
    with pytest.raises(ValueError, match="has no column height; expected height, weight, age"):
        trained.read_examples(run, kind(FRAME[["age", "weight"]]))
    with pytest.raises(ValueError, match="columns age hold no numbers"):
        trained.read_examples(run, kind(FRAME.assign(age="old")))
    gap = FRAME.assign(weight=[None if i == 6 else v for i, v in enumerate(FRAME.weight)])
    with pytest.raises(ValueError, match="row 7, column 'weight' holds nothing; expected a number"):
        trained.read_examples(run, kind(gap))


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_in_memory_is_the_data_set_that_its_file_is(tmp_path, kind):
    FRAME.to_csv(tmp_path / "people.csv", index=False)
    here, there = load_data(kind(FRAME)), load_data(tmp_path / "people.csv")
    assert here.columns == there.columns == NAMES and here.classes == there.classes == ("a", "b")
    for k in ("x_train", "x_val", "x_test", "y_train", "y_test"):
        assert torch.equal(getattr(here, k), getattr(there, k))
    with pytest.raises(ValueError, match="columns who hold no numbers: leave them out"):
        load_data(kind(FRAME.assign(who="someone")))


@pytest.mark.parametrize("numbers", [range(80), range(1, 81), [*range(80, 160)][::-1]])
def test_row_numbers_of_pandas_are_no_data(tmp_path, numbers, run):
    frame, path = FRAME.set_axis(numbers), tmp_path / "people.csv"
    for _ in range(2):  # written, and read and written once more
        frame.to_csv(path)
        with pytest.warns(UserWarning, match="numbers the rows, so it is left out") as told:
            data = load_data(path)
        assert len(told) == 1 and data.columns == NAMES and data.x_shape == (3,)
        assert trained.read_examples(run, path).x.shape == (80, 3)  # by name: nothing to be left out
        frame = pd.read_csv(path)
    for first in (["a", "b"] * 40, [0, *range(79)], VALUES[:, 0]):  # of other kinds
        FRAME.set_axis(first).to_csv(path)
        with pytest.raises(ValueError, match="column 1 of 5 has no name: name it, or leave it out"):
            load_data(path)
    path.write_text("a,b,\n" + "1,2,3\n" * 80)
    with pytest.raises(ValueError, match="column 3 of 3 has no name"):
        load_data(path)


@pytest.mark.parametrize(
    "kind", [pd.DataFrame, as_polars, as_arrow, as_hub, lambda f: Dataset({k: f[k] for k in f})]
)
def test_row_numbers_in_memory_are_no_data_either(kind, tmp_path):
    "As in the .csv that the table was read from, and in a .parquet that it is written to."
    FRAME.to_csv(tmp_path / "people.csv")
    frame = pd.read_csv(tmp_path / "people.csv")
    assert list(frame)[0] == "Unnamed: 0"
    with pytest.warns(UserWarning, match="numbers the rows, so it is left out") as told:
        data = load_data(kind(frame))
    assert len(told) == 1 and data.columns == NAMES and data.x_shape == (3,)
    named = kind(frame.rename(columns={"Unnamed: 0": "number"}))
    assert load_data(named).x_shape == (4,)  # whoever names them means them
    measured = kind(frame.assign(**{"Unnamed: 0": VALUES[:, 0]}))
    assert load_data(measured).columns == ("Unnamed: 0", *NAMES)  # no numbers of rows
    assert as_named_arrays(kind(frame), ("Unnamed: 0", "age"))[0]["x"].shape == (80, 2)  # a run of before


def test_row_numbers_in_a_parquet_of_a_read_table_are_no_data(tmp_path):
    pytest.importorskip("pyarrow")
    FRAME.to_csv(tmp_path / "people.csv")
    pd.read_csv(tmp_path / "people.csv").to_parquet(tmp_path / "people.parquet")
    with pytest.warns(UserWarning, match="numbers the rows, so it is left out") as told:
        data = load_data(tmp_path / "people.parquet")
    assert len(told) == 1 and data.columns == NAMES


def test_answers_in_a_table_have_no_row_numbers():
    answers = pd.DataFrame({"Unnamed: 0": range(80), "a": [0, 1] * 40, "b": [1, 0] * 40})
    with pytest.warns(UserWarning, match="numbers the rows"):
        assert as_named_arrays(dict(x=VALUES, y=answers))[0]["y"].shape == (80, 2)


@pytest.mark.parametrize("kind", [pd.DataFrame, as_polars])
def test_an_estimator_leaves_row_numbers_out(kind):
    frame = FRAME.drop(columns="y").reset_index(names="Unnamed: 0")
    est = CSRAEEmbedding(epochs=1, components=3)
    with pytest.warns(UserWarning, match="X: the first column has no name and numbers the rows"):
        est.fit(kind(frame))
    assert est.n_features_in_ == 3 and tuple(est.feature_names_in_) == NAMES
    again = frame.iloc[[3, 3, 5]]  # no numbers of rows, but not what was trained on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes = est.transform(kind(again))
    assert np.allclose(codes, est.transform(kind(again[list(NAMES)])))
    assert (
        CSRAEEmbedding(epochs=1, components=3).fit(frame.rename(columns={"Unnamed: 0": "n"})).n_features_in_
        == 4
    )


def test_row_numbers_in_a_parquet_are_no_data(tmp_path):
    pytest.importorskip("pyarrow")
    FRAME.sample(frac=1, random_state=0).to_parquet(tmp_path / "people.parquet")
    assert load_data(tmp_path / "people.parquet").columns == NAMES


def with_labels(y, path):
    "The data in a file of a table with such a column y."
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
    FRAME.assign(y=y).to_csv(path, index=False) if path.suffix == ".csv" else FRAME.assign(y=y).to_parquet(
        path
    )
    return load_data(path)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_measurement_is_no_label(tmp_path, name):
    with pytest.raises(ValueError, match="column y holds .*; expected labels, which are classes"):
        with_labels(VALUES[:, 0], tmp_path / name)
    with pytest.warns(UserWarning, match="column y holds 60 different numbers in 80 rows, and each is a"):
        with_labels([*range(25, 85)] + [25.0] * 20, tmp_path / name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_classes_are_labels(tmp_path, name):
    assert len(with_labels([0, 1, 2, None] * 20, tmp_path / name).classes) == 3  # pandas writes 0.0, 1.0, 2.0
    assert len(with_labels(["%.1f mg" % v for v in VALUES[:, 1]], tmp_path / name).classes) > 20


def test_tables_of_splits_are_brought_into_one_order():
    arrays, columns = as_named_arrays(dict(x_train=FRAME, x_test=FRAME[::-1][["age", "height", "weight"]]))
    assert columns == NAMES and np.array_equal(arrays["x_test"], VALUES[::-1])
    assert list(arrays["y_train"][:2]) == ["a", "b"] and "y_test" not in arrays
    with pytest.raises(ValueError, match="x_test has no column weight"):
        as_named_arrays(dict(x_train=FRAME, x_test=FRAME[["age", "height"]]))
    given, _ = as_named_arrays(dict(x=FRAME, y=np.arange(80)))
    assert given["y"].tolist() == [*range(80)] and given["x"].shape == (80, 3)


def test_numbers_are_no_names(run):
    arrays, columns = as_named_arrays(pd.DataFrame(VALUES))
    assert columns == () and np.array_equal(arrays["x"], VALUES)
    with pytest.raises(ValueError, match="has no column height"):
        trained.read_examples(run, pd.DataFrame(VALUES))
    with pytest.raises(ValueError, match="more than one column age"):
        as_named_arrays(pd.DataFrame(VALUES, columns=["age", "age", "weight"]))


def test_kinds_of_numbers():
    def read(**columns):
        return as_named_arrays(pd.DataFrame(columns))[0]["x"]

    assert read(a=[1, 2, 3], b=[10, 20, 30]).dtype == float
    assert read(a=np.array([1, 255], "u1"), b=np.array([0, 7], "u1")).dtype == np.uint8
    assert read(a=[True, False], b=[0.5, 2.0]).tolist() == [[1, 0.5], [0, 2.0]]
    assert read(a=pd.array([1, 2], "Int64")).tolist() == [[1], [2]]
    for odd in (pd.to_datetime(["2020-01-01"]), ["1"], [{}]):
        with pytest.raises(ValueError, match="columns a hold no numbers"):
            read(a=odd)
    with pytest.raises(ValueError, match="column 'a' holds inf"):
        read(a=[np.inf])
    with pytest.raises(ValueError, match="no rows of numbers"):
        as_named_arrays(FRAME[:0])


def splits(kind):
    if kind == "stand-in":
        return dict(train=as_stand_in(FRAME), validation=as_stand_in(FRAME[:9]))
    datasets = pytest.importorskip("datasets")
    return datasets.DatasetDict(train=as_hub(FRAME), validation=as_hub(FRAME[:9]))


@pytest.mark.parametrize("kind", ["stand-in", "datasets"])
def test_splits_of_hugging_face_stay(kind):
    data = load_data(splits(kind))
    assert data.columns == NAMES and len(data.x_val) == 9 and len(data.x_train) == 72
    assert torch.equal(data.x_val, torch.from_numpy(VALUES[:9]).float())


@pytest.mark.parametrize("kind", ["stand-in", "datasets"])
def test_pictures_of_hugging_face_have_labels(kind):
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    columns = dict(image=list(x), label=[*range(10)] * 2)
    if kind == "datasets":
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        data = datasets.Dataset.from_dict(columns, features)
    else:
        data = Dataset(columns)
    arrays, _ = as_named_arrays(data)
    assert np.array_equal(arrays["x"], x) and arrays["x"].dtype == np.uint8
    assert list(arrays["y"]) == columns["label"]
    with pytest.raises(ValueError, match="columns a, b hold arrays; expected one"):
        as_named_arrays(Dataset(dict(a=x, b=x)))


def test_items_of_torch_are_examples_and_labels(run):
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(VALUES), torch.arange(80) % 2)
    assert len(trained.read_examples(run, pairs)) == 80 and load_data(pairs).classes == ("0", "1")


# --- .parquet


@pytest.fixture
def parquet(tmp_path):
    pytest.importorskip("pyarrow")
    file = tmp_path / "people.parquet"
    FRAME.assign(who="someone").to_parquet(file, row_group_size=7)
    return file


def test_a_parquet_is_a_data_set(parquet, tmp_path):
    FRAME.to_parquet(file := tmp_path / "numbers.parquet", row_group_size=7)
    data = fit(Config(**BRIEF | dict(dataset=str(file))), progress=False, folder=tmp_path / "run")
    assert data.columns == NAMES and "numbers.parquet" in data.sha256
    assert torch.equal(load_data(file).x_train, load_data(FRAME).x_train)
    assert torch.equal(trained.read_examples(data, parquet).x, torch.from_numpy(VALUES).float())


@pytest.mark.parametrize(
    "frame, says",
    [
        (FRAME.assign(age=np.where(FRAME.index == 40, np.nan, 1.0)), "row 41, column 'age' holds nothing"),
        (FRAME[["age"]], "has no column height"),
        (FRAME[:0], "no rows of numbers"),
        (FRAME.assign(age="old"), "columns age hold no numbers"),
    ],
)
def test_a_parquet_that_cannot_be(frame, says, tmp_path):
    pytest.importorskip("pyarrow")
    frame.to_parquet(file := tmp_path / "odd.parquet", row_group_size=7)
    with pytest.raises(ValueError, match=says):
        formats.read_parquet(file, NAMES)


def test_a_damaged_parquet(parquet):
    for raw in (parquet.read_bytes()[:-50], b"garbage", b""):
        parquet.write_bytes(raw)
        with pytest.raises(ValueError, match="people.parquet is damaged or no .parquet"):
            formats.read_parquet(parquet)


def test_codes_as_a_parquet_are_those_of_the_csv_to_the_bit(run, parquet, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    examples = trained.read_examples(run, parquet)
    (block,) = trained.encode_examples(run, examples, progress=False)
    out = trained.write_encoded(run, examples, tmp_path / "codes.parquet", progress=False)
    table = pq.read_table(out)
    assert table.column_names == list(block) and table["name"].to_pylist() == [*examples.names]
    for k in ("z1", "divergence", "unusual"):
        assert str(table.schema.field(k).type) == "float" and table[k].to_pylist() == block[k]
    assert table["component"].to_pylist() == block["component"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["codes.parquet", "people.parquet"]


def test_odd_names_survive_both_formats(run, tmp_path):
    pytest.importorskip("pyarrow")
    names = ('with, "quotes"', "NA", "", "two\nlines", "007")
    examples = trained.Examples(torch.from_numpy(VALUES[:5]).float(), names)
    for kind in ("csv", "parquet"):
        out = trained.write_encoded(run, examples, tmp_path / f"codes.{kind}", progress=False)
        read = (
            pd.read_parquet(out) if kind == "parquet" else pd.read_csv(out, dtype=str, keep_default_na=False)
        )
        assert tuple(read.name) == names
        rows = trained.write_scored(run, examples, tmp_path / f"odd.{kind}", 5, progress=False)
        assert {r["name"] for r in rows} == {*names}


def test_a_parquet_that_is_killed_goes_on(run, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    many = tmp_path / "many.parquet"
    pd.DataFrame(np.tile(VALUES, (500, 1)), columns=NAMES).to_parquet(many)
    words = ["encode", str(run.path), str(many), "--out", str(tmp_path / "codes.parquet")]
    program = [sys.executable, "-c", "import sys; from csrae_nb.verbs import main; sys.exit(main())", *words]
    env = {k: v for k, v in os.environ.items() if k != "CSRAE_TYPECHECK"}
    p = subprocess.Popen(program, env=env, stderr=subprocess.DEVNULL)
    name = ".codes.parquet.table.*.part"
    while not (found := [f for f in tmp_path.glob(name) if f.read_bytes().count(b"\n") > 1001]):  # a block
        assert p.poll() is None
        time.sleep(0.002)
    p.send_signal(signal.SIGKILL)
    p.wait()
    (part,) = found
    assert not (tmp_path / "codes.parquet").exists()
    lines = part.read_text().splitlines(keepends=True)
    first = dict(zip(lines[0].split(","), lines[1].split(",")))
    marked = lines[1].replace(first["z1"], "77", 1)  # what is kept is not made again
    part.write_text("".join([lines[0], marked, *lines[2:]]))
    subprocess.run(program, env=env, stderr=subprocess.DEVNULL, check=True)
    table = pq.read_table(tmp_path / "codes.parquet")
    assert table["name"].to_pylist() == [*map(str, range(40_000))] and not part.exists()
    assert table["z1"][0].as_py() == 77 and table["z1"][80].as_py() == np.float32(first["z1"])


def test_without_pyarrow_the_extra_is_named_before_anything_is_done(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    FRAME.to_csv(tmp_path / "x.csv", index=False)
    for data, out in (("x.parquet", "codes.csv"), ("x.csv", "codes.parquet")):
        with pytest.raises(SystemExit):
            main(["encode", str(run.path), str(tmp_path / data), "--out", str(tmp_path / out)])
        assert "pip install 'csrae_nb[tables]'" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.csv", "x.parquet"]


# --- the most unusual


@pytest.mark.parametrize("ll_samples", [0, 3])
def test_scores_are_the_table_of_codes_sorted(run, tmp_path, ll_samples):
    examples = trained.read_examples(run, FRAME)
    blocks = list(trained.encode_examples(run, examples, ll_samples, progress=False))
    order = np.argsort(-np.concatenate([b["unusual"] for b in blocks]), kind="stable")
    first = trained.write_scored(run, examples, tmp_path / "odd.csv", 7, ll_samples, progress=False)
    rows = list(csv.DictReader((tmp_path / "odd.csv").open()))
    assert [r["name"] for r in rows] == [str(i) for i in order]
    top = trained.most_unusual(run, examples, 7, ll_samples, progress=False)
    for told in (first, rows[:7]):
        assert [r["name"] for r in told] == [r["name"] for r in top]
        assert [float(r["unusual"]) for r in told] == pytest.approx([r["unusual"] for r in top], rel=1e-6)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="top=0"):
        trained.most_unusual(run, examples, 0)


def test_a_score_does_not_go_on_from_a_table_of_codes(run, tmp_path):
    "Both are begun beside the same file."
    examples = trained.read_examples(run, FRAME)
    part = trained._part(run, examples, tmp_path / "t.csv")
    trained.write_encoded(run, examples, tmp_path / "whole.csv", progress=False)
    part.write_text("".join((tmp_path / "whole.csv").read_text().splitlines(keepends=True)[:9]))
    trained.write_scored(run, examples, tmp_path / "t.csv", progress=False)
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 81
    assert (tmp_path / "t.csv").read_text().startswith("unusual,name,component")


def test_most_unusual_keeps_few_rows(run, monkeypatch):
    "Ten times the rows take no more memory."

    def blocks(run, examples, *args):
        for i in range(0, len(examples), 100):
            values = np.random.default_rng(i).random(100).tolist()
            yield dict(name=[f"{i}-{j}" for j in range(100)], z1=values, unusual=values)

    monkeypatch.setattr(trained, "encode_examples", blocks)
    peaks = []
    for n in (2_000, 20_000):
        examples = trained.Examples(torch.zeros(n, 1), ("",) * n)
        tracemalloc.start()
        rows = trained.most_unusual(run, examples, 5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(rows) == 5 and rows[0]["unusual"] >= rows[4]["unusual"] > 0.99
    assert peaks[1] < 1.5 * peaks[0]


# --- a run as an estimator


def test_an_estimator_of_a_run_says_what_csrae_encode_writes(run, tmp_path):
    FRAME.to_csv(tmp_path / "people.csv", index=False)
    words = ["encode", str(run.path), str(tmp_path / "people.csv"), "--out", str(tmp_path / "codes.csv")]
    assert main(words) == 0
    table = pd.read_csv(tmp_path / "codes.csv")
    est = CSRAEEmbedding.from_run(run.path).set_output(transform="pandas")
    z = est.transform(FRAME[[*NAMES]])
    assert np.allclose(z, table[["z1", "z2"]], atol=1e-4) and (z.index == FRAME.index).all()
    assert (est.predict(FRAME[[*NAMES]]) == table.component).all()
    assert np.allclose(est.predict_proba(FRAME[[*NAMES]]).max(1), table.responsibility, atol=1e-4)
    assert list(est.feature_names_in_) == [*NAMES]
    back = est.inverse_transform(z.to_numpy())
    with torch.no_grad():
        assert np.allclose(back, run.model.reconstruct(torch.from_numpy(VALUES).float()), rtol=1e-4)
    assert np.isfinite(est.score(FRAME[[*NAMES]])) and est.sample(5)[0].shape == (5, 3)
    assert est.transform(FRAME[["age", "weight", "height"]]).equals(z)  # as csrae encode takes them
    with pytest.raises(ValueError, match="feature names"):
        est.transform(FRAME[["age", "weight"]])


def test_set_output_of_polars():
    pl = pytest.importorskip("polars")
    frame = as_polars(FRAME[[*NAMES]])
    est = CSRAEEmbedding(epochs=2, components=3, random_state=0).set_output(transform="polars").fit(frame)
    z = est.transform(frame)
    assert isinstance(z, pl.DataFrame) and z.columns == list(est.get_feature_names_out())
    assert list(est.feature_names_in_) == [*NAMES]
    pandas = CSRAEEmbedding(epochs=2, components=3, random_state=0).fit(FRAME[[*NAMES]])
    assert np.array_equal(z.to_numpy(), pandas.transform(FRAME[[*NAMES]]))
    with pytest.raises(ValueError, match="feature names"):
        est.transform(frame[["age", "weight", "height"]])
    with pytest.raises(ValueError, match="X's columns age hold no numbers"):
        clone(est).fit(frame.with_columns(age=pl.lit("old")))


PICTURES = {
    "bernoulli": dict(likelihood="bernoulli"),
    "discretized_logistic": dict(likelihood="discretized_logistic"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_rows(kind, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (60, 6, 6), dtype=np.uint8)
    x = x // 128 if kind == "bernoulli" else x
    run = fit(Config(**BRIEF | PICTURES[kind]), x, progress=False, folder=tmp_path / "run")
    est = CSRAEEmbedding.from_run(run)
    with torch.no_grad():
        codes = run.model.encode(trained.as_trained(run, x)).mean
    for rows in (x, x.reshape(60, 36), torch.from_numpy(x)):
        assert np.allclose(est.transform(rows), codes, atol=1e-4)
    assert np.allclose(est.transform(x[7:8]), codes[7:8], atol=1e-4)
    assert est.inverse_transform(codes.double().numpy()).shape == (60, 36)
    assert est.score_samples(x[:3], 8).shape == (3,) and est.sample(2)[0].shape == (2, 36)
    with pytest.raises(ValueError, match="64 features, but CSRAEEmbedding is expecting 36"):
        est.transform(np.zeros((3, 64)))
    with pytest.raises(ValueError, match="dim"):
        est.transform(np.zeros((3, 8, 8)))


@pytest.mark.parametrize("model", ["VAE", "VampPriorVAE", "WAE", "RAE"])
def test_runs_of_other_models(model, tmp_path):
    run = fit(Config(**BRIEF | dict(model=model)), VALUES, progress=False, folder=tmp_path / "run")
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    est = CSRAEEmbedding.from_run(run)
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())  # the run's own is left
    assert np.isfinite(est.transform(VALUES)).all() and np.isfinite(est.score(VALUES))
    if model in ("WAE", "RAE"):
        with pytest.raises(ValueError, match="points for codes"):
            est.score_samples(VALUES)
    else:
        assert np.isfinite(est.score_samples(VALUES, 16)).all()


def test_runs_that_are_no_estimators(tmp_path):
    data = dict(x=VALUES, y=[0, 1] * 40)
    for model in ("MixtureCSRAE", "Supervised"):
        run = fit(
            Config(**BRIEF | dict(model=model, labels=20)), data, progress=False, folder=tmp_path / model
        )
        with pytest.raises(ValueError, match="with labels|classifier alone"):
            CSRAEEmbedding.from_run(run.path)
        with pytest.raises(ValueError, match="with labels"):
            CSRAEEmbedding.from_run(run)
    with pytest.raises(ValueError, match="holds no finished run"):
        CSRAEEmbedding.from_run(tmp_path)


def test_a_clone_of_a_run_trains_as_the_run_did(tmp_path):
    own = dict(learned_weights=True, prior_objective="aggregate", lam=0.5, kmeans_epoch=1, seed=3)
    x = VALUES - VALUES.mean(0)
    x = (x / x.std(0)).astype("f4")
    run = fit(
        Config(**BRIEF | own), dict(x_train=x, x_val=x, x_test=x), progress=False, folder=tmp_path / "run"
    )
    est = CSRAEEmbedding.from_run(run)
    again = clone(est)
    with pytest.raises(NotFittedError):
        again.transform(x)
    again.set_params(validation_fraction=0).fit(x)
    assert np.allclose(again.transform(x), est.transform(x), atol=1e-4)
    est.fit(x)
    est.partial_fit(x)  # its own training has an optimiser


# --- a density


def test_log_likelihoods_are_those_of_the_model(run):
    est = CSRAEEmbedding.from_run(run)
    g = torch.Generator().manual_seed(0)
    known = run.model.log_likelihood(torch.from_numpy(VALUES).float(), 5000, g)
    assert np.allclose(est.score_samples(VALUES, 4096), known, atol=0.2)
    assert abs(est.score_samples(VALUES, 4096).mean() - known.mean().item()) < 0.02


def test_a_density_has_the_units_of_the_data():
    kw = dict(epochs=2, components=3, random_state=0)
    a, b = CSRAEEmbedding(**kw).fit(VALUES), CSRAEEmbedding(**kw).fit(1000 * VALUES)
    moved = b.score_samples(1000 * VALUES, 64) + 3 * np.log(1000)
    assert np.allclose(a.score_samples(VALUES, 64), moved, atol=1e-3)


def test_a_density_integrates_to_one():
    x = np.random.default_rng(0).normal(size=(200, 1)) * 3 + 5
    est = CSRAEEmbedding(latent_dim=1, epochs=5, components=3, random_state=0).fit(x)
    grid = np.linspace(-40, 50, 2001)
    density = np.exp(est.score_samples(grid[:, None], 256))
    assert trapezoid(density, grid) == pytest.approx(1, abs=0.02)


def test_a_row_has_its_density_in_any_company(run):
    est = CSRAEEmbedding.from_run(run)
    state, together = torch.get_rng_state(), est.score_samples(VALUES, 32)
    assert torch.equal(state, torch.get_rng_state())
    alone = np.concatenate([est.score_samples(VALUES[i : i + 1], 32) for i in range(20)])
    assert np.allclose(together[:20], alone, rtol=1e-10)
    assert est.score_samples(VALUES.astype("f4"), 32).dtype == np.float32
    for S in (0, 1.5, "many"):
        with pytest.raises(ValueError, match="ll_samples="):
            est.score_samples(VALUES, S)


# --- what values mean is of the training, not of the rows beside them

BYTES = np.random.default_rng(5).integers(0, 256, (60, 6, 6), dtype=np.uint8)
LIKELIHOODS = "bernoulli", "gaussian", "discretized_logistic"


def nearly_black(shape=(6, 6)):
    "Bytes of which the first row has no level above 1, and the others have."
    x = np.random.default_rng(6).integers(0, 256, (5, *shape), dtype=np.uint8)
    x[0] %= 2
    return x


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("given", ["bytes", "floats", "zeros and ones"])
def test_bytes_are_what_they_were_in_training(given, likelihood, tmp_path):
    "Of a run and of an estimator that takes it over: each row as training had it, in any company."
    x = {"bytes": BYTES, "floats": (BYTES / 255 - 0.5 * (likelihood == "discretized_logistic")).astype("f4")}
    x["zeros and ones"] = BYTES % 2
    data = from_arrays(dict(x=x[given]), likelihood)
    run = fit(Config(**BRIEF, likelihood=likelihood), data, progress=False, folder=tmp_path / "run")
    new, shift = nearly_black(), 0.5 * (likelihood == "discretized_logistic")
    assert run.values == load_run(run.path).values == given and CSRAEEmbedding.from_run(run).values_ == given
    divisor = np.where((given == "zeros and ones") & (np.arange(5) == 0), 1, 255)[:, None, None]
    expected = torch.from_numpy(new / divisor - shift).float()
    est, as_trained = CSRAEEmbedding.from_run(run), partial(trained.as_trained, run)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "x has no level above 1|X has no level above 1")
        codes = run.model.encode(expected).mean
        assert np.allclose(est.transform(new), codes, atol=1e-4)
        assert np.allclose(est.transform(new[:1]), codes[:1], atol=1e-4)
        together, alone = as_trained(new), as_trained(new[:1])
    if likelihood != "bernoulli":
        assert torch.allclose(together, expected) and torch.equal(alone, together[:1])
    else:  # grey levels are drawn, once, so what is nearly black is nearly black
        assert (alone.mean() > 0.2) == (together[0].mean() > 0.2) == (given == "zeros and ones")
    bits = torch.from_numpy(new[:1] > 0).float() - shift  # booleans are zeros and ones for every run
    assert torch.equal(as_trained(new[:1] > 0), bits) and torch.equal(as_trained((new[:1] > 0) * 1), bits)


def test_bytes_that_are_ambiguous_are_told(tmp_path):
    run = fit(Config(**BRIEF), BYTES, progress=False, folder=tmp_path / "run")
    with pytest.warns(UserWarning, match="x has no level above 1"):
        trained.as_trained(run, nearly_black()[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained.as_trained(run, nearly_black())
        trained.as_trained(run, nearly_black()[:1] * 0)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_an_estimator_reads_bytes_as_its_fit_did(likelihood):
    est = CSRAEEmbedding(likelihood=likelihood, epochs=2, components=3, random_state=0)
    new = nearly_black((36,))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "X has no level above 1")
        for own in (clone(est).fit(BYTES.reshape(60, 36)), clone(est).partial_fit(BYTES.reshape(60, 36))):
            assert own.values_ == "bytes"
            assert np.allclose(own.transform(new[:1]), own.transform(new)[:1], atol=1e-10)
    bits = clone(est).fit(BYTES.reshape(60, 36) % 2)
    assert np.allclose(bits.transform(new[:1]), bits.transform(new[:1].astype(float)))


def test_runs_that_do_not_say_what_their_values_were_read_bytes_as_before(tmp_path):
    run = fit(Config(**BRIEF), BYTES, progress=False, folder=tmp_path / "run")
    run = dataclasses.replace(run, values=None)
    assert trained.as_trained(run, nearly_black()[:1]).max() == 0.5  # white
    assert CSRAEEmbedding.from_run(run).transform(nearly_black()).shape == (5, run.cfg.latent_dim)


def test_images_that_are_read_as_they_are_needed_are_bytes():
    data = from_arrays(dict(x=BYTES))
    lazy = dataclasses.replace(data, values=None, x_train=LazyImages(lambda r: data.x_train[r], 48, (6, 6)))
    task = task_of(resolve(Config(**BRIEF)))
    assert task.about(lazy)["values"] == "bytes"
    assert "values" not in task.about(dataclasses.replace(data, values=None))


@pytest.mark.parametrize("first", ["csv", "parquet"])
def test_a_table_of_counts_means_the_same_in_any_file(first, tmp_path):
    "A .parquet has bytes where a .csv has floats: with a gaussian, no range tells them apart."
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame(BYTES.reshape(60, 36)[:, :3], columns=list("abc"))
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    fields = BRIEF | dict(dataset=str(tmp_path / f"t.{first}"), likelihood="gaussian")
    run = fit(Config(**fields), progress=False, folder=tmp_path / "run")
    x = torch.from_numpy(frame.to_numpy() / (255 if first == "parquet" else 1)).float()
    for source in (tmp_path / "t.csv", tmp_path / "t.parquet", frame, frame.astype(float), frame.astype(int)):
        assert torch.allclose(trained.read_examples(run, source).x, x)
    est = CSRAEEmbedding.from_run(run)
    with torch.no_grad():
        codes = run.model.encode(x).mean
    for table in (frame, frame.astype(float), frame.astype(int)):
        assert np.allclose(est.transform(table), codes, atol=1e-3)
    if first == "parquet":
        for read in (partial(trained.read_examples, run), est.transform):
            with pytest.raises(ValueError, match="expected whole numbers from 0 to 255"):
                read(frame + 0.5)


def test_pictures_of_a_table_name_its_columns(run, tmp_path, monkeypatch):
    "Reconstructions, samples, components, the sheets of csrae; by number where there is no room or no name."
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    from csrae_nb.pictures import label_columns, plot_components, plot_reconstructions, plot_samples

    def named(ax):
        return [t.get_text() for t in ax.get_xticklabels()] == [*NAMES]

    data = load_data(FRAME)
    for plot, at in (plot_reconstructions, (0, 1)), (plot_samples, (2, 3)), (plot_components, (0,)):
        axs = plot(run, data).axes
        assert all(named(axs[i]) for i in at) and axs[0].get_ylabel() == "value"
    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda fig, *a, **kw: shown.append(fig))
    FRAME[[*NAMES]].to_csv(tmp_path / "new.csv", index=False)
    for words in (["sample", str(run.path)], ["reconstruct", str(run.path), str(tmp_path / "new.csv")]):
        assert main([*words, "--out", str(tmp_path / f"{words[0]}.png")]) == 0
    trained.report(run)
    assert len(shown) >= 4 and all(named(fig.axes[0]) for fig in shown[:2])
    assert sum(named(ax) for fig in shown[2:] for ax in fig.axes) == 2
    plt.close("all")
    ax = Figure().subplots()
    for n, names, says in (
        (2, ("a$b$", "x" * 50), ("a\\$b\\$", "x" * 19 + "…")),
        (2, (), ("$x_1$", "$x_2$")),
        (31, ["a"] * 31, ("column, from 0", "value")),
        (5, (), ("column, from 0", "value")),
    ):
        label_columns(ax, n, names)
        assert (ax.get_xlabel(), ax.get_ylabel()) == says


def test_a_first_row_of_numbers_is_no_header_without_a_word(tmp_path):
    rows, named = np.random.default_rng(0).random((30, 3)), pd.DataFrame(np.zeros((30, 3)))
    np.savetxt(tmp_path / "bare.csv", rows, delimiter=",")
    with pytest.warns(UserWarning, match="the first row is taken for names"):
        load_data(str(tmp_path / "bare.csv"))
    named.to_csv(tmp_path / "named.csv", index=False)  # under 0, 1 and 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(str(tmp_path / "named.csv"))


@pytest.mark.parametrize("of", [lambda f: f, as_polars, as_arrow])
def test_a_table_goes_to_a_model_by_the_names_of_its_columns(run, of):
    known = trained.as_trained(run, VALUES)
    assert torch.equal(trained.as_trained(run, of(FRAME[[*reversed(FRAME.columns)]])), known)
    with pytest.raises(ValueError, match="has no column age; expected height, weight, age"):
        trained.as_trained(run, of(FRAME.drop(columns="age").assign(size=1.0)))


def test_whole_numbers_are_numbers_in_rows_as_in_a_table():
    counts = np.random.default_rng(0).integers(0, 50, (40, 3))
    rows, table = load_data(counts), load_data(pd.DataFrame(counts, columns=NAMES))
    assert rows.likelihood == table.likelihood == "gaussian" and torch.equal(rows.x_train, table.x_train)
    with pytest.raises(ValueError, match="dtype int64, expected uint8"):
        load_data(counts.reshape(-1, 3, 1))


@pytest.mark.parametrize("of", [lambda f: f, as_polars])
def test_columns_of_no_numbers_are_named_by_the_estimator(of):
    frame = FRAME.rename(columns=dict(y="city")).assign(day=pd.date_range("2020", periods=80).to_pydatetime())
    with pytest.raises(ValueError, match="X's columns city, day hold no numbers"):
        CSRAEEmbedding(epochs=1).fit(of(frame))
