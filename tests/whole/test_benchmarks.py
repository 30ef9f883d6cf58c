"""The benchmarks' harness on the smallest network: what is right, wrong, missing, refused, too slow
or dead is called that.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "benchmarks"
PEERS = {
    "backpack": "backpack",
    "nngeometry": "nngeometry",
    "asdfghjkl": "asdl",
    "laplace": "laplace",
    "jax": "jax",
}
BROKEN = """
import os, time
import tools

def wrong(model, x, y):
    run = tools.torch_func(model, x, y)
    return lambda: [1.01 * t for t in run()]

def nan(model, x, y):
    run = tools.torch_func(model, x, y)
    return lambda: [t * float("nan") for t in run()]

def missing(model, x, y):
    import no_such_package

def refuses(model, x, y):
    raise NotImplementedError("no rule for | this\\nand more")

def slow(model, x, y):
    run = tools.torch_func(model, x, y)
    calls = []
    def wait():
        calls.append(1)
        time.sleep(60 if len(calls) > 1 else 0)
        return run()
    return wait

def dies(model, x, y):
    return lambda: os.abort()

def large(model, x, y):
    import torch
    return lambda: [torch.empty(2**44)]

for tool in (wrong, nan, missing, refuses, slow, dies, large):
    tools.TOOLS[tool.__name__] = tool
    tools.NAMES[tool.__name__] = tool.__name__
    tools.PACKAGES[tool.__name__] = []
"""


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The harness' modules, and its options for one quick run."""
    paths = [str(ROOT), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.syspath_prepend(str(FOLDER))
    import compare
    import harness
    import page
    import scaling

    args = argparse.Namespace(
        tools=["nnj", "torch.func"],
        quantity="ggn_diag",
        repeats=1,
        threads=1,
        device="cpu",
        limit=60.0,
        memory=16.0,
        out=str(tmp_path),
    )
    return argparse.Namespace(
        harness=harness, compare=compare, page=page, scaling=scaling, args=args
    )


def measure(bench, *tools: str, row: str = "tiny", **options):
    args = argparse.Namespace(**{**vars(bench.args), **options, "tools": list(tools)})
    with bench.harness.Pool(args) as pool:
        found = pool.measure(row)
    assert all(process.pipe.returncode is not None for process in pool.processes.values())
    return found


def test_nnj_and_plain_torch_agree_with_the_reference(bench):
    row = measure(bench, "nnj", "torch.func")
    for tool in ("nnj", "torch.func"):
        assert (
            row[tool]["failed"] == "" and row[tool]["error"] < 1e-5 and len(row[tool]["times"]) == 1
        )
        assert 0 <= row[tool]["bytes"] < 2**26 or math.isnan(row[tool]["bytes"])
    assert bench.compare.ratios(row)["time"][0] == "torch.func"


@pytest.mark.parametrize("tool", PEERS)
def test_peers_agree_with_the_reference(bench, tool):
    if find_spec(PEERS[tool]) is None:
        pytest.skip(f"{PEERS[tool]} is not installed (extra 'benchmarks')")
    row = measure(bench, tool)
    assert row[tool]["failed"] == "" and row[tool]["error"] < 1e-4


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.skipif(
    find_spec("backpack") is None, reason="backpack is not installed (extra 'benchmarks')"
)
def test_backpack_where_its_converter_reorders_the_parameters(bench):
    import tools
    import torch
    from networks import BasicBlock

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        BasicBlock(2, 3, 2), torch.nn.Flatten(), torch.nn.Linear(12, 3)
    ).eval()
    x, y = torch.randn(3, 2, 4, 4), torch.randint(3, (3,))
    reference = tools.reference(model, x, y)()
    for found, expected in zip(tools.backpack(model, x, y)(), reference, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("quantity", ["batch_grad", "batch_grad_sq_norm", "kfac"])
def test_other_quantities_agree_with_their_references(bench, quantity):
    tools = ["nnj", "torch.func"] if quantity == "batch_grad" else ["nnj"]
    row = measure(bench, *tools, *(["jax"] if quantity == "kfac" else []), quantity=quantity)
    for tool in tools:
        assert row[tool]["failed"] == "" and row[tool]["error"] < 1e-5
    if quantity == "kfac":
        assert row["jax"]["failed"] == f"refused: it has no {quantity}"


def test_a_replayed_pass_agrees_with_the_reference(bench):
    if which("gcc") is None and which("g++") is None:
        pytest.skip("there is no C++ compiler")
    found = measure(bench, "nnj-compiled")["nnj-compiled"]
    assert found["failed"] == "" and found["error"] < 1e-5


def test_what_goes_wrong_is_a_cell_that_says_so(bench, monkeypatch, tmp_path):
    """The workers here know broken tools beside the real ones; all else is the harness itself."""
    (tmp_path / "broken.py").write_text(BROKEN)
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(FOLDER)!r}, {str(tmp_path)!r}]\nimport broken\n"
        f"exec(compile(open({str(FOLDER / 'worker.py')!r}).read(), {str(script)!r}, 'exec'))\n"
    )
    monkeypatch.setattr(bench.harness, "WORKER", script)
    names = ["wrong", "nan", "missing", "refuses", "slow", "dies", "large"]
    row = measure(bench, *names[:4], *names[5:]) | measure(bench, "slow", limit=6.0)
    assert 0.009 < row["wrong"]["error"] < 0.011 and row["nan"]["error"] == math.inf
    cells = {name: bench.harness.cell(row[name]) for name in names}
    assert cells["wrong"].startswith("wrong by 0.01: ") and cells["nan"].startswith(
        "wrong by inf: "
    )
    assert cells["missing"] == "missing: no_such_package"
    assert cells["refuses"] == "refused: no rule for / this"
    assert cells["slow"] == "> 6 s"
    assert cells["dies"] == "crashed (SIGABRT)"
    assert cells["large"] == "out of memory"
    assert bench.compare.ratios({**row, "nnj": result([0.1])}) == {}, (
        "what is wrong is no measure for nnj"
    )


