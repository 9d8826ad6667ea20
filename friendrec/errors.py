"""The one exception that a user may see."""


class FriendrecError(Exception):
    """A mistake the user can mend: one line that says what is wrong and what to do about it."""
