"""Who may connect to the embedded broker: everybody, or users with passwords. Loaded by amqtt by its dotted path."""

import hmac
from dataclasses import dataclass, field

from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import Session


class UserAuth(BaseAuthPlugin):  # type: ignore[misc]
    """Without users everybody passes; with users the password must match."""

    @dataclass
    class Config:
        """`users` maps names to passwords."""

        users: dict[str, str] = field(default_factory=dict)

    async def authenticate(self, *, session: Session) -> bool:
        """Whether the connecting session may stay."""
        users: dict[str, str] = self.config.users
        if not users:
            # amqtt then keeps nothing for it after a disconnect, which is what a clean session asks for.
            session.is_anonymous = True
            return True
        expected = users.get(session.username or "")
        given = (session.password or "").encode()
        return expected is not None and hmac.compare_digest(given, expected.encode())
