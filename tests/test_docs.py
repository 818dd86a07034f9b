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
