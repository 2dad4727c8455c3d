"""How often each route gave which answer."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wanforge.runtime.service.web.forms.errors import CODE

NO_ROUTE = "none"
"""What stands for the path of a request that leads to no route, so that nobody can add labels without end."""


class AnswerFigures:
    """The number of answers by the template of their route, their HTTP status, and the code of their error."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()

    def count(self, scope: Scope, status: int) -> None:
        """Count an answer."""
        route = getattr(scope.get("route"), "path", NO_ROUTE)
        self.counts[route, str(status), scope.get(CODE, "")] += 1

    def collect(self) -> Iterator[Metric]:
        answers = CounterMetricFamily(
            "wanforge_http_answers", "Answers by route, status and code of error.", labels=["route", "status", "code"]
        )
        for labels, count in self.counts.copy().items():
            answers.add_metric(labels, count)
        yield answers


class Counted:
    """Counts every answer of the application."""

    def __init__(self, app: ASGIApp, figures: AnswerFigures) -> None:
        self.app, self.figures = app, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = scope["type"] != "http"

        async def sending(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self.figures.count(scope, message["status"])
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            if not has_begun:  # the answer to it is made outside of all middleware
                scope[CODE] = "internal_error"
                self.figures.count(scope, 500)
            raise
