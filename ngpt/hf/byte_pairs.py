"""Merges for vocabularies that list none: they join any two neighbours that form an entry, the best entry first."""

from collections.abc import Mapping


def last_merge[Text: (str, bytes)](token: Text, ranks: Mapping[Text, int]) -> tuple[Text, Text] | None:
    """The two parts that `token` is joined from.

    One pair for each token says the same as the vocabulary. Joining goes by rank alone, so the text around a stretch that becomes
    `token` does not change the order inside it: the token always forms as it does in isolation. With one pair for each rank, two pairs
    of the same rank differ only in their place, and both libraries take the first.

    Args:
        token: An entry of at least two characters or bytes.
        ranks: Rank of each entry; the lowest is joined first, and of equal places the first.

    Returns:
        None where joining never gets there: then no text gives this token, unless it is looked up as a whole.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, place = None, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1])
            if rank is not None and (best is None or rank < best):
                best, place = rank, i
        if best is None:
            return None
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]
