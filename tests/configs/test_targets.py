"""Targets have one syntax for all commands."""

import pytest

from wanforge.configs.targets import ARCHITECTURES, load_targets, parse_targets
from wanforge.configs.tiles import tiled_architectures
from wanforge.errors import ConfigError

ALL = (80, 86, 89, 90, 100, 120)


@pytest.mark.parametrize(
    ("texts", "sms"),
    [
        (["rtx5090,rtx4090,h100"], (120, 89, 90)),
        (["rtx5090", "rtx4090,h100"], (120, 89, 90)),
        (["h100,h200,sm_90"], (90,)),
        (["sm_100, sm_80"], (100, 80)),
        (["RTX5090, Sm_89"], (120, 89)),
        (["all"], ALL),
        (["rtx3090,ALL"], (86, 80, 89, 90, 100, 120)),
        (["sm_121,sm_75"], (121, 75)),
    ],
)
def test_targets_are_gpus_or_architectures(texts: list[str], sms: tuple[int, ...]) -> None:
    assert parse_targets(texts).sms == sms


def test_an_architecture_stands_for_every_gpu_that_has_it() -> None:
    assert list(parse_targets(["sm_90"]).gpus) == ["h100", "h200"]
    assert list(parse_targets(["h200,sm_90"]).gpus) == ["h200", "h100"]
    assert parse_targets(["sm_121"]).gpus == {}
    assert list(parse_targets(["all"]).gpus) == list(load_targets())


@pytest.mark.parametrize("text", ["gtx970", "h100,,sm_80", "sm_91", "", "90"])
def test_unknown_targets_are_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"no target is called '.*'; (did you mean \S+ )?known: .*rtx5090.*sm_90.*all"
    ):
        parse_targets([text])


def test_a_slip_of_the_finger_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"no target is called 'rtx5909'; did you mean rtx5090\? known"):
        parse_targets(["rtx5909"])


def test_every_architecture_that_occurs_can_be_named() -> None:
    assert {target.sm for target in load_targets().values()} | set(tiled_architectures()) <= set(ARCHITECTURES)
