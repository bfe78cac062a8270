"""The logic of benchmarks/bench.py; nothing is measured."""

import json

import bench
import bench_plots
import bench_report
import environments
import history
import pairs
import pytest
from bench_targets import TARGETS, verdicts

MODEL = pairs.SMALL
MACHINE = {
    "platform": "cpu",
    "cpu": "a <processor>",
    "cores": 2,
    "device": "cpu",
    "commit": "abc",
    "dirty": False,
    "date": "2020-01-01 00:00 UTC",
    "jax": "0.10.2",
    "python": "3.12.0",
}


def row(optimizer, status="ok", **measured):
    if status != "ok":
        return {"model": MODEL, "optimizer": optimizer, "status": status}
    common = {
        "peak bytes": 80 * 2**20,
        "added bytes": 30 * 2**20,
        "recompilations": 0,
        "first call": 4.0,
        "gradient, s": 0.01,
        "ordinary step": 2.0,
        "T3 = 20": 3.4,
        "without statistics": 1.3,
        "update alone": 0.2,
    }
    about = {"model": MODEL, "optimizer": optimizer, "status": status}
    return about | common | measured


ROWS = [
    row("kfac"),
    row("kfac-1/8", **{"T3 = 20": 2.31, "first call": 8.5}),
    row("published", **{"peak bytes": 100 * 2**20, "added bytes": 60 * 2**20}),
    {"model": MODEL, "optimizer": "gradient", "status": "ok", "peak bytes": 80 * 2**20},
    row("shampoo", "failed: AttributeError: no | of <lambda>"),
    row("psgd", "skipped: nowhere to be found"),
    row("kfac-staggered", **{"largest / median": 1.2}),
]
ROWS[-1]["all at once: largest / median"] = 2.5


def words(rows):
    return {verdict.target: verdict.word for verdict in verdicts(rows)}


def test_limits_themselves_are_met():
    full, part, first, peak, added, again, without, staggered = TARGETS
    assert words(ROWS) == {
        full: "met",  # 3.4
        part: "MISSED",
        first: "MISSED",  # the worse of the two
        peak: "met",  # 0.8
        added: "met",
        again: "met",
        without: "met",
        staggered: "met",
    }


def test_what_failed_is_not_measured():
    rows = [row("kfac"), row("kfac-1/8"), row("published", "failed: more than 120 s")]
    (verdict,) = (v for v in verdicts(rows) if v.target == TARGETS[3])
    assert verdict.word == "not measured"
    assert verdict.note == "published failed: more than 120 s"
    assert words([row("kfac", "failed: why"), row("kfac-1/8")])[TARGETS[5]] == (
        "not measured"
    )


def test_tables_show_everything_that_was_run():
    programs = {
        "How costs grow": {"status": "ok", "table": "| its | table |"},
        "Time to a target": {"status": "failed: no data"},
    }
    text = bench_report.tables({"machine": MACHINE, "rows": ROWS, "programs": programs})
    assert "failed: AttributeError: no \\| of &lt;lambda>" in text
    assert "skipped: nowhere to be found" in text
    assert "| its | table |" in text
    assert "failed: no data" in text
    for name in (r["optimizer"] for r in ROWS):
        assert bench_report.NAMES[name] in text
    lines = [line for line in text.splitlines() if line.startswith("| K-FAC |")]
    assert lines
    assert all("| 80.00 | 1.00 |" in line for line in lines)  # peak, in MiB and ratio


def test_rows_of_another_commit_are_named():
    rows = [row("kfac"), row("kfac-1/8") | {"commit": "def"}]
    text = bench_report.tables({"machine": MACHINE, "rows": rows, "programs": {}})
    assert f"Of commit def: {bench_report.NAMES['kfac-1/8']}." in text
    assert "Of commit abc" not in text


def test_every_optimizer_has_a_name():
    for quick in (True, False):
        chosen = list(pairs.all_pairs(quick))
        assert {pair.optimizer for pair in chosen} <= set(bench_report.NAMES)
        assert len({pair[:2] for pair in chosen}) == len(chosen)


def test_history_replaces_a_row_of_the_same_commit_and_device(tmp_path):
    new = history.row_of(MACHINE, ROWS)
    assert new["models"] == {MODEL: {"full": 3.4, "first call": 4.0, "1/8": 2.31}}
    others = [new | {"commit": "older"}, new | {"device": "another"}]
    rows = history.appended([new | {"date": "before"}, *others], new)
    assert rows == [*others, new]
    history.write(rows, tmp_path / "history.json")
    assert history.read(tmp_path / "history.json") == rows
    assert history.read(tmp_path / "none.json") == []