def result(seconds: list[float], error: float = 1e-7, size: float = 2**21, failed: str = ""):
    return {"failed": failed, "error": error, "bytes": size, "times": seconds, "others": 0.0}


def test_units_and_long_refusals(bench):
    assert bench.harness.lasting(0.0123) == "12.3 ms"
    assert bench.harness.lasting(0.9996, 0.98, 15.13) == "1 s (0.98–15.1)"
    assert bench.harness.lasting(0.9, 0.8, 1.234) == "900 ms (800–1234)"
    assert (
        bench.harness.cell(result([], failed="refused: " + "word " * 20))
        == "refused: " + "word " * 9 + "word …"
    )


def test_table_of_the_comparison(bench):
    row = {
        "gradient": result([0.001], math.nan),
        "nnj": result([0.004, 0.003, 0.005]),
        "backpack": result([0.002], size=2**22),
        "jax": result([0.001], error=0.5),
        "laplace": result([], failed="missing: laplace"),
    }
    tools = ["nnj", "backpack", "jax", "laplace"]
    lines = bench.compare.table(
        {"machine": "here", "tools": tools, "rows": {"tiny": row}}
    ).splitlines()
    assert len({line.count("|") for line in lines[:3]}) == 1
    assert [c.strip() for c in lines[2].split("|")[1:-1]] == [
        "MLP 8-8-5, for tests of this script",
        "4",
        "5",
        "1 ms",
        "4 ms (3–5), 2 MiB, error 1e-07",
        "2 ms (2–2), 4 MiB, error 1e-07",
        "wrong by 0.5: 1 ms (1–1), 2 MiB",
        "missing: laplace",
        "2 (BackPACK)",
        "–",  # nnj.compile was not asked
        "0.5 (BackPACK)",
    ]
    assert lines[-1] == "here."
    row["jax"]["others"] = 0.96
    lines = bench.compare.table(
        {"machine": "here", "tools": tools, "rows": {"tiny": row}}
    ).splitlines()
    assert lines[-1] == "here. **Disturbed:** other programs used up to 1.0 cores meanwhile."


def test_the_page_is_that_of_the_results(bench):
    """If this fails: python examples/benchmarks/page.py."""
    assert (FOLDER / "README.md").read_text() == bench.page.page()
    for name, (heading, _, caption) in bench.page.PARTS.items():
        assert f"## {heading}\n" in bench.page.page(), f"results/{name}.md is missing"
        assert not caption or f"(results/{name}.png)" in bench.page.page()


