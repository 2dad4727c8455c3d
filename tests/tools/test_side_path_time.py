"""What LoRAs beside the linears are predicted to cost."""

import pytest

from tools.lora.side_path_time import GPUS, MODELS, main


def test_every_model_takes_longer_with_products_beside_its_linears(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row[0] for row in rows} == set(MODELS)
    assert all(len(row) == 2 + len(GPUS) and all(1 < float(cell) < 2 for cell in row[2:]) for row in rows)
