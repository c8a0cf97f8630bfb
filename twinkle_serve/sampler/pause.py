"""A pause of all engines, held by a caller."""

from __future__ import annotations

import contextlib

from twinkle_serve import timing
from twinkle_serve.data_format.weights import PauseMode
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.lease_keeper import keep_renewed
from twinkle_serve.sampler.router_client import RouterClient


class Pause:
    """A pause of every engine, until `resume` or the end of a `with` block.

    Guarantees:
        It ends within its lease when this process dies.
    """

    def __init__(self, client: RouterClient, mode: PauseMode, lease_s: float) -> None:
        self._client, self._lease_s = client, lease_s
        # The mode "wait" takes as long as samples do.
        self._id = client.loop.call(client.call(timing.CONTROL_TIMEOUT_S, RouterAPI.pause, mode, lease_s))
        self._ended = False
        self._keeper = client.loop.start(keep_renewed(self._renew, lease_s / 3))

    async def _renew(self) -> None:
        await self._client.call(self._lease_s, RouterAPI.renew_pause, self._id, self._lease_s)

    def resume(self) -> None:
        """Resumes the engines. Idempotent.

        Raises:
            LeaseExpiredError: the pause had ended before, because the router was restarted or could not be reached.
        """
        if not self._ended:
            self._ended = True
            self._keeper.cancel()
            self._client.loop.call(self._client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.resume, self._id))

    def __enter__(self) -> Pause:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is None:
            self.resume()
        else:
            with contextlib.suppress(TwinkleServeError):  # the error of the block says more
                self.resume()
