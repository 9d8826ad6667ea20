"""Draws each example's negatives and what the logQ correction needs, in one compiled pass.

The negatives of an example are a function of (seed, epoch, example) alone. Every candidate, from whichever source,
is corrected by how often all sources together are expected to draw it,

    count(v) = K_u / seen(t) + K_r · share(v, recent window before t) + K_p · share(v, all events before t)
             + M · share(v, targets of the global batch),

the shares being of events received, so that Σ exp(s(v)) / count(v) over the drawn candidates is an unbiased estimate
of Σ_v exp(s(v)) over everybody who can be drawn: with uniform negatives all users seen before t, with popularity alone
those who have received an event, with in-batch ones alone the targets of the batch. The last share is the batch's own,
not the log's: a batch holds its examples' neighbours, so their targets are drawn far more often.
"""

import numba
import numpy as np

from friendrec.datasets.state import lower_bound


@numba.njit(cache=True, nogil=True)
def mix(value):  # type: ignore[no-untyped-def]
    """SplitMix64's finaliser (Steele et al. 2014): a uniform 64-bit hash of a counter."""
    value = np.uint64(value) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def draws(seed, epoch, stream, counter, num):  # type: ignore[no-untyped-def]
    """`num` 63-bit integers for each counter `[B, num]`, a function of (seed, epoch, stream, counter) only."""
    key = mix(np.uint64(seed) ^ mix(np.uint64(epoch)))
    drawn = np.empty((len(counter), num), np.int64)
    for i in range(len(counter)):
        state = mix(key ^ mix(np.uint64(counter[i]) ^ mix(np.uint64(stream))))
        for k in range(num):
            drawn[i, k] = np.int64(mix(state + np.uint64(k)) >> np.uint64(1))
    return drawn


@numba.njit(cache=True, nogil=True)
def received_between(user, since, until, offsets, timestamp, received):  # type: ignore[no-untyped-def]
    """Events that a user received in [since, until)."""
    start = offsets[user]
    end = lower_bound(timestamp, start, offsets[user + 1], until)
    begin = lower_bound(timestamp, start, end, since)
    before = received[begin - 1] if begin > start else 0
    return (received[end - 1] if end > start else 0) - before


@numba.njit(cache=True, nogil=True)
def log_counts(  # type: ignore[no-untyped-def]
    candidates, actor, target, contact_offsets, contact_partner, since, until, recent_events, past_events, seen,
    uniform, recent, popularity, shared, shared_users, shared_shares, offsets, timestamp, received,
):  # fmt: skip
    """Log of count(v) for candidates `[B, C]`; +inf for what is no negative of the example.

    Those are the actor, the target, a contact named by the query (it stands in the denominator already), and a user
    not seen before t. `recent_events` and `past_events` are how many events the window and the whole past hold;
    `shared_users` are the distinct targets of the global batch, ascending.
    """
    logs = np.empty(candidates.shape, np.float32)
    for i in range(candidates.shape[0]):
        for c in range(candidates.shape[1]):
            v = candidates[i, c]
            masked = v == actor[i] or v == target[i] or v >= seen[i]
            for j in range(contact_offsets[i], contact_offsets[i + 1]):
                masked |= contact_partner[j] == v
            if masked:
                logs[i, c] = np.inf
                continue
            count = uniform / seen[i]
            place = lower_bound(shared_users, 0, len(shared_users), v)
            if place < len(shared_users) and shared_users[place] == v:
                count += shared * shared_shares[place]
            if recent > 0 and recent_events[i] > 0:
                drawn = received_between(v, since[i], until[i], offsets, timestamp, received)
                count += recent * drawn / recent_events[i]
            if popularity > 0 and past_events[i] > 0:
                drawn = received_between(v, timestamp[offsets[v]], until[i], offsets, timestamp, received)
                count += popularity * drawn / past_events[i]
            logs[i, c] = np.log(count)
    return logs