def test_only_what_is_between_the_marks_changes():
    page = f"before\n{history.BEGIN}\nold\n{history.END}\nafter\n"
    once = history.replaced(page, "new\n")
    assert once == f"before\n{history.BEGIN}\n\nnew\n\n{history.END}\nafter\n"
    assert history.replaced(once, "new") == once


@pytest.mark.parametrize(
    "page", ["", history.BEGIN, f"{history.END} {history.BEGIN}", 2 * history.BEGIN]
)
def test_marks_are_expected(page):
    with pytest.raises(ValueError, match="Put both into the page"):
        history.replaced(page, "new")


def test_the_page_has_its_marks():
    assert history.replaced(bench.PAGE.read_text("utf-8"), "new")


@pytest.mark.parametrize(
    ("stderr", "status", "reason"),
    [
        ("a\nValueError: b\n-----\nFor simplicity, JAX has\n", 1, "ValueError: b"),
        ("a\njax.errors.SomeError: b\n", 1, "jax.errors.SomeError: b"),
        ("a\nb\n", 1, "b"),
        ("", 3, "status 3"),
        ("a\n", -9, "ended by signal 9"),
    ],
)
def test_the_reason_is_the_exception(stderr, status, reason):
    assert pairs.reason_of(stderr, status) == reason


def run(tmp_path, monkeypatch, source, limit=20.0):
    """`pairs.measure` of a program in place of cost.py."""
    (tmp_path / "cost.py").write_text(source)
    monkeypatch.setattr(pairs, "HERE", tmp_path)
    return pairs.measure(pairs.Pair(MODEL, "kfac", 1.0, limit), "cpu")


def test_a_measured_pair(tmp_path, monkeypatch):
    printed = json.dumps({"platform": "cpu", "T3 = 20": 2.0})
    found = run(tmp_path, monkeypatch, f"print('so'); print('{printed}')")
    assert (found["status"], found["T3 = 20"]) == ("ok", 2.0)


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("raise ImportError('none')", "failed: ImportError: none"),
        ("import time; time.sleep(60)", "failed: more than 1 s"),
        ('print(\'{"platform": "gpu"}\')', "failed: ran on gpu instead of cpu"),
    ],
)
def test_a_pair_that_fails(tmp_path, monkeypatch, source, status):
    limit = 1.0 if "sleep" in source else 20.0
    found = run(tmp_path, monkeypatch, source, limit)
    assert found["status"] == status
    assert found["model"] == MODEL


def test_an_environment_that_cannot_be_made_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setitem(
        environments.ENVIRONMENTS, "psgd", environments.Environment((), python="1.0")
    )
    pair = pairs.Pair(MODEL, "psgd", 1.0)
    assert pairs.measure(pair, "cpu")["status"].startswith("skipped: there is no")
    environments.make("psgd")
    status = pairs.measure(pair, "cpu")["status"]
    assert status.startswith("skipped: found no Python 1.0 with venv")


def test_figures(tmp_path):
    bench_plots.draw_costs(ROWS, tmp_path / "costs.png")
    rows = [history.row_of(MACHINE | {"commit": c}, ROWS) for c in "ab"]
    bench_plots.draw_history(rows, tmp_path / "history.png")
    assert (tmp_path / "costs.png").stat().st_size > 1000


def test_only_all_of_it_is_kept(capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--keep", "--quick"])
    assert "--keep expects all of it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.parse(["--optimizers", "adamm"])
    assert "expected some of" in capsys.readouterr().err


def test_a_part_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match="got those of a part"):
        bench.keep(tmp_path, {"partial": True}, [])
    assert not list(tmp_path.iterdir())


def test_a_kept_page(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "DOCS", tmp_path)
    monkeypatch.setattr(bench, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(history, "PATH", tmp_path / "history.json")
    bench.PAGE.write_text(f"{history.BEGIN}{history.END}", "utf-8")
    results = {"partial": False, "machine": MACHINE, "rows": ROWS, "programs": {}}
    folder = tmp_path / "results"
    folder.mkdir()
    bench.keep(folder, results, bench.report(folder, results))
    page = bench.PAGE.read_text("utf-8")
    assert "![Costs over commits](performance/history.png)" in page
    assert "scaling.png" not in page  # as it was not run
    assert (tmp_path / "performance" / "costs.png").exists()
    assert history.read(history.PATH) == [history.row_of(MACHINE, ROWS)]
