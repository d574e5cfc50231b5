"""The orders that a client gives to all workers: cancel a run, pause a task, resume it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from brokertask.control import MAX_REASON, Entry, Kind
from brokertask.errors import InvalidOption
from brokertask.identity import checked_id
from brokertask.run import Session, from_thread
from brokertask.settings import Settings
from brokertask.topology import check_task_id


class Orders:
    """What of a client goes to the control log.

    When a call returns, the order is in the log: workers hear of it in a few milliseconds, those
    that start later when they do. Needs the right to write to `<namespace>.control`.
    """

    _settings: Settings
    _now_ms: Callable[[], int]
    _session: Callable[[], Awaitable[Session]]

    async def cancel(self, run_id: str, *, reason: str = "", children: bool = False) -> None:
        """Have a run end, wherever it is: queued, delayed, asleep or running.

        Nothing happens to one that has ended, unless it is redriven within the seven days that the
        log is kept: then it ends again. Cost: one confirmed publish.

        Args:
            run_id: Its id.
            reason: Why; up to 500 characters, told in its event and to its hooks.
            children: With the runs that it has triggered. If it was triggered by none itself, or
                where there is a server, with those that these have triggered, and so on.

        Raises:
            PublishError: The order was not taken, or (`unknown`) perhaps was; give it again.
        """
        await self._order("cancel", checked_id(run_id), reason, children=children)

    def cancel_sync(self, run_id: str, *, reason: str = "", children: bool = False) -> None:
        """Do what `cancel` does, from a thread without an event loop."""
        from_thread(
            lambda: self.cancel(run_id, reason=reason, children=children),
            name="cancel_sync",
            instead="await cancel(...)",
        )

    async def pause(self, task: str, *, reason: str = "") -> None:
        """Have no worker begin runs of a task until it is resumed; those that run go on.

        Lasts for the seven days of the log; longer where a server knows of it.

        Raises:
            PublishError: As `cancel`.
        """
        await self._order("pause", check_task_id(task), reason)

    def pause_sync(self, task: str, *, reason: str = "") -> None:
        """Do what `pause` does, from a thread without an event loop."""
        from_thread(
            lambda: self.pause(task, reason=reason),
            name="pause_sync",
            instead="await pause(...)",
        )

    async def resume(self, task: str, *, reason: str = "") -> None:
        """Have workers begin runs of a task again.

        Raises:
            PublishError: As `cancel`.
        """
        await self._order("resume", check_task_id(task), reason)

    def resume_sync(self, task: str, *, reason: str = "") -> None:
        """Do what `resume` does, from a thread without an event loop."""
        from_thread(
            lambda: self.resume(task, reason=reason),
            name="resume_sync",
            instead="await resume(...)",
        )

    async def _order(
        self, kind: Kind, subject: str, reason: str, *, children: bool = False
    ) -> None:
        if len(reason) > MAX_REASON:
            raise InvalidOption(f"a reason is up to {MAX_REASON} characters, not {len(reason)}")
        session = await self._session()
        at_ms = self._now_ms()
        entry = Entry(kind=kind, subject=subject, at_ms=at_ms, reason=reason, children=children)
        route, timeout = self._settings.names.control_route(), self._settings.publish_timeout
        await session.transport.publish(route, entry.message(), timeout=timeout)
