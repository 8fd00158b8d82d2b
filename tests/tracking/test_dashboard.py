"""The TensorBoard content of a run: every documented tag, the pages, and continuous curves after kills."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import config_of, make_trainer, random_dataset
from launched import CHECKOUT, Run, processes, send, wait_until
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from ddp_cifar.config import Config
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.data.normalization import VALUES, Normalization
from ddp_cifar.distributed.world import World
from ddp_cifar.run.run_dir import Start
from ddp_cifar.tracking import dashboard, figures, summaries
from ddp_cifar.tracking.base import NullTracker, Picture
from ddp_cifar.tracking.dashboard import Dashboard

ALL = (
    "tracking.pictures_every=1",
    "tracking.histograms_every=4",
    "tracking.graph=true",
    "tracking.projector=true",
    "train.verify_every=4",
)

CIFAR = Normalization(**VALUES["cifar10"])


KINDS = ("scalars", "images", "tensors", "histograms")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run on 2 ranks, with everything that TensorBoard can show."""
    run = Run(tmp_path_factory.mktemp("dashboard") / "run")
    run.finish(*ALL)
    return run


@contextmanager
def tensorboard(logdir: Path, *options: str) -> Iterator[str]:
    """Serve `logdir`, the folder of one finished run; yield the address after TensorBoard has read all of it."""
    server = subprocess.Popen(
        [
            str(Path(sys.executable).parent / "tensorboard"),
            f"--logdir={logdir}",
            "--port=0",
            "--host=127.0.0.1",
            *options,
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr
        output = ""
        while not (found := re.search(r"TensorBoard \S+ at (http://\S+)", output)):
            line = server.stderr.readline()
            assert line, output
            output += line
        address = found[1].rstrip("/")
        assert wait_until(lambda: is_read(address), 60)
        yield address
    finally:
        server.kill()
        server.wait()


def ask(address: str, data: dict[str, Any] | None = None, **query: str) -> Any:
    """Return the server's JSON answer."""
    url = f"{address}?{urllib.parse.urlencode(query)}" if query else address
    body = json.dumps(data).encode() if data is not None else None
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def history_of(address: str) -> str:
    """Return the last history table."""
    text: str = ask(f"{address}/data/plugin/text/text", run="tensorboard", tag="history/text_summary")[-1]["text"]
    return text


def is_read(address: str) -> bool:
    """True if TensorBoard has read the last event of the run."""
    try:
        return "finished" in history_of(address)
    except (urllib.error.HTTPError, IndexError):
        return False


def tags_of(run: Run) -> dict[str, list[str]]:
    """Return the tags by kind, with the names of docs/dashboard.md."""
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    found = {kind: list(events.Tags()[kind]) for kind in KINDS}
    found["tensors"] = [
        tag.removesuffix("/text_summary") for tag in found["tensors"] if not tag.startswith("custom_sc")
    ]
    assert events.Graph().node
    return found


def documented() -> list[str]:
    """Return the tags in the first column of the tables of docs/dashboard.md. A word in capitals stands for any name."""
    text = (CHECKOUT / "docs" / "dashboard.md").read_text()
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [tag for cell in cells for tag in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.slow
def test_exactly_the_documented_tags_exist_and_only_rank_0_writes_them(finished: Run) -> None:
    found = [tag for tags in tags_of(finished).values() for tag in tags]
    patterns = {tag: re.compile(re.sub(r"[A-Z]{3,}", ".+", re.escape(tag))) for tag in documented()}
    assert len(patterns) >= 40
    missing = [tag for tag, pattern in patterns.items() if not any(pattern.fullmatch(each) for each in found)]
    assert not missing
    undocumented = [tag for tag in found if not any(pattern.fullmatch(tag) for pattern in patterns.values())]
    assert not undocumented
    (events,) = (finished.path / "tensorboard").rglob("events.out.*")
    pid = json.loads((finished.path / "heartbeats" / "rank_0").read_text())["pid"]
    assert events.name.split(".")[-2] == str(pid)


@pytest.mark.slow
def test_the_page_of_custom_scalars_has_only_existing_tags(finished: Run) -> None:
    scalars = tags_of(finished)["scalars"]
    charts = [tag for page in summaries.LAYOUT.values() for tags in page.values() for tag in tags]
    assert set(charts) <= set(scalars)
    assert len(charts) == len(set(charts))


@pytest.mark.slow
def test_tensorboard_serves_all_content(finished: Run) -> None:
    with tensorboard(finished.path) as address:
        plugins = f"{address}/data/plugin"
        layout = ask(f"{plugins}/custom_scalars/layout")
        assert [category["title"] for category in layout["category"]] == list(summaries.LAYOUT)
        (tags,) = ask(f"{plugins}/scalars/tags").values()
        assert set(tags) == set(tags_of(finished)["scalars"])
        points = ask(f"{plugins}/scalars/scalars", run="tensorboard", tag="test/accuracy")
        rows = [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]
        expected = [(row["step"], row["test/accuracy"]) for row in rows if "test/accuracy" in row]
        assert [(step, pytest.approx(value)) for _, step, value in points] == expected
        (images,) = ask(f"{plugins}/images/tags").values()
        assert {"train/images", "test/confusion", "test/wrong"} <= set(images)
        (texts,) = ask(f"{plugins}/text/tags").values()
        assert {"config/text_summary", "environment/text_summary", "history/text_summary"} <= set(texts)
        (curves,) = ask(f"{plugins}/pr_curves/tags").values()
        assert len(curves) == 10
        experiment = ask(f"{plugins}/hparams/experiment", {"experimentName": ""})
        assert {info["name"] for info in experiment["hparamInfos"]} >= {*summaries.COLUMNS, "train.ema_decay"}
        assert ask(f"{address}/data/environment")["data_location"] == str(finished.path)
        (projected,) = ask(f"{plugins}/projector/runs")
        config = ask(f"{plugins}/projector/info", run=projected)
        assert [each["tensorShape"][0] for each in config["embeddings"]] == [60]


@pytest.mark.slow
def test_a_browser_draws_the_charts(finished: Run, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    picture = tmp_path / "page.png"
    with tensorboard(finished.path) as address:
        options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
        page = ("--window-size=1400,1400", "--virtual-time-budget=20000", f"--screenshot={picture}")
        done = subprocess.run(
            [browser, *options, *page, f"{address}/#custom_scalars"], capture_output=True, text=True, timeout=120
        )
    assert picture.exists(), done.stderr
    charts = np.asarray(Image.open(picture).convert("RGB")).astype(int)[120:, 400:]
    # the run's color is an orange; everything else is white, gray or blue
    lines = (charts[..., 0] > charts[..., 2] + 80).sum()
    assert lines > 1000, f"{lines} colored pixels"


@pytest.mark.slow
def test_after_three_kills_each_curve_has_each_step_once(run: Run) -> None:
    for _ in range(3):
        run.start(*ALL)
        send([pid for pids in processes(run.path).values() for pid in pids], signal.SIGKILL)
        assert run.launcher
        run.launcher.wait(30)
    run.finish(*ALL)
    for options in ((), ("--load_fast=false",)):
        with tensorboard(run.path, *options) as address:
            plugins = f"{address}/data/plugin"
            ((name, tags),) = ask(f"{plugins}/scalars/tags").items()
            steps = {tag: [step for _, step, _ in ask(f"{plugins}/scalars/scalars", run=name, tag=tag)] for tag in tags}
            assert all(found == sorted(set(found)) for found in steps.values()), steps
            assert steps["train/loss"] == list(range(4, 40, 4))
            assert ask(f"{plugins}/scalars/tags").keys() == {"tensorboard"}
            assert history_of(address).count("crashed") == 3
    folders = [path for path in (run.path / "tensorboard").rglob("*") if path.is_dir() and path.name != "features"]
    assert [path.name for path in folders] == ["00039"], "the folder of the projector"


@pytest.fixture
def board(tmp_path: Path) -> Iterator[SummaryWriter]:
    with SummaryWriter(str(tmp_path)) as writer:
        yield writer


def shown(board: SummaryWriter) -> EventAccumulator:
    board.flush()
    return EventAccumulator(board.log_dir).Reload()


def test_misclassified_images_with_the_highest_confidence_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split.of(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]))
    logits = torch.tensor([[5.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 9.0]])  # the second and the third are wrong
    drawn: list[Any] = []
    grid = summaries.captioned_grid
    monkeypatch.setattr(summaries, "captioned_grid", lambda *given: drawn.append(given) or grid(*given))
    assert summaries.draw_wrong_images(split, logits, ("cat", "dog")) is not None
    ((images, captions),) = drawn
    assert captions == [("dog, not", "cat (95 %)"), ("cat, not", "dog (73 %)")]
    assert images.shape == (2, 3, 8, 8)


def test_without_misclassified_images_there_is_no_picture() -> None:
    split = Split.of(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    assert summaries.draw_wrong_images(split, torch.eye(2), ("a", "b")) is None


def test_a_class_name_can_be_any_folder_name(board: SummaryWriter) -> None:
    names = ("caf\udce9", "$\\frac$", "two\nlines", "a|b/c", " ", "$a_b$")
    split = Split.of(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6))
    logits = torch.eye(6).flip(0)
    assert summaries.draw_confusion(split, logits, names).shape[2] == 3
    assert summaries.draw_wrong_images(split, logits, names) is not None
    summaries.add_curves(board, "test", split, logits, names, 1)
    summaries.add_projector(board, split, CIFAR, torch.nn.Conv2d(3, 2, 8), names, 6, 1)
    tags = shown(board).Tags()
    assert {tag.removeprefix("test/pr/") for tag in tags["tensors"]} == set(figures.plain(names))


def test_gradients_that_are_not_finite_have_no_histogram(board: SummaryWriter) -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 2), torch.nan), torch.tensor([1.0, torch.inf])
    summaries.add_histograms(board, model, 3)
    assert set(shown(board).Tags()["histograms"]) == {"weights/weight", "weights/bias", "gradients/bias"}