def test_one_part_of_the_page_is_renewed_without_the_others(bench, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "drawn.png").write_bytes(b"\x89PNG")
    bench.page.publish("floor", "| a floor |", folder=tmp_path)
    bench.page.publish("compare", "| first |", tmp_path / "drawn.png", tmp_path)
    bench.page.publish("compare", "| second |\n", folder=tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| second |" in text and "| first |" not in text and "| a floor |" in text
    assert text.count("\n## ") == 2 and text.index("| second |") < text.index("| a floor |")
    assert text.count("![") == 1 and (tmp_path / "results" / "compare.png").exists()


def test_a_row_is_renewed_without_the_others(bench, tmp_path):
    """Below the table stands which rows were measured when."""
    (tmp_path / "results").mkdir()
    head = "| network | N |\n|---|---|\n"

    def part(*rows, note, head=head):
        table = head + "".join(f"| {name} | {n} |\n" for name, n in rows) + f"\n{note}\n"
        bench.page.publish("compare-kfac", table, folder=tmp_path)
        return (tmp_path / "results" / "compare-kfac.md").read_text()

    assert part(("A, 1 x 1", 1), ("B", 2), note="then.").endswith("| B | 2 |\n\nthen.\n")
    both = part(("B", 3), ("C", 4), note="now.")
    assert both == (
        head + "| A, 1 x 1 | 1 |\n| B | 3 |\n| C | 4 |\n\n*A, 1 x 1:* then.\n\n*B; C:* now.\n"
    )
    assert part(("C", 5), note="later.").endswith("*B:* now.\n\n*C:* later.\n")
    again = part(("A, 1 x 1", 6), ("B", 7), ("C", 8), note="all.")
    assert again.endswith("| C | 8 |\n\nall.\n") and "then." not in again
    other = "| network | K |\n|---|---|\n"
    assert part(("D", 9), note="of others.", head=other) == other + "| D | 9 |\n\nof others.\n"


def test_scaling_on_the_smallest_sizes(bench, tmp_path):
    options = ["--axes", "classes", "concatenated", "--points", "2", "--repeats", "1"]
    tools = ["--threads", "1", "--tools", "nnj"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [
            sys.executable,
            str(FOLDER / "scaling.py"),
            *options,
            *tools,
            "--out",
            str(tmp_path),
            "--no-figure",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    for text in ("| C = 2 |", "| C = 10 |", "| depth = 4 |", "time ∝ C^a", "Nowhere is it above"):
        assert text in table
    assert "wrong" not in table and len({s.count("|") for s in table.splitlines() if "|" in s}) == 1


def test_what_scaling_says_of_memory_and_of_growth(bench):
    size = bench.scaling.bound("nnj", {"results": 8.0})
    assert size == 1.1 * 2**28 + 8
    few, many = (
        {
            "gradient": result([0.01 * n]),
            "nnj": {**result([0.02 * n**2], size=memory), "results": 8.0},
        }
        for n, memory in ((2, size), (10, 2 * size))
    )
    results = {"machine": "here", "tools": ["nnj"], "sweeps": {"classes": [2, 10]}}
    results["rows"] = {"classes-2": few, "classes-10": many}
    lines = bench.scaling.table(results).splitlines()
    assert lines[3] == "| C = 2 | 20 ms | 80 ms | 4.0 | 282 of 282 |"
    assert lines[4] == "| C = 10 | 100 ms | 2 s | 20.0 | **563 of 282** |"
    assert lines[5] == "| time ∝ C^a, a = | 1.00 | 2.00 | 1.00 |  |"
    assert "Above that: classes-10 (nnj: 563 of 282 MiB). here." in lines[-1]


@pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="needs matplotlib (extra 'examples' or 'benchmarks')"
)
def test_a_panel_for_each_size_that_grows(bench, tmp_path):
    row = {"gradient": result([0.1]), "nnj": {**result([0.2]), "results": 8.0}}
    sweeps = {axis: [2, 4] for axis in ("classes", "chain", "tokens", "sums")}
    rows = {f"{axis}-{size}": row for axis in sweeps for size in (2, 4)}
    results = {"machine": "here", "tools": ["nnj"], "sweeps": sweeps, "rows": rows}
    bench.scaling.figure(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_exponent(bench):
    assert bench.scaling.exponent([(n, 3e-4 * n**1.5, 0.0) for n in (2, 4, 8)]) == pytest.approx(
        1.5
    )
    assert math.isnan(bench.scaling.exponent([(2, 1.0, 0.0)]))


@pytest.mark.parametrize("axis", ["classes", "residual", "sums", "concatenated", "tokens"])
def test_networks_that_grow(bench, axis):
    import networks

    assert networks.find("tiny") is networks.ROWS["tiny"]
    with pytest.raises(KeyError, match="no row 'growth-3'"):
        networks.find("growth-3")
    model, x, y = networks.find(f"{axis}-4").make()
    assert model(x).shape[0] == len(y) == len(x) and model(x).shape[1] > int(y.max())


def test_the_floor_of_a_row():
    command = [sys.executable, str(FOLDER / "floor.py"), "--rows", "tiny", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| MLP 8-8-5"))
    time, floor = (float(cell) for cell in row.split("|")[2:4])
    assert time > floor > 0
    for layer in ("0 Linear", "1 ReLU", "(forward, backward, loss, last layer)"):
        assert f"| {layer} |" in done.stdout


@pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="needs matplotlib (extra 'examples' or 'benchmarks')"
)
def test_time_and_error_against_the_tolerance(tmp_path):
    args = ["--epochs", "1", "--samples", "8", "--repeats", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "tolerance.py"), *args], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (tmp_path / "table.md").read_text().splitlines()
        if re.match(r"\| [\d.e-]+ \|", line)
    ]
    assert len(rows) == 8
    for tol, columns, deficit, error, *_ in rows:
        assert (
            0 <= float(deficit) <= float(tol) and 1 <= int(columns) <= 99 and 0 <= float(error) < 1
        )
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_cost_of_extending():
    command = [sys.executable, str(FOLDER / "overhead.py"), "--cases", "0", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = [
        line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| MLP")
    ]
    plain, extended, ratio = map(float, row[1:])
    # which is longer, a busy machine does not say
    assert plain > 0 and ratio == pytest.approx(extended / plain, rel=0.01)


def test_what_compiling_saves():
    options = ["--cases", "0", "--backends", "aot", "--repeats", "1"]
    command = [sys.executable, str(FOLDER / "compiled.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = [
        line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| MLP")
    ]
    eager, replayed, ratio = map(float, row[2:])
    assert eager > 0 and ratio == pytest.approx(replayed / eager, rel=0.05)


def test_operators_beside_others():
    """On small networks: results are compared before they are timed."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / "operators.py"), "--scale", "16", "--repeats", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n|") >= 8 and "by hand" in done.stdout
