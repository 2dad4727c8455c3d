"""Frames are written beside the decoder, in order, and errors of the writer reach the caller."""

import threading

import pytest
import torch

from wanforge.runtime.output.frame_queue import MOST_WAITING, FrameQueue


def frame(value: int) -> torch.Tensor:
    return torch.full((1, 1, 3), value, dtype=torch.uint8)


def test_frames_wait_for_a_slow_encoder_and_keep_their_order() -> None:
    ready, written = threading.Event(), list[int]()

    def write(data: bytes) -> None:
        ready.wait()
        written.append(data[0])

    frames = FrameQueue(write)
    for value in range(MOST_WAITING):
        frames.put(frame(value))  # none of which is written yet
    assert written == []
    ready.set()
    for value in range(MOST_WAITING, 30):
        frames.put(frame(value))
    frames.finish()
    assert written == list(range(30))


@pytest.mark.parametrize("more", [0, 5 * MOST_WAITING])
def test_an_error_reaches_the_caller(more: int) -> None:
    def write(data: bytes) -> None:
        raise BrokenPipeError

    frames = FrameQueue(write)

    def feed() -> None:
        for value in range(1 + more):
            frames.put(frame(value))
        frames.finish()

    with pytest.raises(BrokenPipeError):
        feed()
    frames.abandon()
    assert not [each for each in threading.enumerate() if each.name == "encoder" and each.is_alive()]