def test_a_grid_has_a_cell_per_image_and_captions_that_fit() -> None:
    images = torch.full((9, 3, 32, 32), 100, dtype=torch.uint8)
    captions = [("a name that is far too long for its cell", "short")] * 9
    grid = figures.captioned_grid(images, captions)
    assert grid.dtype == np.uint8
    assert grid.shape == (2 * (figures.CELL + 40), 8 * (figures.CELL + 8), 3)
    assert (grid[4, 4] == 100).all()
    assert (grid[-2, -2] == 255).all(), "the second row has one image"


def test_the_history_has_the_outcome_of_each_start(board: SummaryWriter) -> None:
    starts = [
        Start(0.0, 0, 4),
        Start(60.0, 10, 2, restarts=1, steps_lost=3, found="running"),
        Start(90.0, 20, 2, restarts=2, steps_lost=3, found="stopped: SIGTERM"),
    ]
    summaries.add_history(board, starts, "finished", 30)
    (event,) = shown(board).Tensors("history/text_summary")
    rows = event.tensor_proto.string_val[0].decode().splitlines()[2:]
    ends = [[cell.strip() for cell in row.split("|")][-4] for row in rows]
    assert ends == ["crashed", "stopped: SIGTERM", "finished"]


def test_the_hparams_row_has_all_settings_and_its_list_fits_every_run(board: SummaryWriter) -> None:
    from tensorboard.plugins.hparams import api_pb2, metadata

    changed = ("optim.momentum=0.5", "run_dir=elsewhere", "model.args.width=3", "train.deterministic=true")
    config = config_of(*changed, "tracking.hparams=[train.clip_norm]")
    summaries.add_hparams(board, config, "test")
    events = shown(board)
    start = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    found = metadata.parse_session_start_info_plugin_data(start).hparams
    assert found["optim.momentum"].number_value == 0.5
    assert found["train.deterministic"].string_value == "true"
    assert found["model.args"].string_value == "{'width': 3}"
    assert "run_dir" not in found
    assert "train.clip_norm" not in found, "the value is null"
    experiment = events.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    listed = metadata.parse_experiment_plugin_data(experiment).hparam_infos
    settings = {info.name: info.type for info in listed}
    assert set(found) < set(settings)
    assert settings["train.clip_norm"] == settings["seed"] == api_pb2.DATA_TYPE_FLOAT64
    assert settings["train.deterministic"] == settings["precision"] == api_pb2.DATA_TYPE_STRING
    assert {info.name for info in listed if info.differs} == {*summaries.COLUMNS, "train.clip_norm"}
    assert not [path for path in Path(board.log_dir).iterdir() if path.is_dir()]


