"""`mae-fast report`: a page that is well formed, asks no network, and whose script works: in node,
on a few lines that stand for a table, and in a browser where there is one."""

import base64
import copy
import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mae_fast import cli
from mae_fast.bench import records
from mae_fast.page import SCRIPT, Page, said

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Checked(html.parser.HTMLParser):
    """Raises where tags do not nest; collects ids, references, and the text of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.asked, self.tables, self.svgs = [], [], [], 0, 0
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.tables += tag == "table"
        self.svgs += tag == "svg"
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:")):
                self.asked.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())


def ratio_record(masked: float, model: str = "vit_base", seconds: float = 1.0) -> dict:
    names = ("mae_fast", "official_eager")
    cell = {"rounds": [0, 1], "clips": 2, "peak_memory_mb": 1000.0, "flop": 2e9}
    cell |= {"parts": {"encoder": 1 - masked, "decoder": 0.5, "optimizer": 0.1}, "data": None}
    return {
        "kind": "ratio",
        "what": "training step by masking ratio, synthetic clips, interleaved",
        "model": model,
        "strategy": "random",
        "ratio": masked,
        "precision": "fp32",
        "device": "cpu",
        "asked_clips": 2,
        "batch_clips": 2,
        "baseline": "official_eager",
        "seconds": {n: [seconds * (2.5 - masked), 2.0 * (i + 1)] for i, n in enumerate(names)},
        "engines": {name: copy.deepcopy(cell) for name in names},
        "rounds": [0, 1],
        "limits": {"engine_product": {"flop": 1e9, "seconds": [0.1, 0.1]}},
        "flop_limit": 1 / (1.1 - masked),
        "forward_gflop": 1.0,
        "environment": dict.fromkeys(records.ENVIRONMENT, "<x> & y"),
    }


def profile_record() -> dict:
    part = {"phase": "decoder", "op": "attention", "direction": "forward", "seconds": 0.5}
    part |= {"share": 0.5, "flop": 1e9, "bytes": 1e6, "limit_seconds": 0.2}
    left = {"phase": "unaccounted", "op": "", "direction": "", "seconds": 0.5, "share": 0.5}
    held = {"seconds": [0.0, 1.0], "holders": {"weights": [1.0, 2.0]}, "peak_mb": 2.0}
    engine = {"parts": [part, left], "memory": held, "state_mb": 1.0}
    return {
        "kind": "profile",
        "what": "one training step by phase and op",
        "model": "vit_base",
        "batch_clips": 2,
        "ratio": 0.9,
        "precision": "fp32",
        "device": "cpu",
        "product_rate": 1e11,
        "copy_rate": 1e10,
        "engines": {"mae_fast": engine},
        "seconds": {"mae_fast": [1.0, 1.1]},
        "environment": dict.fromkeys(records.ENVIRONMENT, "x"),
    }


@pytest.fixture
def folder(tmp_path):
    for masked in (0.0, 0.5, 0.9):
        records.append(tmp_path / "in/ratio.jsonl", ratio_record(masked))
    (tmp_path / "in/profile.json").write_text(json.dumps(profile_record(), indent=1))
    (tmp_path / "in/samples.jsonl").write_text("not records\n")
    return tmp_path


def page(folder: Path, *argv: str) -> str:
    out = folder / "report.html"
    assert cli.main(["report", *argv, "-o", str(out)]) == 0
    return out.read_text()


def test_the_page_is_whole_and_asks_nobody(folder):
    text = page(folder, str(folder / "in"), str(RESULTS))
    checked = Checked(text)
    assert checked.asked == []
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttp", text)
    assert len(checked.ids) == len(set(checked.ids))
    assert checked.tables >= 8 and checked.svgs >= 6
    for heading in (
        "Speed-up against masking ratio",
        "What is lost",
        "Engines",
        "Ops against the machine&#x27;s limits",
        "Profile: vit_base, 90% masked, 2 clips, fp32",
        "Memory",
        "Environment",
        "How to repeat it",
    ):
        assert f">{heading}</h2>" in text
    assert "limit: FLOP of the official code" in text
    row = ["mae_fast", "decoder", "attention", "-", "500.0", "-", "50.0%", "1.0", "1", "2", "0.0"]
    row += ["40%", "300.0 ms"]
    assert re.search("<tr>" + "".join(rf"<td[^>]*>{re.escape(c)}</td>" for c in row), text)
    assert "mae-fast bench ratio --model vit_base --batch 2" in text
    assert "&lt;x&gt; &amp; y" in text and "<x>" not in text


def test_ink_follows_the_page(folder):
    text = page(folder, str(folder / "in"))
    assert "color-scheme: light dark" in text
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert pictures and not any("#000000" in p or "#ffffff" in p for p in pictures)
    assert "currentColor" in pictures[0]


def test_the_lead_says_what_was_bought(folder):
    text = page(folder, str(folder / "in"))
    assert "a step is 1.8x as fast as the official code&#x27;s at 0%" in text


def test_each_machine_has_its_newest_records_in_a_picture_of_its_own(folder):
    """Ours at 90% by hand: 2.5 and 4 s over 3.2 and 2 at 0%, 3.2 and 4 over the same at 90%."""
    elsewhere = {"environment": dict.fromkeys(records.ENVIRONMENT, "another")}
    for masked in (0.0, 0.9):
        records.append(folder / "in/ratio.jsonl", ratio_record(masked) | elsewhere)
    records.append(folder / "in/ratio.jsonl", ratio_record(0.9, seconds=2.0))
    records.append(folder / "in/ratio.jsonl", ratio_record(0.0, "quick"))
    text = html.unescape(page(folder, str(folder / "in")))
    assert text.count("<figcaption>Speed-up: vit_base, random masking, 2 clips, fp32") == 2
    lead = re.findall("<p>vit_base.*? a step is (.*?)x .*? and (.*?)x as fast", text)
    assert lead == [("1.4", "1.50"), ("1.8", "1.50")]
    assert "quick" not in text


def test_the_lead_of_steps_alone_is_how_much_faster(folder):
    record = ratio_record(0.9) | {"kind": "steps"}
    record["seconds"] = {"mae_fast": [1.0, 1.0], "official_eager": [3.0, 3.0]}
    records.append(folder / "steps.jsonl", record)
    text = page(folder, str(folder / "steps.jsonl"))
    assert "<p>vit_base, 90% masked, 2 clips, fp32: 3.00x as fast as official_eager.</p>" in text


def test_two_hundred_records(folder):
    for number in range(200):
        record = ratio_record(number / 250, f"model_{number % 4}", 1 + number / 100)
        records.append(folder / "many.jsonl", record)
    text = page(folder, str(folder / "many.jsonl"))
    assert Checked(text).svgs == 8
    assert len(text) < 3_000_000
    every = text[text.index('<h2 id="every-record">') :]
    assert every[: every.index("<h2 id", 1)].count("<tr>") == 401  # two engines, and the head


def test_families_stand_apart(folder):
    families = [r["family"] for r in records.read(RESULTS / "accelerate.jsonl")]
    text = page(folder, str(RESULTS / "accelerate.jsonl"))
    assert len(set(families)) >= 5
    for family in families:
        assert f"Engines: {family}, vit_base, 90% masked, 2 clips, fp32" in text


def test_the_committed_page_has_every_record():
    text = (ROOT / "docs/report.html").read_text()
    for path in records.files([RESULTS]):
        for record in filter(records.measured, records.read(path)):
            assert str(record["environment"]["commit"]) in text, "run `make tables`, and commit"


def test_png(folder):
    page(folder, str(folder / "in"), "--png", str(folder / "png"))
    files = {p.name for p in (folder / "png").iterdir()}
    assert {"speed-up-0.png", "parts-0.png"} <= files
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in (folder / "png").iterdir())


def test_an_image_is_its_file_and_nothing_asks_for_it():
    page = Page("<a>", ["b & c"])
    page.image(b"\xff\xd8bytes", "jpeg", 'of "x"')
    page.image(b"", "jpeg", "of nothing")
    text = page.html()
    assert Checked(text).asked == [] and text.count("<figure>") == 2 and text.count("<img") == 1
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]*)"', text).groups()
    assert (kind, base64.b64decode(data)) == ("jpeg", b"\xff\xd8bytes")
    assert "<h1>&lt;a&gt;</h1>" in text and "of &quot;x&quot;" in text


def test_a_share_is_said_in_percent():
    assert [said(x) for x in (0.256, float("nan"), 3, "3 x 2")] == ["25.60%", "-", "3", "3 x 2"]


def test_what_else_lies_in_a_folder_is_passed_over(folder):
    """As the README has it, `mae-fast report runs/`, where runs, packs and indices lie too."""
    (folder / "in/run").mkdir()
    (folder / "in/run/metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    (folder / "in/index.jsonl").write_text('{"path": "a.mp4"}\n')
    assert "vit_base" in page(folder, str(folder / "in"))
    for damaged in ('{"kind": "none"}\n', '"steps", "model": "vit_base"}\n'):
        (folder / "in/more.jsonl").write_text(damaged)
        assert cli.main(["report", str(folder / "in"), "-o", str(folder / "r.html")]) == 2


def test_nothing_to_report_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 2
    assert "no records" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "none.jsonl")]) == 2
    assert "No such file" in capsys.readouterr().err


CHECKS = """
const assert = require("assert");
const cell = text => ({ textContent: text });
const rows = ["10%", "9%", "-", "1.5x"].map(t => ({ cells: [cell(t)] }));
const body = { rows: rows.slice(), appendChild(r) { this.rows.splice(this.rows.indexOf(r), 1);
  this.rows.push(r); } };
