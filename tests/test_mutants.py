"""tests/mutate.py: planted defects are noticed by the tests. Here some of each file; all of them: run it by hand."""

import os
import subprocess
import sys

import mutate
import pytest
from conftest import ROOT

MOST = 4  # of each file: all of them take hours of the machine that runs the tests


def test_every_mutant_still_fits_its_source():
    """Each text that a mutant replaces occurs once, each replacement compiles, each test file is there."""
    for mutant in mutate.MUTANTS:
        compile(mutant.applied(), mutant.file, "exec")
        assert mutant.old != mutant.new
        for test in mutant.tests:
            assert (ROOT / test).is_file()
    assert len({mutant[:2] for mutant in mutate.MUTANTS}) == len(mutate.MUTANTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "interpret"), sorted({(mutant.file, mutant.interpreted) for mutant in mutate.MUTANTS})
)
def test_mutants_are_killed(file, interpret):
    done = subprocess.run(
        [sys.executable, "tests/mutate.py", file, "--most", str(MOST)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": str(int(interpret))},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "mutants killed" in done.stdout