@pytest.mark.parametrize("head", [True, False])
def test_the_projector_has_a_point_per_image(board: SummaryWriter, head: bool) -> None:
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    split = Split.of(images, torch.tensor([0, 1, 0, 1, 1]))
    layers: list[torch.nn.Module] = [torch.nn.Flatten(), torch.nn.Linear(192, 7), torch.nn.Linear(7, 2)]
    model = torch.nn.Sequential(*layers) if head else torch.nn.Conv2d(3, 2, 8)
    summaries.add_projector(board, split, CIFAR, model, ("a", "b"), 2, 3)
    (points,) = Path(board.log_dir).rglob("tensors.tsv")
    assert np.loadtxt(points).shape == ((5, 7) if head else (5, 2))


class Writer(NullTracker):
    """A tracker that draws into one SummaryWriter."""

    def __init__(self, board: SummaryWriter) -> None:
        self.board = board

    def show(self, add: Callable[[SummaryWriter], None]) -> None:
        add(self.board)

    def show_image(self, tag: str, draw: Callable[[], Picture | None], step: int) -> None:
        if (pixels := draw()) is not None:
            self.board.add_image(tag, pixels, step, dataformats="HWC")


@pytest.mark.parametrize(("test", "val", "split_name"), [(8, 0, "test"), (8, 4, "test"), (0, 4, "val")])
def test_the_dashboard_shows_the_evaluation_of_one_split(
    board: SummaryWriter, test: int, val: int, split_name: str
) -> None:
    dataset = random_dataset(24, test=test or 8, val=val, image_size=8)
    dataset = dataset if test else dataclasses.replace(dataset, test=None)
    shows = Dashboard(Writer(board), config_of("tracking.pictures_every=3", "tracking.projector=true"), dataset)
    due = [shows.split_to_show(epoch, is_last=False) for epoch in range(1, 8)]
    assert due == ["", "", split_name, "", "", split_name, ""]
    assert shows.split_to_show(7, is_last=True) == split_name
    shows.show_evaluation(torch.randn(test or val, 10), 5)
    shows.show_projector(torch.nn.Conv2d(3, 10, 8), CIFAR, 5)
    assert set(shown(board).Tags()["images"]) == {f"{split_name}/confusion", f"{split_name}/wrong"}
    assert len(list(Path(board.log_dir).rglob("tensors.tsv"))) == 1


