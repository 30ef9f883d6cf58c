"""The examples of products, run as a user runs them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NUMBER = r"(\d\.\d+(?:e[-+]\d+)?)"


def test_jacobians(tmp_path):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "jacobians.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = done.stdout
    for name in ("jacobian", "jvp", "vjp", "jmp", "mjp", "jTmjp", "jmjTp", "jTmjp_pair"):
        assert f"nnj.{name}(model, x" in out
    assert out.count("    nnj  ") == out.count("    dense  ") == 13
    error = re.search(f"largest difference of a product from the dense one: {NUMBER}", out)
    assert error and float(error[1]) < 1e-12, out
    first, last = re.search(rf"first layer {NUMBER}    last layer (\de[-+]\d+)", out).groups()
    assert 0.01 < float(first) < 1 and float(last) < 1e-12
    low, high = re.search(f"sampled standard deviation: {NUMBER} to {NUMBER}", out).groups()
    assert 0.97 < float(low) <= float(high) < 1.03, out
    assert os.listdir(tmp_path) == []


def test_the_benchmark_compares_before_it_measures(capsys):
    spec = importlib.util.spec_from_file_location(
        "benchmark_of_products", ROOT / "examples" / "benchmarks" / "products.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = module.main(batch=2, rounds=1)
    assert [limit for _, limit in results.values()] == [1.5, 1.5, 1.5, 3.0]
    assert all(ratio > 0 for ratio, _ in results.values())
    assert "jTmjp, diag_backprop" in capsys.readouterr().out
