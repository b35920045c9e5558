"The panels without a browser, and one visit to them with Chromium, in JupyterLab and in Voila."

import dataclasses, json, os, shutil, signal, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
import numpy as np
import pytest
from sklearn.datasets import load_digits
from csrae_nb.explorers import (
    LADDERS,
    TABS,
    _data_key,
    pinwheel_configs,
    pinwheel_explorer,
    run_explorer,
    run_folders,
    two_gaussians_explorer,
)
from csrae_nb.files import load_tensors, save_tensors
from csrae_nb.grids import distinct, read_sweep
from csrae_nb.config import Config, run_name
from csrae_nb.runs import fit, load_run, prepare_data

root = Path(__file__).parents[1]
DIGITS = Config(epochs=5, warmup=1, name="digits-small")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A runs folder with a small run on digits, the newest, and the seven of the pinwheel, two epochs each."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CSRAE_RUNS", str(folder := tmp_path_factory.mktemp("made")))
        data = prepare_data(pinwheel_configs()[0])
        for cfg in pinwheel_configs():
            fit(
                dataclasses.replace(cfg, epochs=2, warmup=1, kmeans_epoch=1),
                data,
                progress=False,
                folder=folder / run_name(cfg),
            )
        fit(DIGITS, progress=False)
    return folder


@pytest.fixture
def runs(made, tmp_path, monkeypatch):
    "A copy of it that a test may damage."
    monkeypatch.setenv("CSRAE_RUNS", str(folder := tmp_path / "runs"))
    return shutil.copytree(made, folder)


@pytest.mark.parametrize("by", LADDERS)
def test_the_sweep_makes_the_panels_runs(by):
    command, config = LADDERS[by][2].split()
    assert distinct(read_sweep(root / config)) == pinwheel_configs(by) and command == "csrae-sweep"


def test_a_slider_of_bounds(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    configs = [
        dataclasses.replace(c, epochs=2, warmup=1, kmeans_epoch=1) for c in pinwheel_configs("constraint")[:2]
    ]
    parts = pinwheel_explorer(configs=configs).parts
    assert "pinwheel_epsilon.toml" in parts["note"].value and parts["step"].description == "ε"
    parts["train"].click()
    parts["training"].join()
    assert [v for _, v in parts["step"].options] == [0.5, 1.0] and not parts["message"].value
    first = parts["picture"].value
    parts["step"].value = 0.5 if parts["step"].value == 1.0 else 1.0
    assert parts["picture"].value != first


def test_stored_outputs_need_no_kernel():
    "The notebooks hold pictures in place of widgets, which no page could show."
    for path in root / "nbs" / "explore.ipynb", root / "nbs" / "22_explorers.ipynb":
        nb = json.loads(path.read_text())
        assert "widgets" not in nb["metadata"] and "widget-view" not in json.dumps(nb), (
            f"run {path.name} by the command that 22_explorers.ipynb gives"
        )


# --- bad input


def damage(path):
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))


def unlike_its_config(path):
    tensors, meta = load_tensors(path)
    save_tensors(path, tensors, meta | dict(config=meta["config"] | dict(model="MixtureCSRAX")))


def arrays(path):
    shutil.copy(
        fit(Config(dataset="arrays", epochs=1, name="mine"), dict(x=images()), progress=False).path
        / path.name,
        path,
    )


def images():
    return load_digits().images.astype("float32") / 16


@pytest.mark.parametrize(
    "harm, says",
    [
        (damage, "checksum is wrong"),
        (lambda p: p.write_bytes(b""), "damaged"),
        (lambda p: p.unlink(), "holds no finished run"),
        (unlike_its_config, "unknown model"),
        (lambda p: shutil.rmtree(p.parent), "holds no finished run"),
        (arrays, "trained on arrays"),
    ],
    ids=["damaged", "empty", "unfinished", "of another version", "missing", "of arrays"],
)
def test_a_run_that_cannot_be_shown_is_a_message(runs, harm, says):
    parts = run_explorer(DIGITS.name).parts
    harm(runs / DIGITS.name / "model.safetensors")
    parts["choice"].value = None
    parts["choice"].value = runs / DIGITS.name
    assert says in parts["message"].value and parts["tabs"].layout.display == "none"
    assert says in run_explorer(DIGITS.name).parts["message"].value


def test_data_that_are_not_at_hand_are_a_message(runs, tmp_path):
    np.savez(file := tmp_path / "mine.npz", x=images())
    fit(Config(dataset=str(file), epochs=1, name="mine"), progress=False)
    assert run_explorer("mine").parts["message"].value == ""
    np.savez(file, x=images()[::-1])
    assert "other data" in run_explorer("mine").parts["message"].value
    file.unlink()
    assert "mine.npz" in run_explorer("mine").parts["message"].value


