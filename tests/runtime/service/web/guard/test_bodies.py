"""Large bodies that come at the same time."""

import asyncio

from starlette.types import Message, Receive, Scope, Send

from wanforge.runtime.service.web.forms.errors import ApiError
from wanforge.runtime.service.web.guard.bodies import LARGEST_AT_ONCE, SMALL, Bounded

MOST = 10 * SMALL


async def statuses(sizes: list[int], *, begins_at_once: bool = False) -> list[int]:
    """The statuses of requests whose bodies have some sizes, each of which is answered when all have come.

    Args:
        begins_at_once: Whether each answer begins when its request has come, and lasts until all have.
    """
    answered, found = asyncio.Event(), []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
        except ApiError as error:
            found.append(error.status)
        else:
            found.append(200)
            if begins_at_once:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            await answered.wait()

    async def send(message: Message) -> None:
        assert begins_at_once

    def coming(size: int) -> Receive:
        async def receive() -> Message:
            return {"type": "http.request", "body": bytes(size)}

        return receive

    bounded = Bounded(app, MOST)
    async with asyncio.TaskGroup() as group:
        for size in sizes:
            group.create_task(bounded({"type": "http"}, coming(size), send))
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        answered.set()
    assert bounded.held == 0
    return found


def test_few_large_bodies_are_held_at_once_and_small_ones_always_find_room() -> None:
    large = [MOST] * (LARGEST_AT_ONCE + 2)
    found = asyncio.run(statuses([*large, SMALL, SMALL]))
    assert found == [200] * LARGEST_AT_ONCE + [503] * 2 + [200, 200]


def test_an_answer_that_lasts_holds_no_body() -> None:
    large = [MOST] * (2 * LARGEST_AT_ONCE)
    assert asyncio.run(statuses(large, begins_at_once=True)) == [200] * len(large)