def test_a_dashboard_without_evaluated_images_or_pictures_needs_no_logits(
    board: SummaryWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = random_dataset(24, image_size=8)
    config = config_of("tracking.projector=true")

    def needs(config: Config, dataset: DataSet) -> str:
        return Dashboard(Writer(board), config, dataset).split_to_show(10, is_last=True)

    assert needs(config, dataset)
    assert not needs(config_of("tracking.pictures_every=null"), dataset)
    assert not needs(config, dataclasses.replace(dataset, test=None))
    monkeypatch.setattr(dashboard, "MAX_LOGITS", 79)
    assert not needs(config, dataset), "8 images of 10 classes"
    Dashboard(Writer(board), config, dataclasses.replace(dataset, test=None)).show_projector(
        torch.nn.Linear(1, 1), CIFAR, 1
    )
    assert not list(Path(board.log_dir).rglob("tensors.tsv"))


@pytest.mark.parametrize(
    ("step", "arguments", "images", "has_graph"),
    [
        (0, (), ["train/images"], False),
        (0, ("tracking.graph=true", "tracking.pictures_every=null"), [], True),
        (7, ("tracking.graph=true",), [], False),
    ],
)
def test_each_start_shows_texts_and_the_first_start_also_shows_pictures(
    step: int, arguments: tuple[str, ...], images: list[str], has_graph: bool, alone: World, board: SummaryWriter
) -> None:
    config = config_of("model.name=tiny", "train.global_batch_size=8", "train.micro_batch_size=4", *arguments)
    dataset = random_dataset(24)
    trainer = make_trainer(alone, config, dataset)
    starts = [Start(0.0, step, 1)]
    shows = Dashboard(Writer(board), config, dataset)
    shows.show_start(step, [("here", "cpu")], starts, trainer.train_loader, trainer.model)
    shows.show_history(starts, "stopped: SIGTERM", step + 1)
    events = shown(board)
    assert events.Tags()["images"] == images
    assert events.Tags()["graph"] is has_graph
    assert {f"{name}/text_summary" for name in ("config", "environment", "history")} <= set(events.Tags()["tensors"])
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("history/text_summary")]
    assert ["running" in text for text in texts] == [True, False]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_histograms_are_shown_when_due(board: SummaryWriter) -> None:
    dataset, model = random_dataset(24), torch.nn.Linear(2, 2)
    for config in (config_of(), config_of("tracking.histograms_every=4")):
        for step in range(1, 8):  # the reader keeps only the last one
            Dashboard(Writer(board), config, dataset).show_histograms(model, step)
    assert [event.step for event in shown(board).Histograms("weights/bias")] == [4]