def test_names_of_data_are_escaped(runs, tmp_path):
    "A file's name is text, whatever stands in it, in what is said of a run and of what goes wrong."
    np.savez(file := tmp_path / "<img src=x onerror=alert(1)>.npz", x=images())
    fit(Config(dataset=str(file), epochs=1, name="mine"), progress=False)
    about = run_explorer("mine").parts["about"].value
    assert "<img" not in about and "&lt;img src=x onerror=alert(1)&gt;" in about
    file.unlink()
    message = run_explorer("mine").parts["message"].value
    assert "<img" not in message and "&lt;img" in message


def test_no_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "nowhere"))
    assert run_folders() == []
    assert run_explorer().parts["message"].value == ""
    for by, (_, _, command) in LADDERS.items():
        assert command in pinwheel_explorer(by).parts["note"].value


def test_a_damaged_checkpoint_of_the_pinwheel_is_left_out(runs):
    damage(runs / run_name(pinwheel_configs()[3]) / "model.safetensors")
    parts = pinwheel_explorer().parts
    assert "λ = 1 is left out" in parts["note"].value
    assert len(parts["step"].options) == 6
    assert parts["picture"].value


def test_runs_with_labels_and_without_pictures(runs):
    "A model trained with labels is shown with the label that it predicts; points and rows are drawn, too."
    np.savez(rows := runs / "rows.npz", x=np.random.default_rng(0).random((300, 7), "float32"))
    shown = (
        fit(Config(labels=100.0, pretrain=0, epochs=1), progress=False),
        fit(Config(dataset=str(rows), epochs=1, components=3), progress=False),
        load_run(runs / run_name(pinwheel_configs()[0])),
    )
    for run in shown:
        parts = run_explorer(run.path).parts
        for i in range(len(TABS)):
            parts["tabs"].selected_index = i
            assert parts["message"].value == ""
        for slider, picture in ("rank", "one"), ("example", "pair"), ("b", "strip"):
            before = parts[picture].value
            parts[slider].value += 1
            assert parts[picture].value != before and not parts["message"].value
        assert ("predicts" in parts["about"].value) == bool(run.cfg.labels)


def test_panels_share_nothing(runs):
    "An old panel that is still on the page does no harm to a new one, nor the other way round."
    old, new = (two_gaussians_explorer().parts for _ in range(2))
    before = new["numbers"].value
    old["q"][0].value = 5.0
    assert new["numbers"].value == before
    old = run_explorer(DIGITS.name).parts
    damage(runs / DIGITS.name / "model.safetensors")
    new = run_explorer(DIGITS.name).parts
    old["rank"].value = 3
    assert new["message"].value and not old["message"].value


def test_a_kernel_that_is_restarted_while_it_trains(tmp_path, monkeypatch):
    "What the panel was training goes on in the next kernel's panel."
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path))
    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=120)

    def run(code):
        reply = client.execute_interactive(
            code, timeout=120, output_hook=lambda m: said.append(m["content"].get("text", ""))
        )
        assert reply["content"]["status"] == "ok", reply["content"]

    begin = """
from csrae_nb.explorers import pinwheel_explorer
from csrae_nb.config import Config, resolve
cfgs = [resolve(Config(dataset='pinwheel', epochs=n, lam=lam)) for lam, n in ((.5, 1), (2., 8))]
parts = pinwheel_explorer(configs=cfgs).parts
parts['train'].click()
"""
    end_of = """
parts['training'].join()
print(parts['message'].value, len(parts['step'].options), len(parts['picture'].value) > 1000)
"""
    try:
        said = []
        run(begin)
        end = time.monotonic() + 60
        while not list(tmp_path.glob("*/history.csv")) or not list(tmp_path.glob("*/checkpoint.safetensors")):
            assert time.monotonic() < end
            time.sleep(0.05)
        manager.restart_kernel(now=True)
        client.wait_for_ready(60)
        run(begin + end_of)
        assert "".join(said).strip() == "2 True"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# --- a browser


@contextmanager
def serving(command, folder, runs):
    "A server on a free port of this machine, with nobody's settings; the address it answers at."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(
        os.environ,
        CSRAE_RUNS=str(runs),
        PYTHONPATH=str(root),
        **{f"JUPYTER_{k}_DIR": str(folder / ".jupyter" / k) for k in ("CONFIG", "RUNTIME", "DATA")},
        **{f"JUPYTERLAB_{k}_DIR": str(folder / ".jupyter" / k) for k in ("SETTINGS", "WORKSPACES")},
    )
    log = open(folder / "server.log", "w")
    server = subprocess.Popen(
        [sys.executable, "-m", *command.format(port=port).split()],
        cwd=folder,
        env=env,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        end, address = time.monotonic() + 60, f"http://127.0.0.1:{port}"
        while True:
            try:
                urllib.request.urlopen(
                    f"{address}/{'api/status' if 'lab' in command else 'voila/static/main.js'}", timeout=5
                )
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, (folder / "server.log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
        log.close()


@pytest.fixture
def page():
    "A page of a real browser."
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no browser test: Playwright is not installed (pip install playwright)"
    )
    if not (
        chromium := shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    ):
        pytest.skip("no browser test: no Chromium is installed (apt install chromium)")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
        )
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.set_default_timeout(30_000)
        yield page
        browser.close()