const header = { a: {}, getAttribute(k) { return this.a[k]; },
  setAttribute(k, v) { this.a[k] = v; },
  removeAttribute(k) {} };
const table = { tBodies: [body], querySelectorAll: () => [header], rows };
const order = () => body.rows.map(r => r.cells[0].textContent).join(" ");
sortTable(table, 0, header);
assert.equal(order(), "1.5x 9% 10% -");
sortTable(table, 0, header);
assert.equal(order(), "- 10% 9% 1.5x");
assert.equal(compareCells("b", "a") > 0, true);
const twice = '"'.repeat(2);
assert.equal(toCsv([['say "x"']]).trim(), '"say ' + twice + "x" + twice + '"');
assert.equal(toCsv([["a", "1,5"]]).trim(), 'a,"1,5"');
assert.deepEqual(tableRows(table)[0], ["10%"]);
"""


@pytest.mark.skipif(not shutil.which("node"), reason="there is no node")
def test_the_script_sorts_and_makes_csv():
    run = subprocess.run(["node", "-e", SCRIPT + CHECKS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# Runs before the page's own script, and after it.
WATCH = "<script>var errors = []; window.onerror = m => { errors.push(m); };</script>"
CLICKS = """
<script>
const heads = Array.from(document.querySelectorAll("thead button"));
heads.forEach(b => { b.click(); b.click(); });
document.querySelectorAll("button.copy").forEach(b => b.click());
document.body.dataset.seen = JSON.stringify({
  errors, heads: heads.length,
  sorted: document.querySelectorAll("th[aria-sort=descending]").length,
  tables: document.querySelectorAll("table").length,
  fits: document.documentElement.scrollWidth <= window.innerWidth,
  drawn: Array.from(document.querySelectorAll("svg")).every(s => s.getBBox().width > 100),
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium or chrome")
@pytest.mark.parametrize("width", [500, 1400])
def test_in_a_browser(folder, width):
    text = page(folder, str(folder / "in"), str(RESULTS))
    text = text.replace("<head>", "<head>" + WATCH).replace("</body>", CLICKS + "</body>")
    (folder / "watched.html").write_text(text)
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/c",
    ]
    command += [f"--window-size={width},1200", "--enable-logging=stderr", "--dump-dom"]
    command.append((folder / "watched.html").as_uri())
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "CONSOLE" not in run.stderr
    found = html.unescape(re.search(r'data-seen="([^"]*)"', run.stdout)[1])
    seen = json.loads(found)
    assert seen["errors"] == []
    assert seen["heads"] > 30 and seen["sorted"] == seen["tables"] >= 8
    assert seen["fits"] and seen["drawn"]
