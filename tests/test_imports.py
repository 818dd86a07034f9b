import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "nnsight")


def imported(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has after some code."""
    report = f"{code}\nimport sys\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, check=True
    )
    return {name for name in HEAVY if repr(name) in done.stdout.splitlines()[-1]}


def test_importing_probe_and_the_recipes_needs_no_torch() -> None:
    assert imported("import probe; from recipes import cli, flow, heads, plots") == set()


def test_reading_and_measuring_a_store_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "s"
    make = f"import probe; probe.capture(probe.load('demo-gpt2'), ['abab', 'c'], {str(path)!r})"
    subprocess.run([sys.executable, "-c", make], check=True, capture_output=True)
    read = (
        f"import probe; from recipes import heads; ds = probe.open({str(path)!r})\n"
        "assert probe.valid(ds).any(); assert heads.entropy(ds.pattern).shape == (2, 2, 4)"
    )
    assert imported(read) == set()


def test_without_torch_a_store_opens_and_loading_a_model_says_what_is_missing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "s"
    make = f"import probe; probe.capture(probe.load('demo-gpt2'), ['abab'], {str(path)!r})"
    subprocess.run([sys.executable, "-c", make], check=True, capture_output=True)
    code = f"""if True:
        import sys
        sys.modules.update(dict.fromkeys({HEAVY}))  # as if none of them were installed
        import probe
        assert probe.open({str(path)!r}).sizes["problem"] == 1
        try:
            probe.load("demo-gpt2")
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "probe.load needs torch, which cannot be imported here (import of torch halted; None in "
        "sys.modules). Stores can be read and measured without torch; to run models: "
        "pip install attn-probe"
    )


def test_a_name_that_probe_lacks_is_an_attribute_error() -> None:
    import probe

    with pytest.raises(AttributeError, match="module 'probe' has no attribute 'lode'"):
        _ = probe.lode


def test_every_public_name_is_there() -> None:
    import probe

    assert all(getattr(probe, name) is not None for name in probe.__all__)
    assert callable(probe.problems)
    assert callable(probe.capture)
