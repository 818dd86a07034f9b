import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_hooks_only_demonstration_finds_the_heads_and_what_they_are_worth() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "induction_heads.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "induction heads: L1H0, L1H1, L1H2, L1H3\n" in done.stdout
    losses = [float(x) for x in re.findall(r": +([0-9]\.[0-9]{3})", done.stdout)]
    nobody, *ones, every, previous = losses[:7]
    assert nobody < 0.02
    assert max(ones) < 0.5  # the heads stand in for each other
    assert min(every, previous) > 4  # without all of them, or without what feeds them: guessing


def test_the_experiments_find_what_is_known_of_the_demonstration_models() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "what_heads_do.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "gradient importance misses L0H3" in done.stdout
    both = re.findall(r"all four, \w+: accuracy ([0-9.]+), loss ([0-9.]+)", done.stdout)
    assert all(float(right) < 0.03 for right, _ in both)
    assert abs(float(both[1][1]) - 4.143) < 0.03  # the mean leaves nothing but guessing
    assert done.stdout.count("no-op 0\n") == 2
    doses = [float(x) for x in re.findall(r"instruction times [0-9.]+: accuracy (.*)", done.stdout)]
    for got, known in zip(doses, (0.998, 0.973, 0.670, 0.255, 0.226), strict=True):
        assert abs(got - known) < 0.05  # of 64 problems
    assert "answer 'bcde'" in done.stdout
