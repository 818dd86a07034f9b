import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_python_in_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 7
    script = tmp_path / "session.py"  # a file: nnsight reads the source of a trace
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "64 problems, 2624 tokens" in done.stdout
    assert "\n1.0 1 0.9" in done.stdout  # every answer right, and a hub at z1
    best = re.findall(r"label='(L\dH\d)'", done.stdout)
    assert sorted(best) == ["L1H0", "L1H1", "L1H2", "L1H3"]


def test_the_readme_has_two_commands_and_its_picture() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(re.findall(r"^\$ ", text, re.MULTILINE)) == 2
    for target in re.findall(r"\]\(([^)h][^)]*)\)", text):
        assert (README.parent / target).exists(), target