def test_ranks_other_than_0_draw_nothing() -> None:
    shows = Dashboard(NullTracker(), config_of("tracking.histograms_every=1"), random_dataset(24))
    assert shows.split_to_show(10, is_last=False) == "test", "all ranks compute the logits"
    shows.show_evaluation(torch.zeros(8, 10), 1)
    shows.show_histograms(torch.nn.Linear(2, 2), 1)


def test_a_part_that_cannot_be_drawn_is_logged_as_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    from ddp_cifar.log import log
    from ddp_cifar.tracking import build_tracker

    monkeypatch.setattr(log, "propagate", True)
    tracker = build_tracker(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", step=0)
    tracker.show(lambda board: board.add_graph(torch.nn.Linear(2, 2), torch.zeros(1, 3)))
    tracker.show_image("test/wrong", lambda: np.zeros(1)[3:4].reshape(2, 2), 0)
    tracker.close()
    assert "cannot draw test/wrong (ValueError" in caplog.text
    assert any(
        "cannot write a part of the TensorBoard page (RuntimeError" in record.getMessage() for record in caplog.records
    )


def test_pictures_can_be_turned_off(train: Callable[..., Any], tmp_path: Path) -> None:
    from test_mistakes import TINY

    done = train(*TINY, f"run_dir={tmp_path}", "tracking.pictures_every=null", "train.max_steps=1")
    assert done.status == 0, done.err
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == []
    assert not [tag for tag in events.Tags()["tensors"] if "/pr/" in tag]
    rejected = train(*TINY, f"run_dir={tmp_path}", "tracking.histograms_every=0")
    assert rejected.status == 2
    assert "tracking.histograms_every=0 is out of range: expected 1 or more, or null" in rejected.err
