"""`report.html` of a real run, in a real Chromium: curves, settings, data, row; no request, no error, no sideways scrolling."""

from __future__ import annotations

import json
import shutil
from html import unescape
from pathlib import Path

import pytest

from swiftlite import cli
from swiftlite.data.encoding import Group, Report
from swiftlite.train.charts import Line, chart, number, ticks
from swiftlite.train.report import _data

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_model) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rows = [{"query": f"who are you? {i} <b>&</b>", "response": f"I am Xiao Huang, number {i}. 我是小黄。"} for i in range(40)]
    rows += [{"query": "long", "response": "x " * 500}, {"query": "broken"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    flags = [
        "--model", str(make_model("qwen3")), "--dataset", str(folder / "rows.jsonl"), "--output_dir", str(folder / "out"),
        "--learning_rate", "5e-3", "--num_train_epochs", "6", "--logging_steps", "1", "--eval_steps", "4", "--max_length", "256",
        "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--split_dataset_ratio", "0.1", "--report_to", "none",
    ]  # fmt: skip
    assert cli.main(["sft", *flags]) == 0
    return next(folder.glob("out/*/v*"))


def test_it_holds_the_run(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8").replace("<wbr>", "")
    log = [json.loads(line) for line in (run / "logging.jsonl").read_text(encoding="utf-8").splitlines()]
    blocks = [json.loads(part.partition("</script>")[0]) for part in page.split('<script type="application/json">')[1:]]
    lines = dict(blocks[0]["lines"])
    assert lines["as logged"] == [[r["global_step"], float(f"{r['loss']:.6g}")] for r in log if "loss" in r]
    assert lines["evaluation"] == [[r["global_step"], float(f"{r['eval_loss']:.6g}")] for r in log if "eval_loss" in r]
    assert len(lines["smoothed"]) == len(lines["as logged"]) > 10
    assert len(blocks) == 6  # loss, accuracy, learning rate, gradient norm, tokens a second, memory
    text = unescape(page)
    assert "<tr><th>learning_rate</th><td><code>0.005</code></td><td>command line</td></tr>" in page
    assert "<th>torch_dtype</th><td><code>float32</code></td><td>decided</td>" in page
    assert "<th>lora_rank</th><td><code>8</code></td><td>default</td>" in page
    assert "longer than --max_length 256; first: rows.jsonl:41" in text and 'class="dropped"' in page
    assert "<mark>I am Xiao Huang" in page and "&lt;b&gt;&amp;&lt;/b&gt;" in page and "<b>&</b>" not in page
    final = log[-1]
    assert final["last_model_checkpoint"] in text and f"swift infer --ckpt_dir {final['best_model_checkpoint']}" in text
    assert "http://" not in page and "https://" not in page
    assert not list(run.glob(".report*"))


def test_a_fate_of_two_words_keeps_its_count() -> None:
    table = Report(kept=1200, parts={"longer than --max_length 60": Group(1100, ["a.jsonl:1"])}).table()
    assert "<th>in part</th><td class=num>1,100</td><td>kept without some of their samples: longer than" in _data(table)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_in_a_browser(run: Path, width: int, scheme: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        wrong: list[str] = []
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url))
        page.goto((run / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        sizes = page.evaluate(
            "[...document.querySelectorAll('.ys span, .xs span, td, code')].map(e => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 13
        curve = page.locator("figure path.smooth").first.bounding_box()
        area = page.locator(".area").first.bounding_box()
        assert curve["width"] > 0.9 * area["width"] and curve["height"] > 0.3 * area["height"]
        page.locator(".area").first.hover()
        assert "as logged" in page.locator(".readout").first.inner_text()
        page.screenshot(path=tmp_path / "report.png", full_page=True)
        browser.close()
    assert wrong == []


def test_ticks_and_numbers() -> None:
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    for low, high in [(0.3, 0.31), (-5, 1234), (1e-9, 3e-6), (2, 2), (0, 0)]:
        marks = ticks(low, high)
        assert 2 <= len(marks) <= 8 and marks[0] <= low + 1e-12 and marks[-1] >= high - 1e-12
    assert [number(v) for v in (0, 1234.5, 0.123456, 1e-4, 5e-5, 12345678)] == ["0", "1,234", "0.1235", "1e-4", "5e-5", "1.23e7"]
    assert chart("none", [Line("a", [])]) == ""
    assert chart("nan", [Line("a", [(1, float("nan"))])]) == ""
    assert chart("one", [Line("a", [(1, 2.0)])]).count("h0") == 1
