"""Times on the command line: ISO 8601 to epoch microseconds and back."""

from datetime import UTC, datetime, timedelta

from friendrec.datasets.prepared import PreparedData
from friendrec.errors import FriendrecError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def parse_time(text: str, option: str) -> int:
    """Epoch µs of an ISO 8601 time; UTC where it names no zone."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise FriendrecError(f"{option} {text} is no ISO 8601 time: write it as 2025-01-31T12:00:00Z") from None
    return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - EPOCH) // timedelta(microseconds=1)


def format_time(microseconds: int) -> str:
    """ISO 8601 in UTC."""
    return (EPOCH + timedelta(microseconds=int(microseconds))).isoformat()


def end_of_log(data: PreparedData) -> int:
    """The first time (µs) by which every event of the log has happened."""
    return int(data.timestamp[data.event_entry[-1]]) + 1
