"""Edits of single instructions are caught."""

from pathlib import Path

import pytest

from tools.ptx.mutations import mutate

pytestmark = pytest.mark.slow


def test_a_few_edits_are_caught(folder: Path) -> None:
    done = mutate(8, 1, folder, "quantiser by tiles, 128x256|quantiser by rows, 1x128", (89,))
    assert len(done) == 8
    assert [mutant for mutant, _, caught in done if not caught] == []