def becomes_other(page, read, before):
    "Wait until what is read is something else."
    end = time.monotonic() + 20
    while read() == before:
        assert time.monotonic() < end, f"still {before}"
        page.wait_for_timeout(50)


def drag(page, slider, by):
    "Drag a slider's handle with the mouse."
    handle = slider.locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    at = handle.bounding_box()
    x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by, y, steps=6)
    page.mouse.up()


def click(page, canvas, number):
    "Click on points until the example's number is another: the first that is hit may be the one shown."
    said, end = number.inner_text(), time.monotonic() + 20
    while number.inner_text() == said:
        for x, y in (150, 150), (350, 250), (250, 350):
            assert time.monotonic() < end, f"still {said}"
            canvas.click(position=dict(x=x, y=y))
            page.wait_for_timeout(300)


def visit(page, shot):
    "Drag, and see numbers and pictures change; choose a run, and click a point."
    gauss, wheel, run = (page.locator(".csrae-panel").nth(i) for i in (0, 1, 3))
    for panel, number in (gauss, gauss.locator(".csrae-numbers")), (wheel, wheel.locator(".widget-readout")):
        number.wait_for()
        said, picture = number.inner_text(), panel.locator("img").get_attribute("src")
        drag(page, panel.locator(".widget-hslider").first, 40)
        becomes_other(page, number.inner_text, said)
        becomes_other(page, lambda: panel.locator("img").get_attribute("src"), picture)
        panel.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        panel.screenshot(path=shot(("gaussians", "pinwheel")[panel is wheel]))
    for tab in TABS:
        if tab == "components":
            run.locator("select").select_option(label="choose a run")
            run.get_by_role("tab", name=tab).wait_for(state="hidden")
            run.locator("select").select_option(label=DIGITS.name)
        run.get_by_role("tab", name=tab).click()
        shown = run.locator(".widget-tab-contents")
        shown.locator("img:visible, canvas:visible").first.wait_for()
        if tab == "codes":
            canvas = shown.locator("canvas:visible").last
            canvas.wait_for()
            page.wait_for_timeout(500)
            pair, number = (
                shown.locator(".widget-image:visible").last,
                shown.locator(".widget-readout:visible"),
            )
            picture = pair.get_attribute("src")
            click(page, canvas, number)
            becomes_other(page, lambda: pair.get_attribute("src"), picture)
        page.wait_for_timeout(500)
        run.screenshot(path=shot(tab.replace(" ", "_")))
    assert page.locator(".csrae-message").count() == page.get_by_text("Traceback").count() == 0


@pytest.fixture
def house(tmp_path):
    "A folder with the page, and where to keep screenshots."
    shutil.copy(root / "nbs" / "explore.ipynb", tmp_path)
    shots = Path(os.environ.get("CSRAE_ARTEFACTS") or tmp_path / "shots")
    shots.mkdir(parents=True, exist_ok=True)
    return tmp_path, shots


def test_in_jupyterlab(page, house, runs):
    "Opened, run, dragged, restarted in the middle, and dragged again."
    folder, shots = house
    lab = "jupyterlab --no-browser --ip=127.0.0.1 --port={port} --allow-root --IdentityProvider.token="
    quiet = "--LabApp.news_url= --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"
    with serving(f"{lab} {quiet}", folder, runs) as address:
        page.goto(f"{address}/lab/tree/explore.ipynb")
        page.get_by_text("| Idle").wait_for()
        page.get_by_text("Run", exact=True).first.click()
        page.get_by_text("Run All Cells", exact=True).click()
        visit(page, lambda name: shots / f"jupyterlab_{name}.png")
        page.screenshot(path=shots / "jupyterlab.png")
        old = page.locator(".csrae-numbers").element_handle()
        page.get_by_text("Kernel", exact=True).first.click()
        page.get_by_text("Restart Kernel and Run All Cells…", exact=True).click()
        page.locator(".jp-Dialog button.jp-mod-accept").click()
        old.wait_for_element_state("hidden")
        number = page.locator(".csrae-numbers")
        number.wait_for()
        said = number.inner_text()
        drag(page, page.locator(".csrae-panel .widget-hslider").first, 40)
        becomes_other(page, number.inner_text, said)


def test_in_voila(page, house, runs):
    folder, shots = house
    with serving(
        "voila explore.ipynb --no-browser --Voila.ip=127.0.0.1 --port={port}", folder, runs
    ) as address:
        page.goto(address)
        visit(page, lambda name: shots / f"voila_{name}.png")
        page.screenshot(path=shots / "voila.png", full_page=True)


def test_runs_of_other_data_are_told_apart_by_all_fields_of_a_data_set():
    faces = Config(dataset="disfa", labels=0.5)
    for other in (dict(mirror=False), dict(answers="intensity"), dict(fold=1), dict(split_seed=1)):
        assert _data_key(dataclasses.replace(faces, **other)) != _data_key(faces), other
